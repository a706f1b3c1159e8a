"""`megatron-vl parity HF_DIR`: logits, loss and gradients against transformers, in any layout."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from megatron_vl.cli.worker import started_by_torchrun
from megatron_vl.errors import CheckFailed, InputError
from megatron_vl.parallel import Layout, StageSplit
from megatron_vl.parallel.stages import layer_list
from megatron_vl.training.spellings import dtype_of, flags_of

DTYPES = ("float32", "bfloat16")
FP32 = 1e-5  # sums run in another order, and nothing else


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "parity",
        help="compare with transformers",
        description="Run the model of HF_DIR on random samples through transformers in fp32 and "
        "through Megatron-Core spread over the given layout, and compare the logits of every "
        "token, the loss, and the gradient of every parameter.",
    )
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    for name, what in (
        ("tp", "tensor-parallel ranks"), ("pp", "pipeline stages"),
        ("vp", "model chunks per stage"), ("cp", "ranks that share a row"),
    ):
        parser.add_argument(*flags_of(name), type=int, default=1, help=f"{what} (default: 1)")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel ranks (default: 1)")
    parser.add_argument("--sequence-parallel", action="store_true", help="split norms over TP")
    parser.add_argument(
        "--vit-data-parallel", action="store_true", help="divide the images over TP ranks"
    )
    parser.add_argument(
        "--overlap-grad-reduce", action="store_true", help="reduce gradients during backward"
    )
    parser.add_argument(
        "--sweep", type=int, metavar="N", help="every layout of N ranks that fits, a row each"
    )
    parser.add_argument(
        *flags_of("first_stage_layers"), type=int, help="language layers on stage 0"
    )
    parser.add_argument("--pp-layers", metavar="LIST", help="language layers of each stage")
    parser.add_argument("--vit-pp-layers", metavar="LIST", help="vision layers of each stage")
    parser.add_argument(
        "--recompute", "--recompute-granularity", choices=("none", "selective", "full"),
        default="none",
        help="compute activations of both towers again in backward (default: none)",
    )
    parser.add_argument(
        "--recompute-method", choices=("uniform", "block"), default="uniform",
        help="with full: all layers in groups, or the first of a stage (default: uniform)",
    )
    parser.add_argument(
        "--recompute-num-layers", type=int, default=1,
        help="with full: layers of a uniform group, or of a stage (default: 1)",
    )
    parser.add_argument(
        "--dtype", type=dtype_of, choices=DTYPES, default="float32",
        help="of our weights and activations, bf16 for short; transformers judges in float32 "
        "(default: float32)",
    )
    parser.add_argument(
        "--pack", action=argparse.BooleanOptionalAction, default=True,
        help="several samples a row, or one (default: several)",
    )
    parser.add_argument(
        "--tolerance", type=float,
        help=f"largest relative difference that passes (default: {FP32:g}; in bfloat16 twice what "
        "transformers' own bfloat16 is off)",
    )
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_vl.models.registry import load_spec
    from megatron_vl.training import parity
    from megatron_vl.weights.found import no_checkpoint
    from megatron_vl.weights.hf_io import is_hf_directory

    if not is_hf_directory(args.hf_dir):
        raise no_checkpoint(args.hf_dir, "hf")
    spec = load_spec(args.hf_dir)
    setting = parity.Setting(
        dtype=args.dtype, packed=args.pack, recompute=args.recompute,
        recompute_method=args.recompute_method, recompute_num_layers=args.recompute_num_layers,
        overlap_grad_reduce=args.overlap_grad_reduce,
    )
    layouts = _layouts(args, spec)
    for _, split in layouts:
        setting.recompute_of(split)
    if args.tolerance is not None and not args.tolerance > 0:
        raise InputError(f"--tolerance is {args.tolerance}; give a number above 0, as 1e-5.")
    if started_by_torchrun():
        from megatron_vl.cli.worker import run_worker

        run_worker(
            lambda: parity.run_ranks(args.work_dir, args.hf_dir, layouts, setting),
            command="parity", debug=args.debug,
        )
    with tempfile.TemporaryDirectory(prefix="megatron-vl-parity-") as scratch:
        return _compare(args, spec, layouts, setting, Path(scratch))


def _layouts(args: argparse.Namespace, spec) -> list[tuple[Layout, StageSplit]]:
    """The layouts to compare, all of the same number of ranks."""
    from megatron_vl.training import parity_layouts

    layout = Layout(
        tp=args.tp, pp=args.pp, vp=args.vp, cp=args.cp, dp=args.dp,
        sequence_parallel=args.sequence_parallel,
        vit_data_parallel=args.vit_data_parallel,
    )
    if args.sweep is not None:
        given = (args.first_stage_layers, args.pp_layers, args.vit_pp_layers)
        if (layout != Layout() or args.sequence_parallel or args.vit_data_parallel
                or any(one is not None for one in given)):
            raise InputError(
                "--sweep goes through every layout; leave out --tp, --pp, --vp, --cp, --dp, "
                "--sequence-parallel, --vit-data-parallel, --first-stage-layers, --pp-layers and "
                "--vit-pp-layers, or --sweep."
            )
        layouts = list(parity_layouts.sweep(spec, args.sweep))
        if not layouts:
            raise InputError(f"no layout of --sweep {args.sweep} ranks fits this model.")
        return layouts
    split = spec.split(
        pp=layout.pp, vp=layout.vp, first_stage_layers=args.first_stage_layers,
        llm=layer_list(args.pp_layers, "--pp-layers"),
        vit=layer_list(args.vit_pp_layers, "--vit-pp-layers"),
    )
    spec.check_layout(layout, split)
    parity_layouts.check_microbatches(layout)
    return [(layout, split)]


def _compare(args, spec, layouts, setting, work_dir: Path) -> int:
    from megatron_vl.cli.launch import launch
    from megatron_vl.training import parity, parity_compare

    ranks = layouts[0][0].world_size
    print(f"converting {args.hf_dir} for {len(layouts)} layout(s) of {ranks} rank(s)", flush=True)
    for number, (layout, split) in enumerate(layouts):
        options = ["--dtype", setting.dtype]
        options += ["--tp", layout.tp, "--pp", layout.pp, "--vp", layout.vp]
        for option, rows in (("--pp-layers", split.llm), ("--vit-pp-layers", split.vit)):
            options += [option, json.dumps(rows)]
        _convert(args.hf_dir, work_dir / str(number) / "weights", *options)
    print("running Megatron-Core", flush=True)
    code = launch([*args.argv, "--work-dir", str(work_dir)], nproc_per_node=ranks)
    if code:
        return code
    print("running transformers", flush=True)
    differences, own = [[] for _ in layouts], []
    for index, case in enumerate(parity.cases(setting.packed)):
        theirs = parity.run_transformers(args.hf_dir, spec, case)
        if setting.dtype != "float32":
            theirs_rounded = parity.run_transformers(args.hf_dir, spec, case, setting.dtype)
            own.append(parity_compare.compare(case.name, theirs_rounded, theirs))
        samples = parity.make_samples(spec, case)
        for number, (layout, _) in enumerate(layouts):
            folder = work_dir / str(number)
            gradients = folder / f"{index}.hf"
            _convert(
                folder / f"{index}.gradients", gradients, "--to", "hf", "--hf-config", args.hf_dir
            )
            ours = parity.read_ours(
                folder, index, case, spec, samples, layout, _read_tensors(gradients)
            )
            differences[number].append(parity_compare.compare(case.name, ours, theirs))
    report = _report if args.sweep is None else _report_sweep
    return report(layouts, setting, differences, own, _bounds(args.tolerance, own))


def _bounds(tolerance: float | None, own: list) -> dict[str, float]:
    """What passes, by what is compared.

    In 16 bits rounding is as large as the model and the samples make it; transformers rounds as
    often, elsewhere. A mean loss is off by less than the logits it comes from.
    """
    if tolerance is None and own:
        logits = 2 * max(one.logits.relative for one in own)
        gradients = 2 * max(one.gradient.relative for one in own)
        return {"logits": logits, "loss": logits, "gradient": gradients}
    return dict.fromkeys(("logits", "loss", "gradient"), tolerance or FP32)


def _too_far(one, bounds: dict[str, float]) -> bool:
    return any(getattr(one, name).relative > bound for name, bound in bounds.items())


def _convert(*words) -> None:
    """`megatron-vl convert`, without its table."""
    from megatron_vl.cli import convert

    commands = argparse.ArgumentParser().add_subparsers()
    convert.add_parser(commands)
    args = commands.choices["convert"].parse_args([str(word) for word in words])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        args.run(args)


def _read_tensors(hf_dir: Path) -> dict:
    from safetensors.torch import load_file

    files = sorted(hf_dir.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _report(layouts, setting, differences, own, bounds: dict[str, float]) -> int:
    """A row a case of the only layout, and the parameters that are furthest off in any of them."""
    from megatron_vl.training.parity_compare import worst_parameters

    ((layout, split),), (cases,) = layouts, differences
    print(f"\n{layout}, {split}\n{setting}; against transformers in fp32\n"
          f"{'':<28} {'logits':^17} {'loss':^17} {'gradients':^17}\n"
          f"{'largest difference of':<28}" + " absolute relative" * 3)
    for number, one in enumerate(cases):
        print(f"{one.case:<28} {_absolute_and_relative(one)}")
        if own:
            print(f"{'  transformers itself':<28} {_absolute_and_relative(own[number])}")
    worst = worst_parameters(cases)
    title = f"furthest of {len(cases[0].gradients)} parameters"
    width = max(len(name) for name in (title, *(name for name, *_ in worst)))
    print(f"\n{title:<{width}} absolute relative  case")
    for name, apart, case in worst:
        print(f"{name:<{width}} {apart.absolute:>8.1e} {apart.relative:>8.1e}  {case}")
    return _verdict([one.case for one in cases if _too_far(one, bounds)], bounds)


def _report_sweep(layouts, setting, differences, own, bounds: dict[str, float]) -> int:
    """A row a layout, with the case that is furthest off."""
    width = max(len(f"{layout}, {split}") for layout, split in layouts)
    print(f"\n{setting}; {len(differences[0])} cases each, the furthest off; relative to "
          f"transformers in fp32\n"
          f"{'layout':<{width}} {'logits':>9} {'loss':>9} {'gradients':>10}  case, parameter")
    rows = [(f"{layout}, {split}", cases)
            for (layout, split), cases in zip(layouts, differences, strict=True)]
    for name, cases in [*rows, *([("transformers itself", own)] if own else [])]:
        one = max(cases, key=lambda case: case.largest)
        print(f"{name:<{width}} {one.logits.relative:>9.1e} {one.loss.relative:>9.1e} "
              f"{one.gradient.relative:>10.1e}  {one.case}, {one.worst} (of {len(one.gradients)})")
    return _verdict(
        [f"{layout} ({split})" for (layout, split), cases in zip(layouts, differences, strict=True)
         if any(_too_far(one, bounds) for one in cases)],
        bounds,
    )


def _absolute_and_relative(one) -> str:
    return " ".join(f"{apart.absolute:>8.1e} {apart.relative:>8.1e}"
                    for apart in (one.logits, one.loss, one.gradient))


def _verdict(failed: list[str], bounds: dict[str, float]) -> int:
    within = f"{bounds['logits']:.2g}"
    if bounds["gradient"] != bounds["logits"]:
        within += f" in logits and loss, {bounds['gradient']:.2g} in gradients"
    if failed:
        raise CheckFailed(f"{', '.join(failed)}: further than {within} from transformers.")
    print(f"equal within {within}")
    return 0
