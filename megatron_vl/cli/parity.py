"""`megatron-vl parity HF_DIR`: logits, loss and gradients against transformers, in any layout."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.launch.worker import started_by_torchrun
from megatron_vl.models.common.balance import TYPES
from megatron_vl.ops.blockwise import FORMS
from megatron_vl.ops.experts import AUTO, CHOICES, ExpertsCase
from megatron_vl.parallel import Layout, StageSplit
from megatron_vl.parallel.stages import layer_list
from megatron_vl.parity import FP32
from megatron_vl.peft.targets import ALL_LINEAR, HELP
from megatron_vl.training.options.experts import ExpertsOptions
from megatron_vl.training.options.spellings import dtype_of, flags_of

DTYPES = ("float32", "bfloat16")


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
        ("ep", "ranks that hold different experts"),
    ):
        parser.add_argument(*flags_of(name), type=int, default=1, help=f"{what} (default: 1)")
    parser.add_argument(*flags_of("etp"), type=int, help="ranks that share an expert, a divisor of "
                        "--tp (default: as --tp)")
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
        "--cross-entropy-chunks", type=int, default=1, metavar="N",
        help="logits of a part in N of the positions at a time, as in training; refused where N "
        "is too small to cut those of the positions that are trained here (default: 1)",
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
    parser.add_argument(
        "--lora-rank", type=int, metavar="R", help="compare the gradients of an adapter of this "
        "rank with PEFT's, instead of those of the weights",
    )
    parser.add_argument(
        "--lora-target", nargs="+", metavar="LAYER", default=[ALL_LINEAR],
        help=f"layers that are adapted (default: {ALL_LINEAR}): {HELP}",
    )
    parser.add_argument(
        "--lora-fused", action="store_true", help="one A for q, k and v, and one for gate and up, "
        "whose gradient is to be the sum of those of PEFT's",
    )
    parser.add_argument(
        *flags_of("quantize_base"), choices=FORMS, help="with --lora-rank, quantise the language "
        "layers' linear weights; transformers judges with the values that they stand for",
    )
    for name, what in (
        ("moe_aux_loss_coeff", "of the auxiliary loss of the experts' load"),
        ("moe_z_loss_coeff", "of the routers' z-loss"),
    ):
        parser.add_argument(
            *flags_of(name), type=float, metavar="X",
            help=f"coefficient {what}, whose gradients are compared with its formula's",
        )
    parser.add_argument(
        *flags_of("moe_router_load_balancing_type"), choices=TYPES,
        help="kind of the auxiliary loss (default: aux_loss where it has a coefficient)",
    )
    parser.add_argument(
        *flags_of("moe_grouped_gemm"), choices=CHOICES, default=AUTO, help="a linear layer of all "
        "experts of a rank in one product, or of one after another (default: as in training)",
    )
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_vl.models.common.experts_way import experts_way
    from megatron_vl.models.registry import load_spec
    from megatron_vl.parity.ranks import Setting, run_ranks
    from megatron_vl.weights.found import no_checkpoint
    from megatron_vl.weights.hf_io import is_hf_directory
    from megatron_vl.weights.hub import local_model

    args.hf_dir = local_model(args.hf_dir)
    if not is_hf_directory(args.hf_dir):
        raise no_checkpoint(args.hf_dir, "hf")
    spec = load_spec(args.hf_dir)
    setting = Setting(
        dtype=args.dtype, packed=args.pack, recompute=args.recompute,
        recompute_method=args.recompute_method, recompute_num_layers=args.recompute_num_layers,
        cross_entropy_chunks=args.cross_entropy_chunks,
        overlap_grad_reduce=args.overlap_grad_reduce,
        lora_rank=args.lora_rank, lora_target=tuple(args.lora_target),
        lora_fused=args.lora_fused, quantize_base=args.quantize_base,
        balance=ExpertsOptions(
            moe_router_load_balancing_type=args.moe_router_load_balancing_type,
            moe_aux_loss_coeff=args.moe_aux_loss_coeff, moe_z_loss_coeff=args.moe_z_loss_coeff,
            moe_grouped_gemm=args.moe_grouped_gemm,
        ).balance(spec),
        moe_grouped_gemm=args.moe_grouped_gemm,
    )
    layouts = _layouts(args, spec)
    if args.quantize_base is not None:
        _check_quantized(args, spec, layouts)
    for layout, split in layouts:
        setting.recompute_of(split)
        experts_way(spec, layout, args.moe_grouped_gemm, dtype=args.dtype, kept=args.quantize_base,
                    case=partial(ExpertsCase.here, touch_device=False))
    _check_chunks(args, spec)
    if args.tolerance is not None and not args.tolerance > 0:
        raise InputError(f"--tolerance is {args.tolerance}; give a number above 0, as 1e-5.")
    if started_by_torchrun():
        from megatron_vl.launch.worker import run_worker

        run_worker(
            lambda: run_ranks(args.work_dir, args.hf_dir, layouts, setting),
            command="parity", debug=args.debug,
        )
    with tempfile.TemporaryDirectory(prefix="megatron-vl-parity-") as scratch:
        return _compare(args, spec, layouts, setting, Path(scratch))


def _layouts(args: argparse.Namespace, spec) -> list[tuple[Layout, StageSplit]]:
    """The layouts to compare, all of the same number of ranks."""
    from megatron_vl.parity.layouts import check_microbatches, sweep

    if spec.vision is None and args.vit_data_parallel:  # TP 1 would clear it
        raise spec.takes_text_alone("vit_data_parallel", True)
    layout = Layout(
        tp=args.tp, pp=args.pp, vp=args.vp, cp=args.cp, dp=args.dp, ep=args.ep, etp=args.etp,
        sequence_parallel=args.sequence_parallel,
        vit_data_parallel=args.vit_data_parallel,
    )
    if args.sweep is not None:
        given = (args.first_stage_layers, args.pp_layers, args.vit_pp_layers)
        if (layout != Layout() or args.sequence_parallel or args.vit_data_parallel
                or any(one is not None for one in given)):
            raise InputError(
                "--sweep goes through every layout; leave out --tp, --pp, --vp, --cp, --dp, "
                "--ep, --etp, --sequence-parallel, --vit-data-parallel, --first-stage-layers, "
                "--pp-layers and --vit-pp-layers, or --sweep."
            )
        layouts = list(sweep(spec, args.sweep))
        if not layouts:
            raise InputError(f"no layout of --sweep {args.sweep} ranks fits this model.")
        return layouts
    split = spec.split(
        pp=layout.pp, vp=layout.vp, first_stage_layers=args.first_stage_layers,
        llm=layer_list(args.pp_layers, "--pp-layers"),
        vit=layer_list(args.vit_pp_layers, "--vit-pp-layers"),
    )
    spec.check_run(layout, split)
    check_microbatches(layout)
    return [(layout, split)]


def _check_quantized(args, spec, layouts) -> None:
    """Raises InputError: other values than transformers' by what is asked, not by a fault."""
    from megatron_vl.models.common.quantized_base import cut_within_blocks
    from megatron_vl.models.registry import family

    if args.lora_rank is None:
        raise InputError(
            "--quantize-base is about the weights beside an adapter; give --lora-rank, or leave it "
            "out."
        )
    weights = family(spec.model_type).weight_map(spec)
    for layout, _ in layouts:
        if cut := cut_within_blocks(weights, layout):
            raise InputError(f"{cut}, which transformers judges with; lower --tp, or --sweep.")


def _check_chunks(args, spec) -> None:
    """Raises InputError: no number of parts, or one with which logits would come in one part."""
    from megatron_vl.parity.cases import cases, least_chunks

    given = args.cross_entropy_chunks
    if given < 1:
        raise InputError(f"--cross-entropy-chunks is {given}; give a whole number from 1 on.")
    if given == 1:
        return
    least = max(least_chunks(spec, case) for case in cases(spec, args.pack))
    if given < least:
        raise InputError(
            f"--cross-entropy-chunks {given} cuts the logits of no microbatch of some batch, for "
            f"few of their positions are trained; give {least} or more."
        )


def _compare(args, spec, layouts, setting, work_dir: Path) -> int:
    from megatron_vl.launch.launcher import launch
    from megatron_vl.models.registry import family
    from megatron_vl.parity.report import bounds_of, report, report_sweep
    from megatron_vl.parity.run import differences, write_weights

    ranks = layouts[0][0].world_size
    print(f"converting {args.hf_dir} for {len(layouts)} layout(s) of {ranks} rank(s)", flush=True)
    write_weights(work_dir, args.hf_dir, spec, layouts, setting)
    if args.lora_rank is not None:
        from megatron_vl.parity.adapters import write_adapter

        write_adapter(work_dir, args.hf_dir, spec, rank=args.lora_rank, targets=args.lora_target,
                      fused=args.lora_fused)
    judged_dir = args.hf_dir
    if args.quantize_base is not None:
        from megatron_vl.parity.quantized import write_quantized

        judged_dir = write_quantized(work_dir, args.hf_dir, spec, setting)
    print("running Megatron-Core", flush=True)
    code = launch([*args.argv, "--work-dir", str(work_dir)], nproc_per_node=ranks)
    if code:
        return code
    judge = family(spec.model_type).judge_name
    print(f"running {judge}", flush=True)
    found, own = differences(work_dir, judged_dir, spec, layouts, setting)
    show = report if args.sweep is None else report_sweep
    return show(layouts, setting, found, own, bounds_of(args.tolerance, own), judge)
