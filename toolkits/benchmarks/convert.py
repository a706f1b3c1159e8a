"""Conversion against `cp -r` of the same bytes and against the naive way, in one run.

    python convert.py [--model-size 2B] [--tp 2] [--pp 2] [--work DIR] [--repeat 3] [--no-naive]
                      [--cold]

Writes a random bfloat16 checkpoint of the published model's true shapes, then times, in turn and
each in a process of its own: `megatron-vl convert` to Megatron-Core and back, `cp -r` of what each
of them writes, and the naive way of both: transformers' `from_pretrained`, cutting in memory,
`torch.save`; and back by `torch.load`, joining, `save_pretrained`. Given are medians, the ratio to
`cp -r` of the same bytes, and the resident memory of a process and its workers together, looked at
every 20 milliseconds, what they share counted for each.
Before each run what is still to be written to the disk is waited for, and no run is timed before
its source has been read once: every side finds it in the machine's memory as far as that goes.
Where it does not go far enough, a run finds what the one before it left there; `--cold` takes the
sources out of memory before each run, so that every side reads all of it from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# layers, width, heads, key/value heads, ffn, vocabulary, tied, vision layers: of the published
# config.json; "tiny" is to see that this script runs
PUBLISHED = {
    "2B": (28, 1536, 12, 2, 8960, 151936, True, 32),
    "7B": (28, 3584, 28, 4, 18944, 152064, False, 32),
    "tiny": (2, 256, 2, 2, 512, 151936, True, 1),
}
SHARD = 4 * 10**9  # bytes of a published file
NAIVE = ("naive to mcore", "naive to hf")


def parser_of(document: str, *, steps: tuple[str, ...]) -> argparse.ArgumentParser:
    """The arguments of a measurement on a checkpoint of published shapes; `steps` are its own."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--model-size", choices=PUBLISHED, default="2B")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks (default: 2)")
    parser.add_argument("--pp", type=int, default=2, help="pipeline stages (default: 2)")
    parser.add_argument("--work", type=Path, help="directory on the disk to measure")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--cold", action="store_true", help="read the sources from the disk")
    parser.add_argument("--step", choices=("write", *steps), help=argparse.SUPPRESS)
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, steps=NAIVE)
    parser.add_argument("--workers", type=int, default=2, help="converter's processes (default: 2)")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive way out")
    return parser.parse_args()


# ---- the checkpoint -----------------------------------------------------------------------------


def published_config(size: str) -> dict:
    layers, width, heads, groups, ffn, vocab, tied, vision_layers = PUBLISHED[size]
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocab,
        "tie_word_embeddings": tied, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 32768, "initializer_range": 0.02, "torch_dtype": "bfloat16",
        "use_sliding_window": False, "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653, "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_config": {
            "depth": vision_layers, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16,
            "in_chans": 3, "hidden_size": width, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def write_checkpoint(directory: Path, size: str) -> None:
    """A random model, file by file."""
    import torch
    from safetensors.torch import save_file

    from megatron_vl.models.registry import family, load_spec

    directory.mkdir(parents=True)
    config = published_config(size)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    spec = load_spec(directory)
    noise = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    groups: list[dict] = [{}]
    filled = total = 0
    for number, (name, shape) in enumerate(
        family(spec.model_type).weight_map(spec).published().items()
    ):
        numel = torch.Size(shape).numel()
        # One block of noise, begun elsewhere in each tensor: drawing takes longer than writing.
        first = number * 7919 % noise.numel()
        blocks = noise.repeat(1 + -(-numel // noise.numel()))
        tensor = blocks[first : first + numel].clone().reshape(shape)
        if filled and filled + tensor.nbytes > SHARD:
            groups.append({})
            _write_group(directory, groups, save_file)
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
    groups.append({})
    _write_group(directory, groups, save_file)
    index = {name: file for file, names in enumerate(groups[:-1], 1) for name in names}
    count = len(groups) - 1
    for number in range(1, count + 1):
        (directory / f"part-{number}").rename(directory / _shard_name(number, count))
    if count > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({
            "metadata": {"total_size": total},
            "weight_map": {name: _shard_name(file, count) for name, file in index.items()},
        }))


def _write_group(directory: Path, groups: list, save_file) -> None:
    """Writes the last full group and keeps its names alone."""
    save_file(groups[-2], directory / f"part-{len(groups) - 1}", {"format": "pt"})
    groups[-2] = list(groups[-2])


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


# ---- the naive way ------------------------------------------------------------------------------


def naive_to_mcore(source: Path, target: Path, args) -> None:
    import torch
    import transformers

    from megatron_vl.models.registry import family, load_spec
    from megatron_vl.parallel import Layout

    spec = load_spec(source)
    model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)
    published = {_published(name): tensor for name, tensor in model.state_dict().items()}
    split = spec.split(pp=args.pp)
    ranks: dict[str, dict] = {}
    weights = family(spec.model_type).weight_map(spec)
    for stored in weights.mcore_inventory(split=split, layout=Layout(tp=args.tp, pp=args.pp)):
        tensor = torch.zeros(stored.shape, dtype=torch.bfloat16)
        for piece in stored.pieces:
            if piece.key is not None:
                tensor[_box(piece.at, piece.shape)] = published[piece.key][
                    _box(piece.start, piece.shape)]
        ranks.setdefault(stored.file, {})[stored.name] = tensor
    for file, tensors in ranks.items():
        path = target / "release" / file
        path.parent.mkdir(parents=True)
        torch.save({"model": tensors}, path)


def naive_to_hf(source: Path, target: Path, args) -> None:
    import torch
    import transformers

    from megatron_vl.models.registry import family, load_spec
    from megatron_vl.parallel import Layout

    hf = args.work / "hf"
    spec = load_spec(hf)
    weights = family(spec.model_type).weight_map(spec)
    with torch.serialization.safe_globals([argparse.Namespace]):  # of its `args`
        ranks = {
            str(path.relative_to(source / "release")): torch.load(path, weights_only=True)["model"]
            for path in (source / "release").glob("mp_rank_*/model_optim_rng.pt")
        }
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16)
               for name, shape in weights.published().items()}
    split, layout = spec.split(pp=args.pp), Layout(tp=args.tp, pp=args.pp)
    for stored in weights.mcore_inventory(split=split, layout=layout):
        for piece in stored.pieces:
            if piece.key is not None:
                tensors[piece.key][_box(piece.start, piece.shape)] = ranks[stored.file][
                    stored.name][_box(piece.at, piece.shape)]
    config = transformers.AutoConfig.from_pretrained(hf)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    names = {_published(name): name for name in model.state_dict()}
    state = {names[name]: tensor for name, tensor in tensors.items()}
    if spec.decoder.tie_word_embeddings:
        state["lm_head.weight"] = state[names["model.embed_tokens.weight"]]
    model.load_state_dict(state, strict=False, assign=True)
    model.save_pretrained(target)


def _published(name: str) -> str:
    name = name.replace("model.visual.", "visual.", 1)
    return name.replace("model.language_model.", "model.", 1)


def _box(start, shape) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


# ---- the run ------------------------------------------------------------------------------------


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, largest resident bytes of its whole tree) of one process."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()[-2000:]}")
    return seconds, peak


def evict(*directories: Path) -> None:
    """Take the files' bytes out of the machine's memory; what is on the disk stays."""
    os.sync()
    for path in (path for directory in directories for path in directory.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(pid: int) -> int:
    """Resident bytes of a process and of those it started; 0 of one that has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in children)


def main() -> int:
    args = parse_arguments()
    if args.step == "write":
        write_checkpoint(args.work / "hf", args.model_size)
        return 0
    if args.step is not None:
        way = naive_to_mcore if args.step == NAIVE[0] else naive_to_hf
        way(args.work / ("hf" if way is naive_to_mcore else "mcore"), args.work / "out", args)
        return 0
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.work) as scratch:
        return measure(args, Path(scratch))


def measure(args, work: Path) -> int:
    hf, mcore, out = work / "hf", work / "mcore", work / "out"
    print(f"writing a random Qwen2-VL {args.model_size} to {hf}", flush=True)
    # In a process of its own: what this one holds would count as its children's.
    own = [sys.executable, __file__, "--work", str(work), "--model-size", args.model_size]
    subprocess.run([*own, "--step", "write"], check=True)
    nbytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    free, needed = shutil.disk_usage(work).free, int(2.5 * nbytes)
    if free < needed:
        print(f"{work} has {free:,} bytes free, {needed:,} are needed; give --work a larger "
              f"disk.", file=sys.stderr)
        return 2
    convert = [sys.executable, "-m", "megatron_vl", "convert", "--workers", str(args.workers)]
    layout = ["--tp", str(args.tp), "--pp", str(args.pp)]
    naive = [*own, *layout, "--step"]
    commands = {
        "cp -r mcore": ["cp", "-r", str(mcore), str(out)],
        "convert to mcore": [*convert, str(hf), str(out), *layout],
        "cp -r hf": ["cp", "-r", str(hf), str(out)],
        "convert to hf": [*convert, str(mcore), str(out)],
    }
    if not args.no_naive:
        commands |= {name: [*naive, name] for name in NAIVE}
    timed([*convert, str(hf), str(mcore), *layout])  # the source of the way back
    sizes = {directory.name: sum(path.stat().st_size for path in directory.rglob("*")
                                 if path.is_file()) for directory in (hf, mcore)}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory = dict.fromkeys(commands, 0)
    for number in range(args.repeat + 1):
        for name, command in commands.items():
            if args.cold:
                evict(hf, mcore)
            took, peak = timed(command)
            shutil.rmtree(out)
            if number:  # the first round reads the sources into memory
                seconds[name].append(took)
                memory[name] = max(memory[name], peak)
                print(f"  round {number}: {name} {took:.1f} s", flush=True)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\nQwen2-VL {args.model_size}, TP {args.tp} PP {args.pp}, median of {args.repeat}"
          f"{', sources read from the disk' if args.cold else ''}\n"
          f"{'':<18} {'GB':>6} {'seconds':>8} {'GB/s':>6} {'x cp -r':>8} {'peak MiB':>9}")
    for name, took in middle.items():
        kind = name.split()[-1]
        size = sizes[kind] / 1e9
        print(f"{name:<18} {size:>6.2f} {took:>8.1f} {size / took:>6.2f} "
              f"{took / middle[f'cp -r {kind}']:>8.2f} {memory[name] / 2**20:>9,.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
