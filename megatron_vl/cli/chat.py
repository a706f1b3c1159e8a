"""`megatron-vl chat MODEL`: ask a trained model, with images and videos."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.errors import Bounds, InputError
from megatron_vl.models.media import IMAGE, VIDEO, MediaLimits
from megatron_vl.models.spec import DTYPES
from megatron_vl.training.options.config_sources import add_some_arguments
from megatron_vl.training.options.groups import DataOptions
from megatron_vl.training.options.spellings import dtype_of

if TYPE_CHECKING:
    from megatron_vl.ask.answerer import Answerer

LIMITS = tuple(f.name for f in fields(MediaLimits))
_PORT = Bounds(least=0, most=2**16 - 1)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="ask a trained model",
        description="Ask a model: one question, or a conversation in the terminal. Answers appear "
        "while they are made. Without QUESTION, every line that is typed is one. Runs on a GPU "
        "where there is one, and needs no Megatron-Core.",
        usage="%(prog)s MODEL [--image FILE] [--video FILE] [options] [QUESTION]",
    )
    parser.last_word = "question"
    add_model_arguments(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                        help="show it with the first question; again for several")
    parser.add_argument("--video", type=Path, action="append", default=[], metavar="FILE",
                        help="the same of a video")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the template's)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N",
                        help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="how freely tokens are drawn; 0: always the likeliest (default: 0)")
    parser.add_argument("--top-p", type=float, metavar="P",
                        help="draw from the likeliest tokens of this probability together")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--web", action="store_true", help="a page on this machine instead of the "
                        "terminal; needs gradio, pip install megatron-vl[web]")
    parser.add_argument("--port", type=int, default=7860, help="of that page (default: 7860)")
    parser.set_defaults(run=run)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and how it is loaded and asked."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face directory, a "
                        "checkpoint of any layout, or the output directory of a run")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter of PEFT's for "
                        "MODEL, which is asked with it merged")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the model that a checkpoint's "
                        "adapter is beside (default: where its run found it)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="where a checkpoint, or a model "
                        "with --adapter, is exported to be asked (default: in the directory of the "
                        "checkpoint or the adapter)")
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help="directory of config.json "
                        "and tokenizer for a checkpoint that has none beside it")
    parser.add_argument("--dtype", type=dtype_of, choices=DTYPES, help="of the weights (default: "
                        "the published one on a GPU, float32 on a CPU)")
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="of models that "
                        "may reason first: whether they do (default: as their chat template says)")
    add_some_arguments(parser, DataOptions, LIMITS)


def asked_directory(args: argparse.Namespace) -> Path:
    """The Hugging Face directory of MODEL; tells of a checkpoint where it was exported to.

    Raises:
        InputError: there is none, and none can be made.
    """
    from megatron_vl.ask.checkpoint import hf_directory

    return hf_directory(
        args.model, adapter=args.adapter, base=args.base, export=args.export,
        hf_config=args.hf_config,
        say=lambda text: print(f"megatron-vl {args.command}: {text}", file=sys.stderr, flush=True),
    )


def load_answerer(hf_dir: Path, args: argparse.Namespace) -> Answerer:
    """The model in `hf_dir`, as `add_model_arguments` says.

    Raises:
        InputError: it cannot be asked.
    """
    from megatron_vl.ask.answerer import Answerer
    from megatron_vl.models.registry import load_spec

    given = {name: getattr(args, name) for name in LIMITS if hasattr(args, name)}
    spec = load_spec(hf_dir)
    if spec.vision is None:
        for name, value in given.items():
            raise spec.takes_text_alone(name, value)
    return Answerer.from_hf_dir(hf_dir, dtype=args.dtype, limits=MediaLimits(**given))


def run(args: argparse.Namespace) -> None:
    """Answers until there is nothing more to ask.

    Raises:
        InputError: a model, a file or an option that cannot be used.
    """
    from megatron_vl.ask.answerer import Sampling
    from megatron_vl.ask.dialogue import Dialogue
    from megatron_vl.ask.terminal import say_answer, talk
    from megatron_vl.ask.web import load_gradio, serve

    _PORT.check("--port", args.port)
    if args.web and (args.question or args.image or args.video):
        raise InputError("--web is asked in its page; leave out the question, --image and --video.")
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p
    )
    if args.web:
        load_gradio()  # before the model, which takes longer
    answerer = load_answerer(asked_directory(args), args)
    answerer.seed(args.seed)

    def dialogue() -> Dialogue:
        return Dialogue(answerer, sampling=sampling, system=args.system, thinking=args.thinking)

    if args.web:
        serve(dialogue, title=str(args.model), port=args.port)
        return
    one = dialogue()
    for kind, paths in ((IMAGE, args.image), (VIDEO, args.video)):
        for path in paths:
            one.show(kind, path)
    if args.question is not None:
        say_answer(one, args.question)
    else:
        talk(one)
