"""transformers' own training step at the same sizes, on the samples that our loader packs.

    python hf_step.py RESULT.json INPUTS WAY [--model 2b] [--seq-length 4096] [--rows 8] [--steps 6]
        [--device cuda]

WAY is `padded`: the samples of a row as one batch, padded to the longest, with an attention mask;
or `packed`: the row as it is, with positions that start anew at every sample, from which
transformers makes the mask. Both with sdpa, which needs no other package. The model and torch's
fused AdamW are in bf16 altogether, without fp32 weights, moments or gradient sums: less memory and
fewer bytes than our step, whose optimizer is in fp32. The loss is in fp32, over all positions,
divided by the trained tokens of the step. Gradient checkpointing is off where that fits. Batches
lie on the device before the first step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from results import Results, first_line, read_fact
from timing import Timer
from torch.nn.utils.rnn import pad_sequence

WARMUP = 2  # steps left out


def read_batches(args) -> tuple[list, object]:
    """The microbatches of one step as the trainer reads them, and the model's `ModelSpec`."""
    from megatron_vl.data.load.config import DataConfig
    from megatron_vl.data.load.loader import build_train_loader
    from megatron_vl.models import family, load_spec
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.paths import mixtures

    hf_dir, data = args.inputs / args.model, str(args.inputs / "data")
    train, _ = mixtures(TrainConfig.from_dict({"hf_config": str(hf_dir), "train_data_path": data}))
    spec = load_spec(hf_dir)
    loader = build_train_loader(
        DataConfig(train=train, seq_length=args.seq_length, num_workers=0, packing_buffer_size=100),
        hf_dir=hf_dir, spec=spec, family=family(spec.model_type),
    )
    batches = iter(loader)
    return [next(batches) for _ in range(args.rows)], spec


def as_padded(batch) -> dict:
    """One sample a line, padded on the right; transformers makes the positions."""
    samples = list(split(batch))
    ids = pad_sequence([tokens for tokens, _ in samples], batch_first=True)
    mask = pad_sequence([torch.ones_like(tokens) for tokens, _ in samples], batch_first=True)
    labels = pad_sequence([one for _, one in samples], batch_first=True, padding_value=-100)
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def as_packed(batch) -> dict:
    """The row: positions in the sample, then the three rotary axes, [4, 1, S]."""
    within = torch.cat([torch.arange(b - a) for a, b in pairwise(batch.cu_seqlens.tolist())])
    positions = torch.cat((within[None, None], batch.position_ids.cpu()))
    return dict(input_ids=batch.tokens, labels=batch.labels, position_ids=positions)


def split(batch):
    """(tokens, labels) of every sample of a row."""
    tokens, labels = batch.tokens.flatten(), batch.labels.flatten()
    start = 0
    for length in batch.sample_lengths:
        yield tokens[start : start + length], labels[start : start + length]
        start += length


def needed_flops(batches: list, spec) -> int:
    """As megatron-vl counts them: of the samples, forward and backward."""
    from megatron_vl.training.reporting.flops import step_flops

    return sum(
        sum(step_flops(
            spec, grids=[tuple(grid) for grid in batch.grid_thw.tolist()],
            lengths=batch.sample_lengths, trained=int((batch.labels != -100).sum()),
        )) for batch in batches
    )


def train(args, batches: list, image_token: int, *, recompute: bool) -> dict:
    """Steps on these batches, and what they took."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    timer = Timer(args.device)
    device = timer.device
    timer.forget()
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(args.inputs / args.model)
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.train()
    if recompute:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    make = {"padded": as_padded, "packed": as_packed}[args.way]
    ready, positions, trained = [], 0, 0
    for batch in batches:
        words = make(batch)
        words["pixel_values"] = batch.pixel_patches.bfloat16()
        words["image_grid_thw"] = batch.grid_thw
        words["mm_token_type_ids"] = (words["input_ids"] == image_token).int()
        positions += words["input_ids"].numel()
        trained += int((words["labels"] != -100).sum())
        ready.append({name: x.to(device) for name, x in words.items()})

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for words in ready:
            inputs = dict(words)
            labels = inputs.pop("labels")
            logits = model(**inputs, use_cache=False).logits
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
            ) / trained
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    losses, times = [], []
    for _ in range(args.steps):
        times.append(timer.once(lambda: losses.append(step())) / 1000)
    return dict(
        seconds=statistics.median(times[WARMUP:]), positions=positions, trained=trained,
        losses=[float(loss) for loss in losses], times=times,
        memory=timer.platform.peak_memory_bytes() / 2**30 if timer.runs_behind else 0.0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("way", choices=("padded", "packed"))
    parser.add_argument("--model", default="2b")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    results = Results(args.result)
    row = {"way": args.way, "model": args.model, "row_length": args.seq_length,
           "rows_a_step": args.rows}
    note = __doc__.split("\n\n", 2)[2].replace("\n", " ").strip()
    try:
        batches, spec = read_batches(args)
        try:
            found, recompute = train(args, batches, spec.tokens.image, recompute=False), "off"
        except RuntimeError as problem:
            if "out of memory" not in str(problem):  # makers have errors of their own for it
                raise
            print(f"again with gradient checkpointing: {first_line(problem)}", flush=True)
            gc.collect()
            found, recompute = train(args, batches, spec.tokens.image, recompute=True), "on"
    except Exception as problem:  # a row, whatever transformers or the device raises
        results.row("transformers", **row, error=first_line(problem), note=note)
        results.failed(f"transformers, {args.way}: {first_line(problem)}")
        raise
    tokens, seconds = sum(batch.num_tokens for batch in batches), found["seconds"]
    tflops = needed_flops(batches, spec) / seconds / 1e12
    ceiling = read_fact(args.result.parent, "probe", "matmul_tflops")
    results.row(
        "transformers", **row, gradient_checkpointing=recompute, median_step_s=seconds,
        tokens_per_s=tokens / seconds,
        TFLOP_per_s=tflops, MFU_of_measured=ceiling and tflops / ceiling,
        peak_memory_GiB=found["memory"], tokens_a_step=tokens,
        positions_a_step=found["positions"], trained_tokens_a_step=found["trained"],
        first_loss=found["losses"][0], last_loss=found["losses"][-1],
        steps_s=" ".join(f"{one:.2f}" for one in found["times"]), note=note,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
