"""Who may import whom, and what an import may not do.

The table below is the one of docs/architecture.md; each room names all it may import.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_vl"

ALWAYS = ("errors", "inputs", "outputs", "pages", "pickles", "typed", "workers")
ROOMS = {  # room -> rooms or modules it may import; itself and the modules of ALWAYS always
    "errors": (),
    "inputs": (),
    "outputs": (),
    "pages": (),
    "pickles": (),
    "typed": (),
    "workers": (),
    "parallel": (),
    "platform": ("parallel",),
    "launch": ("platform",),
    "ops": ("parallel", "platform"),
    "weights": ("parallel",),
    "models": ("parallel", "platform", "ops", "weights"),
    "data": ("parallel", "models.spec", "models.family", "models.media"),
    "peft": ("parallel", "platform", "weights", "models"),
    "training": ("parallel", "platform", "launch", "ops", "weights", "models", "peft", "data"),
    "parity": ("parallel", "platform", "ops", "weights", "models", "peft", "data", "training"),
    "planner": ("parallel", "platform", "models", "training"),
    "ask": ("parallel", "platform", "weights", "models", "peft", "data"),
    "cli": ("parallel", "platform", "launch", "ops", "weights", "models", "peft", "data",
            "training", "planner", "parity", "ask"),
    "__main__": ("cli",),
}
WITHIN = {  # room within a room -> those beside it that it may import; what lies loose is for all
    "data": {
        "encode": (), "raw": ("encode",), "load": ("encode", "raw"),
        "lint": ("encode", "raw", "load"),
    },
    "training": {"options": (), "resilience": ("options",), "checkpoint": ("options", "resilience"),
                 "reporting": ("options", "resilience", "checkpoint"),
                 "replay": ("options", "resilience", "checkpoint", "reporting"),
                 "trace": ()},
}
OUTSIDE = ("toolkits", "examples")  # they call the command line
MAY_IMPORT_THE_PACKAGE = (
    "toolkits/benchmarks", "toolkits/gpu",  # they time what no command shows
)

# What converting, reading raw data and planning a run need nothing of.
HEAVY = ("megatron.core", "transformer_engine", "flash_attn", "apex")
LIGHT = (
    "parallel", "models", "models.spec", "models.family", "models.media", "models.registry",
    "models.qwen2_vl.config", "models.common.patch_media", "models.common.media_positions",
    "models.qwen2_vl.weight_map", "weights", "weights.convert", "weights.torch_dist",
    "data.raw.formats", "data.raw.sources", "data.options", "data.raw.prepare", "data.lint",
    "peft.adapter_map", "peft.conversion", "peft.files", "peft.targets", "peft.trainable",
    "training.adapter", "training.options.config", "training.paths", "training.plan",
    "training.memory", "training.activations", "training.layer_activations",
    "training.dry_run", "training.replay.source", "training.trace.show",
    "training.reporting.report", "training.reporting.history", "training.reporting.page",
    "cli.main", "cli.cluster_env", "cli.convert", "cli.prepare", "cli.lint", "cli.plot",
    "cli.report",
    "planner.search", "planner.answer", "planner.nothing_fits", "planner.auto", "cli.plan",
    "cli.finetune", "cli.replay", "cli.tiny", "cli.train", "cli.chat", "cli.evaluate",
    "ask.answerer", "ask.checkpoint", "ask.dialogue", "ask.evaluate", "ask.page", "ask.terminal",
)


def imports(path: Path, root: Path = ROOT) -> list[tuple[str, int]]:
    """(module of ours, line) of every import in a file, wherever in the file it stands."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from package import name`: the name may be a module.
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and _name(node.func) == "import_module" and node.args:
            found.append((_leading_text(node.args[0]), node.lineno))
    return [(name, line) for name, line in found if name.split(".")[0] == PACKAGE]


def _name(node: ast.expr) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", "")


def _leading_text(node: ast.expr) -> str:
    """The text of a string, or of an f-string up to its first blank."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return str(node.value) if isinstance(node, ast.Constant) else ""


def room_of(path: Path) -> str:
    """The room a file of the package is in; a module at the top is a room by itself."""
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def modules() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def allowed(room: str, module: str) -> bool:
    """Whether `room` may import `module`, a dotted path with or without a name at its end."""
    inner = module.split(".")[1:]
    return any(
        inner[: len(may.split("."))] == may.split(".")
        for may in (room, *ALWAYS, *ROOMS[room])
    )


def test_every_folder_is_a_room_of_the_table():
    found = {room_of(path) for path in modules()} - {"__init__"}
    assert found == set(ROOMS), "a new room needs a row here and in docs/architecture.md"


def test_a_room_imports_only_the_rooms_the_table_allows():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules() if room_of(path) != "__init__"
        for module, line in imports(path)
        if "." in module and not allowed(room_of(path), module)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("outer", WITHIN)
def test_a_room_within_a_room_imports_only_those_the_table_allows(outer):
    folder, rooms = ROOT / PACKAGE / outer, WITHIN[outer]
    assert {path.parent.name for path in folder.glob("*/__init__.py")} == set(rooms)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for room, may in rooms.items() for path in sorted((folder / room).rglob("*.py"))
        for module, line in imports(path)
        if module.split(".")[1:2] == [outer]
        and {*module.split(".")[2:3]} & ({*rooms} - {room, *may})
    ]
    assert not wrong, wrong


def test_the_package_itself_imports_no_room():
    assert imports(ROOT / PACKAGE / "__init__.py") == []


def test_a_family_imports_no_other_family():
    models = ROOT / PACKAGE / "models"
    families = {path.name for path in models.iterdir() if (path / "config.py").is_file()}
    assert families
    wrong = []
    for path in sorted(models.rglob("*.py")):
        own = path.relative_to(models).parts[0]
        for module, line in imports(path):
            if set(module.split(".")[2:3]) & (families - {own}):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, wrong


def test_toolkits_and_examples_call_the_command_line_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for folder in OUTSIDE
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(MAY_IMPORT_THE_PACKAGE)
        for module, line in imports(path)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(("text", "found"), [
    ("import megatron_vl.ops.norm", ["megatron_vl.ops.norm"]),
    ("from megatron_vl import training", ["megatron_vl.training"]),
    ("from megatron_vl.models import spec", ["megatron_vl.models.spec"]),
    ("from . import setup", ["megatron_vl.data.setup"]),
    ("from ..training.step import sum_loss", ["megatron_vl.training.step.sum_loss"]),
    ("def f():\n    from megatron_vl.cli import main", ["megatron_vl.cli.main"]),
    ("import_module('megatron_vl.training')", ["megatron_vl.training"]),
    ("importlib.import_module(f'megatron_vl.{room}')", ["megatron_vl."]),
    ("import torch, megatron.core", []),
])
def test_every_way_to_import_is_seen(tmp_path, text, found):
    path = tmp_path / PACKAGE / "data" / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert [module for module, _ in imports(path, tmp_path)] == found


@pytest.mark.parametrize(("room", "module", "may"), [
    ("data", "megatron_vl.models.spec.ModelSpec", True),
    ("data", "megatron_vl.models.family.Positions", True),
    ("data", "megatron_vl.models.common.pipeline_model", False),
    ("data", "megatron_vl.models.media.StoredMedia", True),
    ("data", "megatron_vl.models.common.media_positions", False),
    ("data", "megatron_vl.models.registry", False),
    ("weights", "megatron_vl.models.spec", False),
    ("models", "megatron_vl.training.options.config", False),
    ("parallel", "megatron_vl.errors.InputError", True),
    ("parallel", "megatron_vl.errorsome", False),
])
def test_the_table_is_read_as_it_is_written(room, module, may):
    assert allowed(room, module) is may


# ---- which device it is ------------------------------------------------------------------------

def cuda_named(text: str) -> set[str]:
    """How a source names CUDA."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            found.add(f"torch.cuda.{node.attr}")
        elif isinstance(node, ast.Call):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            found.add(".cuda()" if method == "cuda" else "")
            device = [one.value for one in node.keywords if one.arg == "device"]
            moved = node.args[:1] if method in ("to", "device") else []
            found |= {f"{one.value!r}" for one in (*device, *moved)
                      if str(getattr(one, "value", "")).startswith("cuda")}
    return found - {""}


def test_only_the_platform_names_the_device():
    found = {str(path.relative_to(ROOT)): cuda_named(path.read_text(encoding="utf-8"))
             for path in modules() if room_of(path) != "platform"}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(("text", "found"), [
    ("torch.cuda.current_device()", {"torch.cuda.current_device"}),
    ("with torch.cuda.stream(side): pass", {"torch.cuda.stream"}),
    ("x.cuda()", {".cuda()"}),
    ("x.to('cuda:0')", {"'cuda:0'"}),
    ("torch.zeros(1, device='cuda')", {"'cuda'"}),
    ("torch.device('cuda', 0)", {"'cuda'"}),
    ("torch.cuda.is_available()", {"torch.cuda.is_available"}),
    ("x.to(device)", set()),
])
def test_every_way_to_name_it_is_seen(text, found):
    assert cuda_named(text) == found


# ---- what an import does ----------------------------------------------------------------------


def python(script: str, *arguments: str) -> str:
    """Runs `script` in a new interpreter; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_HEAVY = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY):
            raise ImportError(name + " must not be imported here")

HEAVY, modules = sys.argv[1].split(), sys.argv[2].split()
sys.meta_path.insert(0, Blocked())
for module in modules:
    importlib.import_module("megatron_vl." + module)
import torch
assert not torch.cuda.is_initialized(), "a module touched CUDA"
print("imported", len(modules))
"""


def test_converting_and_preparing_need_no_megatron_core_and_no_gpu():
    out = python(WITHOUT_HEAVY, " ".join(HEAVY), " ".join(LIGHT))
    assert out == f"imported {len(LIGHT)}\n"


def test_what_families_give_is_told_without_torch():
    own = (f"qwen2_vl.{name}" for name in ("config", "media_files", "prompt"))
    modules = ("family", "media", "registry", *own)
    named = ", ".join(f"megatron_vl.models.{name}" for name in modules)
    assert python(f"import sys, {named}\nprint('torch' in sys.modules)") == "False\n"


IMPORT_ALL = """
import argparse, importlib, os, pkgutil, signal, sys
import torch
import megatron_vl

def ours(depth):
    return sys._getframe(depth).f_globals.get("__name__", "").startswith("megatron_vl")

done = []
class Watched(type(os.environ)):
    def __setitem__(self, name, value):
        if ours(2):
            done.append("sets the environment variable " + name)
        super().__setitem__(name, value)
    def __delitem__(self, name):
        if ours(2):
            done.append("removes the environment variable " + name)
        super().__delitem__(name)
os.environ.__class__ = Watched

parse_known_args = argparse.ArgumentParser.parse_known_args
def watched(self, *args, **kwargs):
    done.append("parses arguments")
    return parse_known_args(self, *args, **kwargs)
argparse.ArgumentParser.parse_known_args = watched

sys.argv = ["program", "--no-such-option"]
def state():
    of = {"torch": torch, "torch.cuda": torch.cuda, "torch.Tensor": torch.Tensor}
    names = {
        "torch": ("empty", "arange", "compile"),
        "torch.cuda": ("current_device", "synchronize", "Stream", "Event", "manual_seed"),
        "torch.Tensor": ("cuda", "to", "type"),
    }
    calls = {f"{one}.{name}": getattr(of[one], name) for one in of for name in names[one]}
    return calls | {
        "default dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(),
        "directory": os.getcwd(), "SIGINT": signal.getsignal(signal.SIGINT),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
    }

before = state()
count = 0
for module in pkgutil.walk_packages(megatron_vl.__path__, "megatron_vl."):
    if module.name == "megatron_vl.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        # A backend's file may need its library; it is imported when the backend is chosen.
        libraries = ("transformer_engine", "flash_attn", "triton", "torch_npu")
        if (error.name or "").split(".")[0] not in libraries:
            raise
    count += 1
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
assert not torch.cuda.is_initialized(), "an import probed the device"
assert not torch.distributed.is_initialized()
assert not done, done
print("imported", count)
"""


def test_importing_every_module_does_nothing():
    out = python(IMPORT_ALL)
    expected = [path for path in modules() if path.name != "__main__.py"]
    assert out == f"imported {len(expected) - 1}\n", "an import prints, or a module is not imported"
