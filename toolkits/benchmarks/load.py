"""Loading a Hugging Face directory into a running model against `cat` of its files, in turn.

    python load.py [--model-size 2B] [--tp 2] [--pp 2] [--dp 1] [--work DIR] [--repeat 3] [--cold]
                   [--quantize-base nf4]

Writes a random bfloat16 checkpoint of the published model's true shapes. Then, in turn: `cat` of
its files, and TP x PP x DP ranks that build the model and take their own slices, as `megatron-vl
train --load` does. Their time is the slowest rank's, from opening the files to the last parameter;
their memory is what the largest rank had in memory above its parameters while it built the model
and read, mapped parts of the files counted; with `--quantize-base` its parameters are codes and
scales, and the whole weights are counted above them. What they read is the sum of their slices, and
what the disk was asked for on their behalf. `--cold` takes the files out of the machine's memory
before each run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convert import evict, parser_of, write_checkpoint


def load(args) -> None:
    """One rank of `torchrun`; rank 0 prints what all of them needed."""
    import torch

    from megatron_vl.models.common.transformer_config import ModelOptions
    from megatron_vl.models.registry import family, load_spec
    from megatron_vl.ops.quantized import stored
    from megatron_vl.parallel import Layout
    from megatron_vl.platform import initialize
    from megatron_vl.training.checkpoint.weights import load_weights
    from megatron_vl.training.setup import wrap_for_data_parallel
    from megatron_vl.weights.convert import inspect_weights

    spec, layout = load_spec(args.work), Layout(tp=args.tp, pp=args.pp, dp=args.dp)
    split = spec.split(pp=args.pp)
    platform = initialize(layout, embedding_stage=split.embedding_chunk[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _status("VmRSS")
    chunks = family(spec.model_type).build_model(
        spec, layout, split, ModelOptions(initialize_weights=False, params_dtype=torch.bfloat16,
                                          quantize_base=args.quantize_base)
    )
    for parameter in (one for chunk in chunks for one in chunk.parameters()):
        parameter.requires_grad_(False)  # no gradient buffer
    model = wrap_for_data_parallel(chunks, platform.device(0), overlap_grad_reduce=False)
    from_disk = _from_disk()
    loaded = load_weights(inspect_weights(args.work), model, spec, layout, split)
    held = sum(part.nbytes for chunk in model for one in chunk.parameters() for part in stored(one))
    above = torch.tensor([held, _status("VmHWM") - before - held])
    torch.distributed.all_reduce(above, op=torch.distributed.ReduceOp.MAX)
    read = torch.tensor([sum(one.numel() * 2 for chunk in model for one in chunk.parameters()),
                         _from_disk() - from_disk])
    torch.distributed.all_reduce(read)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"seconds": loaded.seconds, "nbytes": loaded.nbytes,
                          "held": int(above[0]), "above": int(above[1]),
                          "all": int(read[0]), "disk": int(read[1])}))


def _status(name: str) -> int:
    """Bytes, of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines()
               if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _from_disk() -> int:
    """Bytes that this process made the machine read from a device, mapped ones too."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines()
               if line.startswith("read_bytes:"))
    return int(line.split()[1])


def measure(args, hf: Path) -> int:
    own = [__file__, "--model-size", args.model_size]
    print(f"writing a random Qwen2-VL {args.model_size} to {hf}", flush=True)
    subprocess.run([sys.executable, *own, "--work", hf, "--step", "write"], check=True)
    files = sorted(hf.glob("*.safetensors"))
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(args.tp * args.pp * args.dp), *own, "--tp", str(args.tp), "--pp", str(args.pp),
             "--dp", str(args.dp), "--work", str(hf), "--step", "load",
             *(["--quantize-base", args.quantize_base] if args.quantize_base else [])]
    seconds: dict[str, list[float]] = {"cat": [], "load": []}
    for number in range(args.repeat + 1):
        if args.cold:
            evict(hf)
        started = time.perf_counter()
        with open(os.devnull, "wb") as nowhere:
            subprocess.run(["cat", *files], check=True, stdout=nowhere)
        took = {"cat": time.perf_counter() - started}
        if args.cold:
            evict(hf)
        done = subprocess.run(ranks, check=True, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = json.loads(done.stdout.splitlines()[-1])
        took["load"] = found["seconds"]
        if number:  # the first round reads the files into memory
            for name, one in took.items():
                seconds[name].append(one)
            print(f"  round {number}: cat {took['cat']:.2f} s, load {took['load']:.2f} s",
                  flush=True)
    size = sum(path.stat().st_size for path in files)
    cat, taken = (statistics.median(seconds[name]) for name in ("cat", "load"))
    print(f"\nQwen2-VL {args.model_size}, TP {args.tp} PP {args.pp} DP {args.dp}, median of "
          f"{args.repeat}"
          f"{', read from the disk' if args.cold else ''}\n"
          f"cat of {size / 1e9:.2f} GB             {cat:8.2f} s\n"
          f"load by {args.tp * args.pp * args.dp} ranks            {taken:8.2f} s\n"
          f"load / cat                 {taken / cat:8.2f}\n"
          f"most that a rank read      {found['nbytes'] / 1e9:8.2f} GB\n"
          f"what all ranks read        {found['all'] / 1e9:8.2f} GB\n"
          f"of it from the disk        {found['disk'] / 1e9:8.2f} GB\n"
          f"parameters of a rank       {found['held'] / 2**20:8.0f} MiB\n"
          f"memory above parameters    {found['above'] / 2**20:8.0f} MiB")
    return 0


def main() -> int:
    parser = parser_of(__doc__, steps=("load",))
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--quantize-base", choices=("nf4", "int8"))
    args = parser.parse_args()
    if args.step == "write":
        write_checkpoint(args.work, args.model_size)
    elif args.step == "load":
        load(args)
    else:
        if args.work is not None:
            args.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="load-", dir=args.work) as scratch:
            return measure(args, Path(scratch) / "hf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
