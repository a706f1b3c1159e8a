"""megatron-vl convert: a checkpoint of any kind and layout into one of another."""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.data.encode.model_files import check_model_files, missing_files
from megatron_vl.errors import Bounds, InputError, shown
from megatron_vl.models.registry import Family, family
from megatron_vl.models.spec import DTYPES, ModelSpec
from megatron_vl.training.options.spellings import dtype_of, flags_of
from megatron_vl.weights.map import listed

if TYPE_CHECKING:
    from megatron_vl.models.conversion import Described, LayoutOptions
    from megatron_vl.weights.convert import Source
    from megatron_vl.weights.map import WeightMap
    from megatron_vl.weights.mcore_io import CheckpointInfo
    from megatron_vl.weights.targets import Target

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
KINDS = {"hf": "Hugging Face directory", "mcore": "Megatron-Core checkpoint"}


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint: Hugging Face <-> Megatron-Core, any layout to any layout",
        description="Convert SRC, a Hugging Face directory or a Megatron-Core checkpoint (its kind "
        "and layout are detected), into a new directory DST. Needs no GPU and no Megatron-Core.",
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="a directory, or a model's name on a "
                        "hub, such as Qwen/Qwen2-VL-2B-Instruct")
    parser.add_argument("dst", type=Path, metavar="DST")
    parser.add_argument("--from", dest="source_kind", choices=tuple(KINDS),
                        help="refuse a SRC of another kind (default: any)")
    parser.add_argument("--to", choices=("hf", "mcore", "peft"), help="kind of DST (default: mcore "
                        "for a Hugging Face SRC or if a layout is given, hf otherwise); peft: the "
                        "adapter that a run trained, as PEFT stores it")
    parser.add_argument("--merge", action="store_true", help="write the model with the adapter of "
                        "SRC, or of --adapter, added to its weights, as --to hf")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="with --merge, an adapter of "
                        "PEFT's for the model SRC")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the model that the adapter of "
                        "SRC is beside (default: where its run found it)")
    parser.add_argument("--llamafy", action="store_true", help="with --to hf, write the model as a "
                        "Llama, for inference; of Baichuan2")
    parser.add_argument("--format", choices=("torch", "torch_dist"), help="of a Megatron-Core DST: "
                        "torch, a file a rank of one layout (default), or torch_dist, which loads "
                        "in every layout")
    parser.add_argument(*flags_of("tp"), type=int, help="tensor-parallel ranks (default 1)")
    parser.add_argument(*flags_of("pp"), type=int, help="pipeline stages (default 1)")
    parser.add_argument(*flags_of("vp"), type=int, help="model chunks a stage (default 1)")
    parser.add_argument(*flags_of("ep"), type=int, help="ranks that hold different experts "
                        "(default 1)")
    parser.add_argument(*flags_of("etp"), type=int, help="ranks that share an expert, a divisor of "
                        "--tp (default: as --tp)")
    parser.add_argument("--pp-layers", metavar="LIST", help="language layers of each stage, as in "
                        "1,10,10,7; with VP one list a chunk, [[0,1],[4,3]]")
    parser.add_argument("--vit-pp-layers", metavar="LIST", help="vision layers of each stage")
    parser.add_argument(*flags_of("first_stage_layers"), type=int, metavar="N",
                        help="language layers on stage 0, the rest evenly")
    parser.add_argument("--dtype", type=dtype_of, choices=DTYPES,
                        help="cast to this dtype, bf16 for short (default: SRC's)")
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help="directory of config.json "
                        "and tokenizer for a Megatron-Core SRC that has none beside it")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--verify", action="store_true", help="compare DST with SRC at the end")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in DST")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE",
                        help="largest file of safetensors or torch_dist, as in 5GB (default)")
    parser.add_argument("--model-size", default="auto", metavar="SIZE", help="a published "
                        "size, as 7B: refuse a config.json of another (default auto: take it as it "
                        "is)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Converts, prints a table of what was done, answers 0.

    Raises:
        InputError: anything that is wrong with the arguments or the source.
    """
    # Imported here: other commands read this file for their help.
    from megatron_vl.models.conversion import LayoutOptions, choose_target, describe
    from megatron_vl.weights import convert as work
    from megatron_vl.weights.row_norms import told_normalized

    started = time.perf_counter()
    check_workers(args.workers)
    found = describe(args.src, args.hf_config, weights=not args.dry_run)
    if args.source_kind not in (None, found.kind):
        raise InputError(
            f"{args.src} is a {KINDS[found.kind]} but --from {args.source_kind} asks for a "
            f"{KINDS[args.source_kind]}; give another SRC, or --from {found.kind}."
        )
    spec, config_dir = found.spec, found.config_dir
    family(spec.model_type).check_size(spec, args.model_size)
    weights = family(spec.model_type).weight_map(spec)
    layout = LayoutOptions(**{one.name: getattr(args, one.name) for one in fields(LayoutOptions)})
    holds = found.info is not None and found.info.adapter is not None
    if args.merge or args.to == "peft" or (holds and args.to == "hf"):
        source, target = _of_adapter(args, found, weights, layout)
    else:
        _check_no_adapter(args)
        target = choose_target(
            spec, found.kind, layout, to=args.to, file_format=args.format,
            max_shard_bytes=_bytes(args.max_shard_size),
        )
        if args.llamafy:
            target = _as_llama(args, family(spec.model_type), found)
        source = work.open_source(
            found.directory, weights, info=found.info,
            planned_dtype=spec.dtype if args.dry_run else None,
        )
    conversion = work.plan_conversion(source, weights, target, args.dtype)
    if says := told_normalized(source, weights):
        print(f"{args.src}: {says}")
    if args.dry_run:
        itemsizes = {one: dtype.itemsize for one, dtype in conversion.dtypes.items()}
        print("\n".join(conversion.plan.lines(conversion.files, itemsizes)))
        return 0
    with work.progress_bar(conversion.nbytes) as progress:
        written = work.run_conversion(
            conversion, args.dst, side_files=config_dir, overwrite=args.overwrite,
            workers=args.workers, progress=progress,
        )
    _report(args, conversion, written, time.perf_counter() - started)
    _warn_of_files(args, config_dir, spec)
    if args.verify:
        from megatron_vl.cli.verify import verify

        verify(args.src, args.dst, config_dir, cast=args.dtype is not None, workers=args.workers)
    return 0


def _warn_of_files(args: argparse.Namespace, config_dir: Path, spec: ModelSpec) -> None:
    of = family(spec.model_type)
    if missing := missing_files(config_dir, spec, of):
        print(f"warning: {config_dir} has no {' and no '.join(missing)}, without which the "
              f"converted checkpoint can neither be trained nor served; copy what is missing into "
              f"{args.dst} from the model's Hugging Face repository", file=sys.stderr)
        return
    try:
        check_model_files(config_dir, spec, of)
    except InputError as error:
        print(f"warning: {error}", file=sys.stderr)


def _check_no_adapter(args: argparse.Namespace) -> None:
    for flag in ("adapter", "base"):
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag} is for --merge; add it, or leave out --{flag}.")


def _of_adapter(
    args: argparse.Namespace, found: Described, weights: WeightMap, layout: LayoutOptions
) -> tuple[Source, Target]:
    """What --to peft and --merge read and write.

    Raises:
        InputError: options that do not go together, or no adapter.
    """
    from megatron_vl.peft.adapter_map import AdapterMap
    from megatron_vl.peft.conversion import PeftTarget, open_trained
    from megatron_vl.peft.merge import open_whole
    from megatron_vl.weights.targets import HFTarget

    what = "--to peft" if args.to == "peft" else "--merge"
    if option := layout.given or (args.format and "--format") or (args.llamafy and "--llamafy"):
        raise InputError(f"{option} does not go with {what}; leave it out.")
    if args.verify:
        raise InputError(f"--verify compares a model with itself; leave it out with {what}.")
    if args.to == "peft":
        if args.merge or args.adapter is not None:
            raise InputError("--to peft writes the adapter of a run by itself; leave out --merge "
                             "and --adapter.")
        stored = open_trained(_trained(args, found), weights)
        of = AdapterMap(weights=weights, adapter=stored.adapter)
        base = Path(found.info.adapter["base"]) if args.base is None else args.base
        if whole := found.info.adapter["trained"]:
            raise InputError(
                f"{args.src} was trained with {', '.join(f'--train-{part}' for part in whole)}, "
                f"which an adapter has no place for; write the model with --merge."
            )
        return stored.source, PeftTarget(of=of, base=base)
    if args.to == "mcore":
        raise InputError("--merge writes a Hugging Face directory; leave out --to mcore, and "
                         "convert it again.")
    target = HFTarget(max_shard_bytes=_bytes(args.max_shard_size))
    if args.adapter is None:
        info = _trained(args, found)
        if info.adapter is None:
            open_trained(info, weights)  # which says that there is none
        print(f"the adapter of {args.src} is merged into {args.base or info.adapter['base']}")
    elif args.base is not None:
        raise InputError("--adapter is merged into SRC; leave out --base, or give it as SRC.")
    return open_whole(found.directory, found.info, weights, base=args.base,
                      adapter=args.adapter), target


def _trained(args: argparse.Namespace, found: Described) -> CheckpointInfo:
    if found.info is None:
        raise InputError(
            f"{args.src} is a {KINDS['hf']}, which holds no adapter; give the --save of a run that "
            f"trained one, or with --merge an --adapter."
        )
    return found.info


def _as_llama(args: argparse.Namespace, of: Family, found: Described) -> Target:
    if args.to != "hf" or args.verify:
        raise InputError("--llamafy writes another model for inference; give --to hf, and leave "
                         "out --verify, which compares the same one.")
    size = _bytes(args.max_shard_size)
    return of.llama_target(found.config_dir, found.spec, max_shard_bytes=size)


def check_workers(workers: int) -> None:
    Bounds(least=1, most=1024).check("--workers", workers)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise InputError(f"--max-shard-size {shown(repr(text))} is no size; write 5GB or 500MB.")
    return size


def _report(args: argparse.Namespace, conversion, written, seconds: float) -> None:
    from megatron_vl.workers import peak_memory

    peak = peak_memory(args.workers)
    rate = written.nbytes / seconds / 10**9
    print(f"{args.dst}\n{'files':>7} {'tensors':>8} {'bytes':>16} {'seconds':>8} {'GB/s':>6} "
          f"{'peak memory':>12}")
    print(f"{len(conversion.files):>7} {written.tensors:>8} {written.nbytes:>16,} {seconds:>8.1f} "
          f"{rate:>6.2f} {peak / 2**20:>8.0f} MiB")
    if bad := written.not_finite:
        print(f"warning: {sum(bad.values()):,} NaN or Inf in {len(bad)} tensor(s): {listed(bad)}")
