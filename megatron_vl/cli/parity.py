"""`megatron-vl parity HF_DIR`: logits, loss and gradients against transformers, in any layout."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from megatron_vl.cli.convert import layer_list
from megatron_vl.cli.worker import started_by_torchrun
from megatron_vl.errors import CheckFailed, InputError
from megatron_vl.parallel import Layout, StageSplit


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "parity",
        help="compare with transformers",
        description="Run the model of HF_DIR on random samples through transformers and through "
        "Megatron-Core spread over the given layout, both in fp32, and compare the logits of every "
        "token, the loss, and the gradient of every parameter.",
    )
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default: 1)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages (default: 1)")
    parser.add_argument("--vp", type=int, default=1, help="model chunks per stage (default: 1)")
    parser.add_argument("--cp", type=int, default=1, help="ranks that share a row (default: 1)")
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
    parser.add_argument("--first-stage-layers", type=int, help="language layers on stage 0")
    parser.add_argument("--pp-layers", metavar="LIST", help="language layers of each stage")
    parser.add_argument("--vit-pp-layers", metavar="LIST", help="vision layers of each stage")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5,
        help="largest relative difference that passes (default: 1e-5)",
    )
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_vl.models.registry import load_spec

    spec = load_spec(args.hf_dir)
    layouts = _layouts(args, spec)
    if not args.tolerance > 0:
        raise InputError(f"--tolerance is {args.tolerance}; give a number above 0, as 1e-5.")
    if started_by_torchrun():
        from megatron_vl.cli.worker import run_worker
        from megatron_vl.training.parity import run_ranks

        run_worker(
            lambda: run_ranks(args.work_dir, args.hf_dir, layouts, args.overlap_grad_reduce),
            command="parity", debug=args.debug,
        )
    with tempfile.TemporaryDirectory(prefix="megatron-vl-parity-") as scratch:
        return _compare(args, spec, layouts, Path(scratch))


def _layouts(args: argparse.Namespace, spec) -> list[tuple[Layout, StageSplit]]:
    """The layouts to compare, all of the same number of ranks."""
    from megatron_vl.training import parity

    layout = Layout(
        tp=args.tp, pp=args.pp, vp=args.vp, cp=args.cp, dp=args.dp,
        sequence_parallel=args.sequence_parallel and args.tp > 1,
        vit_data_parallel=args.vit_data_parallel,
    )
    if args.sweep is not None:
        if layout != Layout() or any(
            one is not None for one in (args.first_stage_layers, args.pp_layers, args.vit_pp_layers)
        ):
            raise InputError(
                "--sweep goes through every layout; leave out --tp, --pp, --vp, --cp, --dp, "
                "--sequence-parallel, --vit-data-parallel, --first-stage-layers, --pp-layers and "
                "--vit-pp-layers, or --sweep."
            )
        layouts = list(parity.sweep(spec, args.sweep))
        if not layouts:
            raise InputError(f"no layout of --sweep {args.sweep} ranks fits this model.")
        return layouts
    split = spec.split(
        pp=layout.pp, vp=layout.vp, first_stage_layers=args.first_stage_layers,
        llm=layer_list(args.pp_layers, "--pp-layers"),
        vit=layer_list(args.vit_pp_layers, "--vit-pp-layers"),
    )
    spec.check_layout(layout, split)
    parity.check_microbatches(layout)
    return [(layout, split)]


def _compare(args, spec, layouts, work_dir: Path) -> int:
    from megatron_vl.cli.launch import launch
    from megatron_vl.training import parity

    ranks = layouts[0][0].world_size
    print(f"converting {args.hf_dir} for {len(layouts)} layout(s) of {ranks} rank(s)", flush=True)
    for number, (layout, split) in enumerate(layouts):
        options = ["--dtype", "float32", "--tp", layout.tp, "--pp", layout.pp, "--vp", layout.vp]
        for option, rows in (("--pp-layers", split.llm), ("--vit-pp-layers", split.vit)):
            options += [option, json.dumps(rows)]
        _convert(args.hf_dir, work_dir / str(number) / "weights", *options)
    print("running Megatron-Core", flush=True)
    code = launch([*args.argv, "--work-dir", str(work_dir)], nproc_per_node=ranks)
    if code:
        return code
    print("running transformers", flush=True)
    differences = [[] for _ in layouts]
    for index, case in enumerate(parity.CASES):
        theirs = parity.run_transformers(args.hf_dir, spec, case)
        samples = parity.make_samples(spec, case)
        for number, (layout, _) in enumerate(layouts):
            folder = work_dir / str(number)
            gradients = folder / f"{index}.hf"
            _convert(
                folder / f"{index}.gradients", gradients, "--to", "hf", "--hf-config", args.hf_dir
            )
            ours = parity.read_ours(
                folder, index, spec, samples, layout, _read_tensors(gradients)
            )
            differences[number].append(parity.compare(case, ours, theirs))
    report = _report if args.sweep is None else _report_sweep
    return report(layouts, differences, args.tolerance)


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


def _report(layouts, differences, tolerance: float) -> int:
    """A row a case of the only layout."""
    ((layout, split),), (cases,) = layouts, differences
    print(f"\n{layout}, {split}, fp32; relative to transformers\n"
          f"{'case':<28} {'logits':>9} {'loss':>9} {'gradients':>10}  parameter furthest off")
    for one in cases:
        print(f"{one.case:<28} {_figures(one)}  {one.worst} (of {one.parameters})")
    return _verdict([one.case for one in cases if one.largest > tolerance], tolerance)


def _report_sweep(layouts, differences, tolerance: float) -> int:
    """A row a layout, with the case that is furthest off."""
    width = max(len(f"{layout}, {split}") for layout, split in layouts)
    print(f"\nfp32, {len(differences[0])} cases each, the furthest off; relative to transformers\n"
          f"{'layout':<{width}} {'logits':>9} {'loss':>9} {'gradients':>10}  case, parameter")
    for (layout, split), cases in zip(layouts, differences, strict=True):
        one = max(cases, key=lambda case: case.largest)
        print(f"{f'{layout}, {split}':<{width}} {_figures(one)}  {one.case}, {one.worst} "
              f"(of {one.parameters})")
    return _verdict(
        [f"{layout} ({split})" for (layout, split), cases in zip(layouts, differences, strict=True)
         if any(one.largest > tolerance for one in cases)],
        tolerance,
    )


def _figures(one) -> str:
    return f"{one.logits:>9.1e} {one.loss:>9.1e} {one.gradient:>10.1e}"


def _verdict(failed: list[str], tolerance: float) -> int:
    if failed:
        raise CheckFailed(f"{', '.join(failed)}: further than {tolerance:g} from transformers.")
    print(f"equal within {tolerance:g}")
    return 0
