"""`megatron-vl parity HF_DIR`: logits, loss and gradients against transformers, in any layout."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from pathlib import Path

from megatron_vl.errors import CheckFailed, InputError
from megatron_vl.parallel import Layout


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
    parser.add_argument("--dp", type=int, default=1, help="data-parallel ranks (default: 1)")
    parser.add_argument("--sequence-parallel", action="store_true", help="split norms over TP")
    parser.add_argument(
        "--overlap-grad-reduce", action="store_true", help="reduce gradients during backward"
    )
    parser.add_argument("--first-stage-layers", type=int, help="language layers on stage 0")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5,
        help="largest relative difference that passes (default: 1e-5)",
    )
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_vl.models.registry import load_spec

    spec = load_spec(args.hf_dir)
    layout = Layout(
        tp=args.tp, pp=args.pp, vp=args.vp, dp=args.dp,
        sequence_parallel=args.sequence_parallel and args.tp > 1,
    )
    split = spec.split(pp=layout.pp, vp=layout.vp, first_stage_layers=args.first_stage_layers)
    spec.check_layout(layout, split)
    if layout.dp > 2:
        raise InputError(f"--dp {layout.dp} is more than the 2 that every batch can be cut into.")
    if "LOCAL_RANK" in os.environ:
        from megatron_vl.cli.worker import run_worker
        from megatron_vl.training.parity import run_rank

        run_worker(
            lambda: run_rank(args.work_dir, args.hf_dir, layout, split, args.overlap_grad_reduce),
            command="parity", debug=args.debug,
        )
    with tempfile.TemporaryDirectory(prefix="megatron-vl-parity-") as scratch:
        return _compare(args, spec, layout, split, Path(scratch))


def _compare(args, spec, layout, split, work_dir: Path) -> int:
    from megatron_vl.cli.launch import launch
    from megatron_vl.training import parity

    options = ["--dtype", "float32", "--tp", layout.tp, "--pp", layout.pp, "--vp", layout.vp]
    if args.first_stage_layers is not None:
        options += ["--first-stage-layers", args.first_stage_layers]
    print(f"converting {args.hf_dir} to {layout}", flush=True)
    _convert(args.hf_dir, work_dir / "weights", *options)
    print(f"running {layout.world_size} rank(s)", flush=True)
    code = launch([*args.argv, "--work-dir", str(work_dir)], nproc_per_node=layout.world_size)
    if code:
        return code
    print("running transformers", flush=True)
    differences = []
    for index, case in enumerate(parity.CASES):
        hf_gradients = work_dir / f"{index}.hf"
        _convert(
            work_dir / f"{index}.gradients", hf_gradients, "--to", "hf", "--hf-config", args.hf_dir
        )
        samples = parity.make_samples(spec, case)
        ours = parity.read_ours(
            work_dir, index, spec, samples, layout.dp, _read_tensors(hf_gradients)
        )
        theirs = parity.run_transformers(args.hf_dir, spec, case)
        differences.append(parity.compare(case, ours, theirs))
    return _report(differences, layout, split, args.tolerance)


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


def _report(differences, layout, split, tolerance: float) -> int:
    print(f"\n{layout}, {split}, fp32; relative to transformers\n"
          f"{'case':<28} {'logits':>9} {'loss':>9} {'gradients':>10}  parameter furthest off")
    failed = []
    for one in differences:
        print(f"{one.case:<28} {one.logits:>9.1e} {one.loss:>9.1e} {one.gradient:>10.1e}  "
              f"{one.worst} (of {one.parameters})")
        if not max(one.logits, one.loss, one.gradient) <= tolerance:
            failed.append(one.case)
    if failed:
        raise CheckFailed(f"{', '.join(failed)}: further than {tolerance:g} from transformers.")
    print(f"equal within {tolerance:g}")
    return 0
