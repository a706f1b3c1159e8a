"""setup.py declares what is imported, and what installs by itself installs what it allows."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def declared() -> dict[str, Requirement]:
    """The requirements of the package itself, by name."""
    text = (ROOT / "setup.py").read_text()
    found = re.search(r"install_requires=(\[.*?\]),\n    extras", text, re.S)[1]
    return {one.name: one for one in map(Requirement, ast.literal_eval(found))}


def optional() -> set[str]:
    """What the extras install that some inputs or machines need, imported where they are met."""
    text = (ROOT / "setup.py").read_text()
    return {Requirement(one).name
            for extra in ("parquet", "parity", "modelscope", "web", "trackers", "cuda", "npu")
            for one in ast.literal_eval(
                re.search(rf'"{extra}": (\[.*?\]),$', text, re.M | re.S)[1])}


def imported() -> set[str]:
    """The packages megatron_vl imports from outside."""
    names = set()
    for path in (ROOT / "megatron_vl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"megatron_vl"}


def test_every_package_that_is_imported_is_declared():
    made_by = packages_distributions()
    known = {name.lower() for name in {*declared(), *optional()}}
    # What an extra brings may be absent; then its distribution is called as its module.
    missing = [name for name in sorted(imported())
               if not {one.lower().replace("_", "-") for one in made_by.get(name, [name])} & known]
    assert not missing


def test_the_versions_of_torch_that_are_installed_or_advised_are_those_declared():
    allowed = declared()["torch"].specifier
    for file in ("Dockerfile", "toolkits/environment.sh"):
        versions = re.findall(r"torch==(\d[\d.]*\d)", (ROOT / file).read_text())
        assert versions and all(version in allowed for version in versions), file
