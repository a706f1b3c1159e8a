"""Bytes of a training step's activations, as `megatron-vl train --dry-run` predicts and measured.

    python activations.py HF_DIR [--seq-length 1024]

HF_DIR needs config.json alone: weights are random. Every token of a row is trained; with a vision
tower a row is as many images of 16 x 16 patches as fit into it. Every line trains the model of
`megatron-vl train` with other options for two steps in this process, on the CPU. In the second one
the bytes of all tensors are counted from when they are made until they are gone; those of before,
the weights, gradients and the optimizer's, are left out.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from memory import full, make_batch

LORA = dict(lora_rank=8)
CHUNKS = dict(cross_entropy_chunks=8)
EVERY = dict(lora_target=["llm", "vit", "merger"])  # of a model that has a vision tower
LINES = {
    "all weights": {},
    "all weights, selective recompute": dict(recompute_granularity="selective"),
    "all weights, full recompute": full("uniform", 1),
    "LoRA": LORA,
    "LoRA, in 8 chunks": LORA | CHUNKS,
    "LoRA, full recompute": LORA | full("uniform", 1),
    "LoRA on every part, full recompute": LORA | full("uniform", 1) | EVERY,
    "LoRA, full recompute, in 8 chunks": LORA | full("uniform", 1) | CHUNKS,
    "LoRA beside NF4, full recompute, in 8 chunks": (
        LORA | full("uniform", 1) | CHUNKS | dict(quantize_base="nf4")
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="directory of config.json")
    parser.add_argument("--seq-length", type=int, default=1024, help="of a row (default: 1024)")
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


def measure(args: argparse.Namespace, options: dict) -> tuple[int, int]:
    """(bytes predicted, bytes measured) of a step with these options."""
    from megatron_vl.models import load_spec
    from megatron_vl.platform import initialize, leave_layout
    from megatron_vl.training.activations import activation_memory
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run
    from megatron_vl.training.setup import build_model, build_optimizer
    from megatron_vl.training.step import RowStream, run_schedule
    from megatron_vl.training.trace.allocated import AllocatedBytes
    from megatron_vl.training.trace.rank import held

    row = make_row(load_spec(args.hf_dir), args.seq_length)
    if row.pixel_patches is not None:
        options = options | {"max_patches_per_row": len(row.pixel_patches)}
    plan = plan_run(TrainConfig.from_dict({
        "hf_config": str(args.hf_dir), "bf16": True,
        "train_data_path": str(args.hf_dir), "seq_length": args.seq_length,
        # gloo shards gradients by way of a copy, which no device needs.
        "use_distributed_optimizer": False, **options,
    }), 1, here=False)
    platform = initialize(plan.layout)
    model = build_model(plan, platform, initialize_weights=True)
    build_optimizer(plan, model, platform)

    def rows() -> Iterator:
        """What comes from a loader is gone when its forward is over."""
        pixels = row.pixel_patches
        yield row if pixels is None else replace(row, pixel_patches=pixels.clone())

    def step() -> None:
        model[0].train()
        model[0].zero_grad_buffer()
        run_schedule(model, [RowStream(rows(), "cpu")], num_microbatches=1, micro_batch_size=1,
                     row_length=args.seq_length, forward_only=False)

    step()
    known = [one for kind in held(model).values() for one in kind]
    with AllocatedBytes(known) as counted:
        step()
    leave_layout()
    return activation_memory(plan, 0).peak, counted.peak


def main() -> None:
    args = parse_arguments()
    from megatron_vl.models import load_spec
    from megatron_vl.platform import select_platform

    select_platform().install()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| training | predicted MiB | measured MiB | ratio |\n|---|---|---|---|")
    has_tower = load_spec(args.hf_dir).vision is not None
    for name, options in LINES.items():
        if "lora_target" in options and not has_tower:
            continue
        predicted, measured = measure(args, options)
        print(f"| {name} | {predicted / 2**20:,.1f} | {measured / 2**20:,.1f} | "
              f"{predicted / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
