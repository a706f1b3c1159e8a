"""megatron-vl finetune: the flags of a published fine-tuning script, run here.

It prepares the data, trains, and writes the trained model as a Hugging Face directory: each is a
command of its own, which is printed.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
from pathlib import Path

from megatron_vl.errors import CALLED, InputError
from megatron_vl.launch.cluster import ClusterEnv
from megatron_vl.launch.torchrun import take_over
from megatron_vl.launch.worker import started_by_torchrun
from megatron_vl.training.options.hf_trainer import FLAGS, Translation, translate

REQUIRED = ("model_name_or_path", "data_path", "output_dir")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "finetune", help="train by the flags of a published fine-tuning script",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__}\nOptions of megatron-vl train, such as --tp 2, follow behind --.",
    )
    for flag in FLAGS:
        parser.add_argument(
            f"--{flag}", *([f"--{flag.replace('_', '-')}"] if "_" in flag else []), nargs="?",
            const="True", metavar="VALUE", required=flag in REQUIRED, help="as the Trainer's",
        )
    parser.add_argument("--data-format", default="sharegpt", metavar="NAME",
                        help="of data_path, as megatron-vl prepare takes it (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true",
                        help="print what each flag becomes and what every rank holds, and stop")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="of megatron-vl train")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepares, trains and converts; answers the run's code.

    Raises:
        InputError: flags or data that cannot be used.
    """
    from megatron_vl.cli.main import run as megatron_vl

    if started_by_torchrun():
        node_flags = take_over(os.environ)
        if node_flags is None:
            return 0
        args.options = [*node_flags, *args.options]
    flags = {flag: getattr(args, flag) for flag in FLAGS}
    made, output = translate(flags), Path(args.output_dir)
    os.environ[CALLED] = ";".join(f"{option}={flag}" for option, flag in made.called.items())
    if args.dry_run and not _has_weights(Path(args.model_name_or_path)):
        made.words[made.words.index("--load")] = "--hf-config"
    words = [*made.words, "--truncate-samples", "--save", str(output / "checkpoint"),
             "--eval-interval", "0"]
    made.told.append("texts longer than --model_max_length are cut: --truncate-samples")
    node, replicas = _replicas([*words, *args.options])
    data = _data_directory(Path(args.data_path), output)
    if data != Path(args.data_path) and not (args.dry_run or data.exists()):
        if node.nnodes > 1:
            raise InputError(
                f"--data_path {args.data_path} is raw data, which one node alone can prepare; give "
                f"the directory that megatron-vl prepare {args.data_path} DIR --format "
                f"{args.data_format} --split 1,0,0 makes."
            )
        code = _say(megatron_vl, ["prepare", args.data_path, str(data), "--format",
                                  args.data_format, "--split", "1,0,0"])
        if code:
            return code
    batch = _whole(flags, "per_device_train_batch_size", "8")
    batch *= replicas * _whole(flags, "gradient_accumulation_steps", "1")
    words += ["--train-data-path", str(data), "--global-batch-size", str(batch)]
    made.told.append(f"rows of a step, over all processes -> --global-batch-size {batch}")
    words += _saving(flags, made, data, batch)
    print("\n".join(made.told), flush=True)
    words += [*args.options, *(["--dry-run"] if args.dry_run else [])]
    code = _say(megatron_vl, ["train", *words])
    if code or args.dry_run or node.node_rank:
        return code
    return _say(megatron_vl, ["convert", str(output / "checkpoint"), str(output / "hf"),
                              "--to", "hf", "--overwrite"])


def _say(command, words: list[str]) -> int:
    print(f"megatron-vl {shlex.join(words)}", flush=True)
    return command(words)


def _has_weights(directory: Path) -> bool:
    from megatron_vl.weights.found import is_mcore_directory
    from megatron_vl.weights.hf_io import is_hf_directory

    return is_mcore_directory(directory) or is_hf_directory(directory)


def _replicas(words: list[str]) -> tuple[ClusterEnv, int]:
    """This node among its nodes, and the data-parallel ranks of a run with these options."""
    from megatron_vl.cli import train
    from megatron_vl.cli.main import Parser

    parser = Parser(prog="megatron-vl")
    train.add_parser(parser.add_subparsers())
    node, processes, config = train.started_on(parser.parse_args(["train", *words]))
    return node, config.parallel.layout(node.nnodes * processes).dp


def _data_directory(given: Path, output: Path) -> Path:
    """A prepared dataset as it is; of a file, where it is prepared: another file, another place."""
    from megatron_vl.weights.files import fingerprint

    if given.is_file():
        return output / f"data-{fingerprint(given).split()[-1]}"
    if not (given / ".nv-meta").is_dir():
        raise InputError(
            f"--data_path {given} is neither a JSON file nor a dataset that megatron-vl prepare "
            f"made; give one of them."
        )
    return given


def _whole(flags: dict[str, str | None], flag: str, default: str) -> int:
    value = flags[flag] or default
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"--{flag} is {value!r}; it must be a whole number above 0.")
    return int(value)


def _saving(flags: dict[str, str | None], made: Translation, data: Path, batch: int) -> list[str]:
    """When checkpoints are written; the last step always is."""
    strategy = flags["save_strategy"] or "steps"
    if strategy not in ("no", "steps", "epoch"):
        raise InputError(f"--save_strategy is {strategy!r}; use no, steps or epoch.")
    if strategy == "epoch" and not data.exists():
        made.told.append("--save_strategy epoch -> --save-interval, once the data are prepared")
        return []
    steps = {"no": lambda: 10**9, "steps": lambda: _whole(flags, "save_steps", "500"),
             "epoch": lambda: math.ceil(_samples(data) / batch)}[strategy]()
    made.told.append(f"--save_strategy {strategy} -> --save-interval {steps}")
    return ["--save-interval", str(steps)]


def _samples(data: Path) -> int:
    from megatron_vl.data.load.mixture import Mixture

    return sum(Mixture.parse(str(data)).check("train").values())
