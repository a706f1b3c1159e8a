"""Our training step against transformers' own, on the same weights and samples, in one run.

    python train_step.py HF_DIR DATASET [--rows 4] [--seq-length 512] [--no-pack] [--steps 10]
                         [--threads 1] [--lora-rank R]

Ours is the step of `megatron-vl train` at TP1 PP1: packed rows, Megatron-Core's forward, backward,
clipping and AdamW; with --no-pack a row is one sample, as long as the longest of its microbatch.
Transformers gets the same samples as its users batch them, padded to the
longest, one batch per microbatch: forward with labels, backward, clipping, torch's fused AdamW.
It computes logits at all positions, ours at the trained ones; a third side is transformers with its
head at the trained positions alone, the same work. All run in fp32 with the same number of threads,
step by step in turn, so that noise of the machine meets all. Reported are the median seconds of a
step, tokens of samples (no padding) a second and the ratios; then the same and the largest resident
memory of further processes that run one side alone, transformers without anything of ours loaded
but the reader. The first losses must agree.

With --lora-rank an adapter of all the language model's linear layers is trained, by PEFT on
transformers' side, and a fourth side is our step that trains the weights themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

OURS, THEIRS, EQUAL = "ours", "transformers", "transformers, equal work"
FULL = "ours, all weights"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="prepared dataset")
    parser.add_argument("--rows", type=int, default=4, help="packed rows of a step (default: 4)")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="rows at once (default: 2)")
    parser.add_argument("--seq-length", type=int, default=512, help="of a row (default: 512)")
    parser.add_argument("--no-pack", action="store_true", help="one sample a row")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--lora-rank", type=int, metavar="R", help="train an adapter")
    parser.add_argument("--only", choices=(OURS, THEIRS, EQUAL, FULL), help=argparse.SUPPRESS)
    return parser.parse_args()


def read_batches(args) -> list:
    """The microbatches of one step, from the dataset as the trainer reads it."""
    from megatron_vl.data.load.config import DataConfig
    from megatron_vl.data.load.loader import build_train_loader
    from megatron_vl.data.load.mixture import Mixture
    from megatron_vl.models import family, load_spec

    config = DataConfig(
        train=Mixture.parse(str(args.dataset)), seq_length=args.seq_length, num_workers=0,
        micro_batch_size=args.micro_batch_size,
        packing_buffer_size=None if args.no_pack else 200,
        row_multiple=64,  # a plan's at TP1 PP1; packed rows are full
    )
    spec = load_spec(args.hf_dir)
    batches = iter(build_train_loader(
        config, hf_dir=args.hf_dir, spec=spec, family=family(spec.model_type)
    ))
    return [next(batches) for _ in range(args.rows // args.micro_batch_size)]


def our_step(args, batches, *, lora_rank: int | None = None):
    """A function that trains one step, of an adapter if it has a rank, and returns its loss."""
    import torch

    from megatron_vl.platform import initialize
    from megatron_vl.training.checkpoint.weights import load_weights
    from megatron_vl.training.options.config import TrainConfig
    from megatron_vl.training.plan import plan_run
    from megatron_vl.training.setup import build_model, build_optimizer
    from megatron_vl.training.step import mean_loss, run_batches
    from megatron_vl.weights.mcore_io import inspect_checkpoint

    config = TrainConfig.from_dict({
        "hf_config": str(args.hf_dir), "train_data_path": str(args.dataset), "lr": 1e-4,
        "min_lr": 1e-4, "lr_decay_style": "constant", "seq_length": args.seq_length,
        "micro_batch_size": args.micro_batch_size, "global_batch_size": args.rows,
        "use_distributed_optimizer": True, "weight_decay": 0.01, "fp32": True,
        **({} if lora_rank is None else {"lora_rank": lora_rank, "load": args.weights}),
    })
    plan = plan_run(config, 1)
    platform = initialize(plan.layout)
    model = build_model(plan, platform, initialize_weights=False)
    load_weights(
        inspect_checkpoint(args.weights), model, plan.spec, plan.layout, plan.split
    )
    optimizer, _ = build_optimizer(plan, model, platform)

    def step() -> float:
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run_batches(model, batches, "cpu")
        optimizer.step()
        return mean_loss(losses, torch.device("cpu"))[0]

    return step


def transformers_step(args, batches, *, head_everywhere: bool = True):
    """The same with transformers' model and torch's optimizer."""
    import torch
    import transformers
    from torch.nn.utils.rnn import pad_sequence

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        args.hf_dir, dtype=torch.float32, attn_implementation="sdpa"
    )
    image = model.config.image_token_id
    head, body = model.lm_head, model.model
    if args.lora_rank is not None:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(
            r=args.lora_rank, lora_alpha=2 * args.lora_rank,
            target_modules=rf".*language_model.*\.({'|'.join(LAYERS)})",
        ))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    padded = []
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        tokens, labels = batch.tokens.flatten(), batch.labels.flatten()
        samples = [(tokens[a:b], labels[a:b]) for a, b in pairwise(bounds)
                   if (labels[a:b] != -100).any()]  # a row's padding trains nothing
        ids = pad_sequence([t for t, _ in samples], batch_first=True)
        mask = pad_sequence([torch.ones_like(t) for t, _ in samples], batch_first=True)
        targets = pad_sequence([x for _, x in samples], batch_first=True, padding_value=-100)
        padded.append((ids, mask, targets, batch.pixel_patches, batch.grid_thw))
    trained = sum(int((targets != -100).sum()) for _, _, targets, _, _ in padded)

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for ids, mask, targets, patches, grids in padded:
            inputs = dict(
                input_ids=ids, attention_mask=mask, pixel_values=patches, image_grid_thw=grids,
                mm_token_type_ids=(ids == image).int(), use_cache=False,
            )
            if head_everywhere:
                logits = model(**inputs).logits.flatten(0, 1)
                targets = targets.flatten()
            else:
                at = targets != -100
                logits = head(body(**inputs).last_hidden_state[at])
                targets = targets[at]
            loss = torch.nn.functional.cross_entropy(
                logits, targets, ignore_index=-100, reduction="sum"
            ) / trained
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def sides(args) -> dict:
    """What is timed; with an adapter also our step without one."""
    found = {
        THEIRS: transformers_step,
        EQUAL: partial(transformers_step, head_everywhere=False),
        OURS: partial(our_step, lora_rank=args.lora_rank),
    }
    return found if args.lora_rank is None else found | {FULL: our_step}


def convert(args, directory: str) -> None:
    """HF_DIR as the weights of one rank, by the public command."""
    command = [sys.executable, "-m", "megatron_vl", "convert", str(args.hf_dir), directory,
               "--dtype", "float32"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def alone(side: str) -> dict:
    """Largest resident bytes, and median seconds of a step, of a process that runs only `side`."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(args) -> None:
    # Both read the data in this process; what is compared is the larger peak of the step.
    step = sides(args)[args.only](args, read_batches(args))
    seconds = []
    for _ in range(args.steps + 2):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    # Not getrusage's: that of a new process begins with what its parent held.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    print(json.dumps({"peak_bytes": peak, "seconds": statistics.median(seconds[2:])}))


def main() -> int:
    args = parse_arguments()
    if args.rows % args.micro_batch_size:
        print(f"--rows {args.rows} is not a multiple of --micro-batch-size "
              f"{args.micro_batch_size}.", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import tempfile

    if args.only in (None, OURS, FULL):
        from megatron_vl.platform import select_platform

        select_platform().install()
    import torch

    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        args.weights = f"{scratch}/weights"
        convert(args, args.weights)
        if args.only:
            run_alone(args)
            return 0
        batches = read_batches(args)
        tokens = sum(batch.num_tokens for batch in batches)
        steps = {name: make(args, batches) for name, make in sides(args).items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(args.steps + 2):
            for name, step in steps.items():
                started = time.perf_counter()
                losses[name].append(step())
                if number >= 2:  # the first steps fill caches
                    seconds[name].append(time.perf_counter() - started)
    images = sum(batch.num_images for batch in batches)
    print(f"{tokens:,} tokens, {images} images in {args.rows} rows a step; {args.threads} thread(s)"
          f"; torch {torch.__version__}")
    print(f"{'':<26} {'s/step':>8} {'tokens/s':>10} {'alone s/step':>13} {'peak MiB':>9} "
          f"{'first loss':>11} {'last loss':>10}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    by_itself = {name: alone(name) for name in steps}
    for name in steps:
        print(f"{name:<26} {median[name]:>8.3f} {tokens / median[name]:>10,.0f} "
              f"{by_itself[name]['seconds']:>13.3f} {by_itself[name]['peak_bytes'] / 2**20:>9,.0f} "
              f"{losses[name][0]:>11.5f} {losses[name][-1]:>10.5f}")
    others = [name for name in steps if name != OURS]
    for theirs in others:
        ratio = median[theirs] / median[OURS]
        ratio_alone = by_itself[theirs]["seconds"] / by_itself[OURS]["seconds"]
        print(f"ratio of tokens/s, {OURS} to {theirs}: {ratio:.2f} in turn, "
              f"{ratio_alone:.2f} alone")
    first = losses[OURS][0]
    if any(not abs(first - losses[name][0]) <= 1e-4 * first for name in others):
        print("the first losses differ: the sides did not compute the same.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
