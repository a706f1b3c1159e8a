"""No line of the project runs what a file or a user's text holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from commands import ROOT

FOLDERS = ("megatron_vl", "toolkits", "examples")
CALLS = {  # calls, by how they are written
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load",
    "pickle.loads", "pickle.Unpickler", "joblib.load", "marshal.loads", "shelve.open",
}
ARGUMENTS = {  # (keyword, its value) of any call
    ("weights_only", False), ("shell", True), ("trust_remote_code", True), ("allow_pickle", True),
}
ONE_MAKER = {"bitsandbytes", "xformers", "deepspeed"}
VARIABLES = re.compile("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD|HF_TRUST_REMOTE_CODE")
ALLOWED = {
    # Taken out of a rank's environment, whatever a shell has set.
    "megatron_vl/launch/worker.py": {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"},
    # From a process this one has forked, through memory that only they share.
    "megatron_vl/platform/write_results.py": {"pickle.loads()"},
    # Rows that ranks of one job send each other, as torch's own collectives of objects are: see
    # docs/security.md on who may reach their ports.
    "megatron_vl/training/exchange.py": {"pickle.loads()"},
}


def forbidden(text: str) -> set[str]:
    """What in a Python source may not be there."""
    found = set(VARIABLES.findall(text))
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in CALLS:
            found.add(f"{name}()")
        if name == "torch.load" and not any(one.arg == "weights_only" for one in node.keywords):
            found.add("torch.load() without weights_only")
        for one in node.keywords:
            value = getattr(one.value, "value", None)
            # By identity: 0 equals False.
            if any(one.arg == arg and value is bad for arg, bad in ARGUMENTS):
                found.add(f"{one.arg}={value}")
    return found


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_nothing_runs_what_a_file_or_a_user_wrote():
    found = {str(path.relative_to(ROOT)): forbidden(path.read_text(encoding="utf-8"))
             for path in sources()}
    assert len(found) > 100
    assert {name: what for name, what in found.items() if what - ALLOWED.get(name, set())} == {}


def test_the_program_is_bound_to_the_cards_of_no_maker():
    found = []
    for path in sorted((ROOT / "megatron_vl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            asks = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.version.cuda"
            if asks or ONE_MAKER & {name.partition(".")[0] for name in names}:
                found.append((path.name, ast.unparse(node)))
    assert not found


def test_shell_scripts_evaluate_no_text_and_set_no_such_variable():
    scripts = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")
               if path.suffix in (".sh", ".sbatch", ".yaml")]
    assert scripts
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(^|[;&|]|\bthen|\bdo)\s*eval\s", text, re.M), path
        assert not VARIABLES.search(text), path


@pytest.mark.parametrize(("text", "found"), [
    ("torch.load(path, weights_only=False)", {"weights_only=False"}),
    ("torch.load(path)", {"torch.load() without weights_only"}),
    ("torch.load(path, weights_only=True)", set()),
    ("subprocess.run(words, shell=True)", {"shell=True"}),
    ("os.system(text)", {"os.system()"}),
    ("os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'", {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}),
    ("yaml.load(text, Loader=yaml.Loader)", {"yaml.load()"}),
    ("A.from_pretrained(path, trust_remote_code=True)", {"trust_remote_code=True"}),
    ("model.eval()", set()),
    ("re.compile(text)", set()),
])
def test_what_is_forbidden_is_seen(text, found):
    assert forbidden(text) == found
