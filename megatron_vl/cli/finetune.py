"""megatron-vl finetune: the flags of a published fine-tuning script, run here.

It prepares the data, trains, and writes the trained model as a Hugging Face directory: each is a
command of its own, which is printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from megatron_vl.cli.train import layout_flags, started_with
from megatron_vl.errors import CALLED
from megatron_vl.launch.torchrun import take_over
from megatron_vl.launch.worker import started_by_torchrun
from megatron_vl.training.options.hf_trainer import FLAGS, translate

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
    from megatron_vl.training.checkpoint.start import hf_directory
    from megatron_vl.training.options.hf_run import (
        data_directory,
        preparation,
        script_defaults,
        set_batch,
        set_intervals,
    )
    from megatron_vl.training.plan import plan_run
    from megatron_vl.weights.hub import local_model

    if started_by_torchrun():
        node_flags = take_over(os.environ)
        if node_flags is None:
            return 0
        args.options = [*node_flags, *args.options]
    model = local_model(args.model_name_or_path, weights=not args.dry_run)
    args.model_name_or_path = str(model)
    flags, output = {flag: getattr(args, flag) for flag in FLAGS}, Path(args.output_dir)
    given = Path(args.data_path)
    saves = ["--save", str(output / "checkpoint"), "--eval-interval", "0", "--truncate-samples"]

    def started(words: list[str]):
        return started_with([*words, *saves, *args.options], command="finetune")

    made = translate(flags)
    os.environ[CALLED] = ";".join(f"{option}={flag}" for option, flag in made.called.items())
    made = translate(flags, script_defaults(hf_directory(started(made.words)[2])))
    if args.dry_run and not _has_weights(model):
        made.words[made.words.index("--load")] = "--hf-config"
    made.told.append("texts longer than --model_max_length are cut: --truncate-samples")
    node, processes, config = started(made.words)
    data = data_directory(given, output)
    set_batch(made, config.parallel.layout(node.nnodes * processes).dp)
    made.words += ["--train-data-path", str(data)]
    chosen = layout_flags([*made.words, *saves, *args.options], command="finetune")
    args.options += chosen
    if chosen:
        made.told.append("--layout auto changes no rows of a step: each process counts as a "
                         "data-parallel rank")
    if data != given and not args.dry_run:
        words = preparation(given, data, args.data_format, nnodes=node.nnodes)
        plan_run(started(made.words)[2], node.nnodes * processes)  # before hours of preparing
        if words and (code := _run(words)):
            return code
    set_intervals(made, started(made.words)[2], prepared=data.exists())
    os.environ[CALLED] = ";".join(f"{option}={flag}" for option, flag in made.called.items())
    print("\n".join(made.told), flush=True)
    code = _run(["train", *made.words, *saves, *args.options,
                 *(["--dry-run"] if args.dry_run else []), *(["--debug"] if args.debug else [])])
    if code or args.dry_run or node.node_rank:
        return code
    to = ["--to", "hf"]
    if config.lora.given:
        to = ["--merge"]
        if code := _run(["convert", saves[1], str(output / "adapter"), "--to", "peft",
                         "--overwrite"]):
            return code
    return _run(["convert", saves[1], str(output / "hf"), *to, "--overwrite"])


def _run(words: list[str]) -> int:
    """Prints and runs a command of ours, whose errors are this one's."""
    from megatron_vl.cli.main import run_parsed

    print(f"megatron-vl {shlex.join(words)}", flush=True)
    return run_parsed(words)


def _has_weights(directory: Path) -> bool:
    from megatron_vl.weights.found import is_mcore_directory
    from megatron_vl.weights.hf_io import is_hf_directory

    return is_mcore_directory(directory) or is_hf_directory(directory)
