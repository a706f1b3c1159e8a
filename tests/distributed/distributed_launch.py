"""The launcher and the convertor as tests call them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from commands import Done, shell
from shared import Shared

LAUNCHER = "examples/qwen2_vl/run_mcore_qwen.sh"
CONVERTOR = "toolkits/model_checkpoints_convertor/qwen/hf2mcore_qwen2_vl_convertor.sh"

# The launcher's 23 arguments by name; a test changes what it is about.
ARGUMENTS = {
    "ENV": "dsw", "MODEL_SIZE": "auto", "BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 4, "LR": "1e-3",
    "MIN_LR": "1e-4", "SEQ_LEN": 256, "PAD_LEN": 256, "PR": "fp32", "TP": 1, "PP": 1, "CP": 1,
    "DO": "true", "FL": "false", "AC": "false", "OPTIMIZER_OFFLOAD": "false", "SAVE_INTERVAL": 5,
    "DATASET_PATH": None, "VALID_DATASET_PATH": None, "PRETRAIN_CHECKPOINT_PATH": "none",
    "TRAIN_ITERS": 10, "LR_WARMUP_ITERS": 2, "OUTPUT_BASEPATH": None,
}


def words(**changes: object) -> list[object]:
    """The launcher's arguments in their order; SP, when given, goes behind CP."""
    arguments = {**ARGUMENTS, **changes}
    sp = arguments.pop("SP", None)
    ordered = [arguments[name] for name in ARGUMENTS]
    return ordered if sp is None else [*ordered[:12], sp, *ordered[12:]]


class Workshop:
    """Converts and trains one tiny model on one tiny dataset."""

    def __init__(self, shared: Shared, model_dir: Path, wds_dir: Path):
        self.shared, self.root = shared, shared.root
        self.model_dir, self.wds_dir = model_dir, wds_dir

    def weights(self, tp: int, pp: int, first: int | None = None) -> Path:
        """The model converted for a layout."""
        environment = {} if first is None else {"MP_PP0_LAYERS": first}

        def convert(out: Path) -> None:
            done = shell(CONVERTOR, "auto", self.model_dir, out, tp, pp, "false", "fp32",
                         **environment)
            assert done.code == 0, done.text

        return self.shared.made(f"tp{tp}pp{pp}first{first}", convert)

    def train(self, name: str, *, first: int | None = None, extra: str = "",
              by: Callable[..., Done] = shell, **changes) -> Done:
        """Run the launcher into the folder `name`."""
        tp, pp = changes.get("TP", 1), changes.get("PP", 1)
        environment = {
            "MP_PACKING_BUFFER": 32, "MP_EXTRA": f"--eval-iters 1 --no-report {extra}".strip(),
        }  # fmt: skip
        if first is not None:
            environment["MP_PP0_LAYERS"] = first
        defaults = {
            "DATASET_PATH": self.wds_dir, "VALID_DATASET_PATH": self.wds_dir,
            "OUTPUT_BASEPATH": self.root / name,
        }
        if "PRETRAIN_CHECKPOINT_PATH" not in changes:
            defaults["PRETRAIN_CHECKPOINT_PATH"] = self.weights(tp, pp, first)
        return by(LAUNCHER, *words(**{**defaults, **changes}), **environment)

    def steps(self, name: str) -> dict[int, dict]:
        """Training steps of a run by iteration; of a repeated one the last."""
        (file,) = (self.root / name / "log").glob("*/metrics.jsonl")
        records = [json.loads(line) for line in file.read_text().splitlines()]
        return {r["iteration"]: r for r in records if r["kind"] == "train"}

    def checkpoint(self, name: str) -> Path:
        (directory,) = (self.root / name / "checkpoint").iterdir()
        return directory
