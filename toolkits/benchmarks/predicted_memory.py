"""Bytes that ranks take in a training step, as `megatron-vl train --dry-run` predicts and measured.

    python predicted_memory.py HF_DIR [--seq-length 1024] [--ranks 1 2 4] [--only WORD]

HF_DIR needs config.json alone: weights are random. Every token of a row is trained; with a vision
tower a row is as many images of 16 x 16 patches as fit into it. Every line trains the model of
`megatron-vl train` with other options for one step, on so many processes on the CPU over gloo.

`held` are weights, gradients and optimizer state: the storages that stay from step to step, and how
far the prediction is off on the worst rank, in bytes. Of activations the bytes of all other tensors
are counted from when an operation makes them until they are gone, and the peak up to the end of the
last backward is compared. `afterwards` is the peak from then on, of the fullest rank: ranks sum
their gradients, which gloo does by way of copies that NCCL does not make, and update the weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from memory import full, make_batch

LORA = dict(lora_rank=8)
CHUNKS = dict(cross_entropy_chunks=8)
EVERY = dict(lora_target=["llm", "vit", "merger"])  # of a model that has a vision tower
SELECTIVE = dict(recompute_granularity="selective")
DISTRIBUTED = dict(use_distributed_optimizer=True)
TP2, CP2 = dict(tensor_model_parallel_size=2), dict(context_parallel_size=2)
SP = TP2 | dict(sequence_parallel=True)
PP2, PP4 = (dict(pipeline_model_parallel_size=stages) for stages in (2, 4))
VIRTUAL = "num_virtual_stages_per_pipeline_rank"
VP2 = PP2 | {VIRTUAL: 2}
EP2 = dict(expert_model_parallel_size=2)  # of a model with experts
WHOLE = dict(vit_data_parallel=True)  # of a model that has a vision tower
LINES = {  # by the number of ranks
    1: {
        "all weights": {},
        "all weights, fp32": dict(bf16=False),
        "all weights, selective recompute": SELECTIVE,
        "all weights, full recompute": full("uniform", 1),
        "all weights, full recompute in groups of 2": full("uniform", 2),
        "all weights, 2 layers recomputed": full("block", 2),
        "all weights, vision tower recomputed": dict(vit_recompute_granularity="full"),
        "LoRA": LORA,
        "LoRA, in 8 chunks": LORA | CHUNKS,
        "LoRA, full recompute": LORA | full("uniform", 1),
        "LoRA on every part, full recompute": LORA | full("uniform", 1) | EVERY,
        "LoRA, full recompute, in 8 chunks": LORA | full("uniform", 1) | CHUNKS,
        "LoRA beside NF4, full recompute, in 8 chunks": (
            LORA | full("uniform", 1) | CHUNKS | dict(quantize_base="nf4")
        ),
    },
    2: {
        "DP2, distributed optimizer": DISTRIBUTED,
        "TP2": TP2,
        "TP2, SP": SP,
        "TP2, SP, selective recompute": SP | SELECTIVE,
        "TP2, SP, full recompute": SP | full("uniform", 1),
        "TP2, SP, whole towers": SP | WHOLE,
        "TP2, SP, LoRA": SP | LORA,
        "CP2, distributed optimizer": CP2 | DISTRIBUTED,
        "CP2, full recompute": CP2 | full("uniform", 1),
        "PP2": PP2,
        "PP2, 1 layer on stage 0": PP2 | dict(decoder_first_pipeline_num_layers=1),
        "PP2, no layer on stage 0": PP2 | dict(pp_layers="0,4"),
        "PP2, LoRA": PP2 | LORA,
        "PP2, selective recompute": PP2 | SELECTIVE,
        "PP2, full recompute": PP2 | full("uniform", 1),
        "PP2, 1 layer a stage recomputed": PP2 | full("block", 1),
        "PP2, VP2": VP2,
        "PP2, VP2, full recompute": VP2 | full("uniform", 1),
        "EP2": EP2,
        "EP2, distributed optimizer": EP2 | DISTRIBUTED,
        "EP2, selective recompute": EP2 | SELECTIVE,
        "EP2, full recompute": EP2 | full("uniform", 1),
    },
    4: {
        "TP2, SP, PP2": SP | PP2,
        "TP2, SP, DP2, distributed optimizer": SP | DISTRIBUTED,
        "CP2, PP2, LoRA": CP2 | PP2 | LORA,
        "PP2, DP2, distributed optimizer, full recompute": (
            PP2 | DISTRIBUTED | full("uniform", 1)
        ),
        "PP4": PP4,
        "PP4, full recompute": PP4 | full("uniform", 1),
        "TP2, SP, EP2, PP2": SP | EP2 | PP2 | dict(expert_tensor_parallel_size=1),
        "EP2, PP2, DP2, distributed optimizer": EP2 | PP2 | DISTRIBUTED,
    },
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="directory of config.json")
    parser.add_argument("--seq-length", type=int, default=1024, help="of a row (default: 1024)")
    parser.add_argument("--ranks", type=int, nargs="+", choices=LINES, default=list(LINES),
                        help="processes at once (default: all)")
    parser.add_argument("--only", default="", metavar="WORD", help="lines with this in their name")
    parser.add_argument("--own-router", action="store_true",
                        help="tokens go where the random router sends them, and not in turn")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a rank
    return parser.parse_args()


def make_row(spec, seq_length: int):
    """A row [1, s] all of whose tokens are trained."""
    if spec.vision is not None:
        batch = make_batch(spec, seq_length, 1)
    else:
        from megatron_vl.data.encode import rows
        from megatron_vl.models import family
        from megatron_vl.parity.cases import Case, make_samples

        samples = make_samples(spec, Case(name="text", images=((),) * (seq_length // 8)))
        taken = []
        for sample in samples:
            if sum(one.tokens.numel() for one in (*taken, sample)) <= seq_length:
                taken.append(sample)
        batch = rows.make_batch([rows.make_row(taken)], row_length=seq_length, pad_token=0,
                                positions=family(spec.model_type).positions(spec))
    return replace(batch, labels=batch.tokens, loss_mask=batch.loss_mask.new_ones(1, seq_length))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """Bytes of a rank."""

    held: int  # predicted of weights, gradients and the optimizer's state
    off: dict[str, int]  # by which that is more than what was found, of each of them
    predicted: int  # of activations
    measured: int  # of those
    afterwards: int  # measured, after the last backward

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def measure(args: argparse.Namespace, options: dict) -> Rank:
    """One step of this rank."""
    from megatron_vl.models import load_spec
    from megatron_vl.models.common.router import routers
    from megatron_vl.platform import initialize
    from megatron_vl.training.activations import activation_memory
    from megatron_vl.training.memory import rank_memory
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run
    from megatron_vl.training.setup import build_model, build_optimizer
    from megatron_vl.training.step import run_schedule, streams_of
    from megatron_vl.training.trace.allocated import AllocatedBytes
    from megatron_vl.training.trace.rank import experts_as_predicted

    row = make_row(load_spec(args.hf_dir), args.seq_length)
    if row.pixel_patches is not None:
        options = options | {"max_patches_per_row": len(row.pixel_patches)}
    stages = options.get("pipeline_model_parallel_size", 1)
    replicas = world() // stages // options.get("tensor_model_parallel_size", 1) // options.get(
        "context_parallel_size", 1)
    plan = experts_as_predicted(plan_run(TrainConfig.from_dict({
        "hf_config": str(args.hf_dir), "bf16": True, "train_data_path": str(args.hf_dir),
        "seq_length": args.seq_length, "micro_batch_size": 1,
        # As many microbatches as a pipeline needs to hold as many as it ever does.
        "global_batch_size": replicas * stages * options.get(VIRTUAL, 1),
        "use_distributed_optimizer": False, **options,
    }), world(), here=False))
    platform = initialize(plan.layout, embedding_stage=plan.split.embedding_chunk[0])
    model = build_model(plan, platform, initialize_weights=True)
    optimizer, _ = build_optimizer(plan, model, platform)
    if not args.own_router:
        for router in routers(model):
            router.routing = partial(_in_turn, router.routing)
    stage = plan.layout.coordinates(torch.distributed.get_rank()).pp

    def rows() -> Iterator:
        """What comes from a loader is gone when its forward is over; pixels come to stage 0."""
        pixels = row.pixel_patches if stage == 0 else None
        while True:
            yield replace(row, pixel_patches=None if pixels is None else pixels.to(
                getattr(torch, plan.config.model.dtype), copy=True))  # as a loader gives them

    def step() -> None:
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run_schedule(
            model, streams_of(model, [rows() for _ in model], "cpu"), forward_only=False,
            num_microbatches=plan.num_microbatches, micro_batch_size=1, row_length=args.seq_length,
        )
        optimizer.step()

    held = held_tensors(model, optimizer)
    known = [one for chunk in model for one in chunk.module.buffers()]
    known += [row.tokens, row.labels, row.loss_mask, row.position_ids]
    backward = []  # peaks of it
    config = model[0].config
    with AllocatedBytes([*known, *(one for kind in held.values() for one in kind)]) as counted:
        config.finalize_model_grads_func = _first(
            lambda: backward.append(counted.take_peak()), config.finalize_model_grads_func)
        step()
    said, found = rank_memory(plan, stage), {}
    for kind, tensors in held.items():
        storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in tensors}
        found[kind] = sum(storage.nbytes() for storage in storages.values())
    predicted = {"weights": said.weight_bytes, "gradients": said.gradient_bytes,
                 "optimizer": said.optimizer_bytes}
    return Rank(
        held=sum(predicted.values()), off={kind: predicted[kind] - found[kind] for kind in found},
        predicted=activation_memory(plan, stage).peak, measured=backward[0],
        afterwards=counted.peak,
    )


def _in_turn(
    routing: Callable, logits: torch.Tensor, **more
) -> tuple[torch.Tensor, torch.Tensor]:
    """`routing` of logits [s, b, E] that send tokens to experts in turn, to each as many."""
    experts = torch.arange(logits.shape[-1])
    turn = torch.arange(logits.numel() // len(experts))[:, None] + experts  # of token and expert
    return routing(logits - 1e3 * (turn % len(experts)).view_as(logits), **more)


def _first(note: Callable[[], None], then: Callable) -> Callable:
    """`then`, before which `note` is called."""
    def both(*args, **options):
        note()
        return then(*args, **options)

    return both


def held_tensors(model: list, optimizer) -> dict[str, list[torch.Tensor]]:
    """What stays from step to step."""
    from megatron_vl.ops.quantized import stored

    weights = [part for chunk in model for one in chunk.parameters() for part in stored(one)]
    gradients = [buffer.grad_data for chunk in model
                 for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    places = {one.untyped_storage()._cdata for one in weights}
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    # Adam counts its steps in a scalar a weight; in fp32 it updates the weights themselves.
    moments = [one for each in optimizers for state in each.optimizer.state.values()
               for one in state.values() if isinstance(one, torch.Tensor) and one.dim()]
    masters = [one for each in optimizers for group in each.optimizer.param_groups
               for one in group["params"] if one.untyped_storage()._cdata not in places]
    return {"weights": weights, "gradients": gradients, "optimizer": [*moments, *masters]}


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def lines(args: argparse.Namespace, ranks: int) -> dict[str, dict]:
    """Those that the model has the parts for."""
    from megatron_vl.models import load_spec

    spec = load_spec(args.hf_dir)
    has_tower, has_experts = spec.vision is not None, spec.decoder.experts is not None
    return {
        name: options for name, options in LINES[ranks].items() if args.only in name
        and (has_tower or not (options.keys() & {*EVERY, *WHOLE} or "tower" in name))
        and (has_experts or not options.keys() & EP2.keys())
        # Megatron-Core trains experts over TP ranks with sequence parallelism alone.
        and not (has_experts and options == TP2)
    }


def measure_lines(args: argparse.Namespace) -> None:
    """On every rank; the first one prints a line of the table each."""
    from megatron_vl.platform import leave_layout, select_platform

    select_platform().install()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, options in lines(args, world()).items():
        mine, ranks = measure(args, options), [None] * world()
        torch.distributed.all_gather_object(ranks, mine)
        leave_layout()
        if int(os.environ.get("RANK", 0)) == 0:
            print(table_row(name, ranks), flush=True)


def table_row(name: str, ranks: list[Rank]) -> str:
    """The ratio is written once where all ranks have the same, to a hundredth."""
    fullest = max(ranks, key=lambda rank: rank.measured)
    off = max(abs(number) for rank in ranks for number in rank.off.values())
    ratios = [f"{rank.ratio:.2f}" for rank in ranks]
    return (
        f"| {name} | {fullest.held / 2**20:,.1f} | {off:,} | {fullest.predicted / 2**20:,.1f} | "
        f"{fullest.measured / 2**20:,.1f} | "
        f"{' '.join(ratios if len(set(ratios)) > 1 else ratios[:1])} | "
        f"{max(rank.afterwards for rank in ranks) / 2**20:,.1f} |"
    )


def main() -> None:
    args = parse_arguments()
    if args.here:
        measure_lines(args)
        return
    print("| training | held MiB | off, bytes | activations, predicted MiB | measured MiB | ratio, "
          "rank by rank | afterwards MiB |\n|---|---|---|---|---|---|---|", flush=True)
    for ranks in args.ranks:
        done = subprocess.run([
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks), __file__, *sys.argv[1:], "--here",
        ])
        if done.returncode:
            sys.exit(f"{ranks} rank(s) failed.")


if __name__ == "__main__":
    main()
