"""`megatron-vl COMMAND ...`: picks the command, turns its errors into one sentence and a code.

Exit codes: 0 done, 1 a check failed or something broke, 2 unusable arguments or input.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import select
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import megatron_vl
from megatron_vl.errors import (
    CheckFailed,
    InputError,
    as_called,
    call_as_typed,
    printable,
    shortened,
)
from megatron_vl.launch import ascend, interrupts
from megatron_vl.launch.store_thread import leave
from megatron_vl.launch.worker import FAILURE_FILE
from megatron_vl.training.options.spellings import answer, flags_of, key_of

COMMANDS = {
    "convert": "Hugging Face <-> Megatron-Core checkpoints, any TP x PP layout",
    "verify": "whether two checkpoints hold the same tensors, whatever their layouts",
    "prepare": "raw data -> WebDataset shards ready for energon",
    "lint": "what is in prepared data: unusable samples, histograms, how rows fill",
    "plan": "which layout of so many cards, does it fit, how fast",
    "train": "pretrain or finetune",
    "finetune": "train by the flags of a published fine-tuning script",
    "launch": "one command on every host of a hostfile, over ssh",
    "cluster-env": "which node of how many this is, as the scheduler's variables say",
    "replay": "one step of a run again, and what was in it",
    "chat": "ask a trained model, in the terminal or on a page",
    "evaluate": "a trained model's answers to a dataset's questions, scored",
    "parity": "logits, loss and gradients against transformers, in any layout",
    "tiny": "a small random model as a complete Hugging Face directory",
    "plot": "runs' loss, gradient norm and throughput as PNG, over each other",
    "report": "a run as one page: plots, layout, data, checkpoints, configuration",
}


class Parser(argparse.ArgumentParser):
    """Refuses arguments by one sentence instead of every flag, and takes no abbreviations."""

    last_word: str | None = None  # the name of a word that may stand last, behind the options

    def __init__(self, **settings) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def _dashed(self, word: str) -> str:
        """`--save_interval` as `--save-interval`, if that is a flag."""
        if not word.startswith("--"):
            return word
        flag, equals, value = word.partition("=")
        dashed = flag.replace("_", "-")
        known = self._option_string_actions
        return dashed + equals + value if flag not in known and dashed in known else word

    def parse_known_args(self, args=None, namespace=None):
        # Here, not in parse_args: a command's unknown flags would be reported as the program's.
        if args is None:
            args = sys.argv[1:]
        end = args.index("--") if "--" in args else len(args)  # behind it words are another's
        args = [*map(self._dashed, args[:end]), *args[end:]]
        known, unknown = super().parse_known_args(args, namespace)
        # An optional positional argument would be taken for left out before the first option.
        if self.last_word is not None:
            late = bool(unknown) and not any(word.startswith("-") for word in unknown)
            if late and len(unknown) > 1:
                self.error(f"{self.last_word.upper()} is {len(unknown)} words, {unknown[0]} and so "
                           f"on; put it in quotes")
            setattr(known, self.last_word, unknown.pop() if late else None)
        if unknown:
            self._refuse(unknown)
        return known, unknown

    def _refuse(self, unknown: list[str]) -> NoReturn:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        flag = word.partition("=")[0]
        near = difflib.get_close_matches(flag.lower(), self._option_string_actions, n=1)
        hint = f" (did you mean {near[0]}?)" if near and flag.startswith("-") else ""
        if self.prog.endswith((" train", " finetune")) and (says := answer(flag)):
            hint = f": {says}"
        self.error(f"unrecognized argument {word}{hint}")

    def error(self, message: str) -> NoReturn:
        message = shortened(printable(as_called(message)))
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit the process with its code."""
    argv = sys.argv[1:] if argv is None else argv
    if FAILURE_FILE in os.environ:  # a rank: the launcher says for all that Ctrl-C ended them
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    else:
        interrupts.leave_at_once(_chosen(argv))
    # Where a host is gone, the frames of torch's C++ would bury the sentence that names it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        code = 128 + signal.SIGPIPE
    except Exception:  # as Python does, but for how it ends
        traceback.print_exc()
        code = 1
    leave(code)


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed any more, as after `| head`; then it goes nowhere."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    chosen = _chosen(argv)
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    # Every long name of an option that was typed, for the short ones are words too; of several the
    # last counts.
    named = {name[2:]: flag for flag in flags for name in flags_of(key_of(flag)) if "-" in name[2:]}
    call_as_typed({name: flag for name, flag in named.items() if flag != f"--{name}"})
    try:
        return run_parsed(argv)
    except CheckFailed as error:
        code, said = 1, error
    except InputError as error:
        code, said = _unusable(argv), error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = shortened(printable(str(error.filename)))
        code, said = _unusable(argv), f"{name} is longer than a path can be; give a shorter one."
    except (ImportError, RuntimeError) as error:
        said = ascend.why_not_imported(error, os.environ) or _missing_package(error)
        if said is None:
            raise
        code = _unusable(argv)
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    print(f"megatron-vl {chosen}: {said}", file=sys.stderr)
    return code


def _chosen(argv: list[str]) -> str:
    return next((word for word in argv if not word.startswith("-")), "")


def _missing_package(error: Exception) -> str | None:
    """The sentence of a package that is not installed, which is none of this project's modules."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    name = error.name or "megatron_vl"
    if name.partition(".")[0] == "megatron_vl":
        return None
    return (
        f"the Python that runs this, {sys.executable}, has no package {name}; use the "
        f"Python that this project is installed in (the scripts take it from PYTHON), or "
        f"install it there: {sys.executable} -m pip install -e {Path(__file__).parents[2]}."
    )


def _unusable(argv: list[str]) -> int:
    if "--debug" in argv:
        traceback.print_exc()
    return 2


def run_parsed(argv: list[str]) -> int:
    """Run one command; returns its exit code. What it raises `run` makes a sentence of."""
    chosen = _chosen(argv)
    parser = Parser(
        prog="megatron-vl",
        description="Train Qwen-family models on Megatron-Core, on any machine.",
    )
    parser.add_argument("--version", action="version", version=megatron_vl.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only the command that runs is imported: converting needs neither Megatron-Core nor energon.
    for name, summary in COMMANDS.items():
        if name == chosen:
            command = import_module(f"megatron_vl.cli.{name.replace('-', '_')}")
            command.add_parser(commands)
            commands.choices[name].add_argument(
                "--debug", action="store_true", help="show the traceback of an error"
            )
        else:
            commands.add_parser(name, help=summary)
    args = parser.parse_args(argv)
    args.argv = argv  # what ranks are started with
    if chosen != "train":  # which imports more, and heeds interrupts when it starts its ranks
        interrupts.heed()
    return args.run(args) or 0
