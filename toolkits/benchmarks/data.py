"""The data loader against its floor: decoding and transformers' image processor alone, same images.

    python data.py HF_DIR DATASET [--samples 1000] [--rounds 9] [--memory-samples 20000]

HF_DIR is a model's directory, DATASET what `megatron-vl prepare` wrote. One process with one thread
takes turns: the floor decodes the samples' images with PIL and hands them to transformers' PIL
image processor; the loader reads, tokenises, packs, decodes and lays out rows of the same samples.
Given are samples a second of both, their ratio, how full the packed rows are, and the resident
memory of a data worker while it reads `--memory-samples`.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import os
import statistics
import sys
import tarfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from PIL import Image

from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.models import family, load_spec


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_dir", metavar="HF_DIR", type=Path)
    parser.add_argument("dataset", metavar="DATASET", type=Path)
    parser.add_argument("--samples", type=int, default=1000, help="of a round (default: 1000)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: 9)")
    parser.add_argument("--seq-length", type=int, default=2048, help="(default: 2048)")
    parser.add_argument("--memory-samples", type=int, default=20_000, help="0 leaves it out")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    import torch
    from transformers import AutoImageProcessor

    torch.set_num_threads(1)
    spec = load_spec(args.hf_dir)
    config = DataConfig(
        train=Mixture.parse(str(args.dataset)), seq_length=args.seq_length, num_workers=0,
        shuffle_buffer_size=0,
    )
    processor = AutoImageProcessor.from_pretrained(args.hf_dir, backend="pil")
    images = read_images(args.dataset, args.samples)
    model = {"hf_dir": args.hf_dir, "spec": spec, "family": family(spec.model_type)}
    loader = build_train_loader(config, **model)
    batches = iter(loader)
    next(batches)  # the first fills the packing buffer
    gc.collect()
    gc.freeze()  # as a worker of the loader is, for both
    floor, ours, fill = [], [], []
    for number in range(args.rounds):
        floor.append(time_floor(processor, images))
        rate, full = time_loader(batches, args.samples, args.seq_length)
        ours.append(rate)
        fill.append(full)
        print(f"  round {number + 1}: floor {floor[-1]:,.0f} samples/s, loader {ours[-1]:,.0f}",
              flush=True)
    loader.close()
    ratio = statistics.median(one / two for one, two in zip(ours, floor, strict=True))
    print(f"\n{args.dataset}, {args.samples:,} samples a round, median of {args.rounds}, one core\n"
          f"floor (PIL and transformers' processor)  {statistics.median(floor):>9,.0f} samples/s\n"
          f"loader (all of it)                       {statistics.median(ours):>9,.0f} samples/s\n"
          f"loader / floor                           {ratio:>9.2f}\n"
          f"rows of {args.seq_length} tokens are filled to      {100 * min(fill):>9.1f} %")
    if args.memory_samples:
        watch_memory(config, args, spec)
    return 0


def read_images(dataset: Path, count: int) -> list[bytes]:
    """The files of the first images in the shards, one a sample."""
    found = []
    for shard in sorted(dataset.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    found.append(tar.extractfile(member).read())
                    if len(found) == count:
                        return found
    return found


def time_floor(processor, images: list[bytes]) -> float:
    started = time.perf_counter()
    for data in images:
        processor(images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt")
    return len(images) / (time.perf_counter() - started)


def time_loader(batches, count: int, length: int) -> tuple[float, float]:
    """Samples a second, and the share of the rows that samples fill."""
    started, seen, tokens, rows = time.perf_counter(), 0, 0, 0
    while seen < count:
        batch = next(batches)
        seen += batch.num_samples
        tokens += batch.num_tokens
        rows += batch.tokens.shape[0]
    return seen / (time.perf_counter() - started), tokens / (rows * length)


def watch_memory(config: DataConfig, args, spec) -> None:
    """The resident memory of a worker process, as it reads."""
    from dataclasses import replace

    loader = build_train_loader(
        replace(config, num_workers=1), hf_dir=args.hf_dir, spec=spec,
        family=family(spec.model_type),
    )
    seen, marks = 0, [args.memory_samples * part // 10 for part in range(1, 11)]
    print(f"\nresident memory of a worker over {args.memory_samples:,} samples")
    for batch in loader:
        seen += batch.num_samples
        if seen >= marks[0]:
            (worker,) = children(os.getpid())
            pages = int(Path(f"/proc/{worker}/statm").read_text().split()[1])
            print(f"  {seen:>7,} samples {pages * os.sysconf('SC_PAGE_SIZE') / 2**20:>7,.0f} MiB",
                  flush=True)
            marks = [mark for mark in marks if mark > seen]
        if not marks:
            break
    loader.close()


def children(pid: int) -> list[int]:
    """Processes that a process started and that compute: torch keeps a helper without memory."""
    found = itertools.chain.from_iterable(
        path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")
    )
    workers = [int(child) for child in found]
    return [max(workers, key=lambda child: Path(f"/proc/{child}/statm").read_text().split()[1])]


if __name__ == "__main__":
    sys.exit(main())
