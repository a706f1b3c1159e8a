"""What a trace of torch's profiler says: kernels by time, idle device, waits of the host."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path

from results import Results

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize",
         "hipStreamSynchronize", "hipDeviceSynchronize", "hipEventSynchronize",
         "cudaMemcpy", "hipMemcpy")
KEPT = (*DEVICE, "cuda_runtime", "cuda_driver", "user_annotation")
LARGEST = 15_000_000  # bytes of the trace that is kept
TOP = 20


def read_traces(results: Results, folder: Path, steps: int = 2) -> None:
    """Tables of the only trace in `folder`, and beside the result a smaller copy of it."""
    files = sorted(folder.glob("*.json.gz"))
    if not files:
        results.failed(f"no trace in {folder}")
        return
    with gzip.open(files[0], "rt") as file:
        trace = json.load(file)
    events = [one for one in trace["traceEvents"] if one.get("ph") == "X" and "dur" in one]
    on_device = [one for one in events if one.get("cat") in DEVICE]
    if on_device:
        device_tables(results, events, on_device, steps)
    else:
        operator_table(results, [one for one in events if one.get("cat") == "cpu_op"])
    keep_small(trace, results.path.with_name("trace.json.gz"))


def device_tables(results: Results, events: list, on_device: list, steps: int) -> None:
    span, busy = busy_time(on_device)
    waits = defaultdict(lambda: [0, 0.0])
    for one in events:
        if one.get("cat") in ("cuda_runtime", "cuda_driver") and one["name"] in WAITS:
            waits[one["name"]][0] += 1
            waits[one["name"]][1] += one["dur"]
    back = [one for one in on_device
            if one["cat"] == "gpu_memcpy" and "DtoH" in one["name"]]
    forth = [one for one in on_device
             if one["cat"] == "gpu_memcpy" and "HtoD" in one["name"]]
    launches = sum(one["cat"] == "kernel" for one in on_device)
    results.fact(idle_share=1 - busy / span, kernels_a_step=launches / steps)
    for what, value in (
        ("device busy, part of the traced span", f"{busy / span:.1%}"),
        ("device idle, part of the traced span", f"{1 - busy / span:.1%}"),
        ("traced span, ms a step", f"{span / 1000 / steps:.1f}"),
        ("kernels a step", f"{launches / steps:,.0f}"),
        ("copies to the host a step", f"{len(back) / steps:,.1f}"),
        ("copies to the device a step",
         f"{len(forth) / steps:,.1f}, {sum(o['dur'] for o in forth) / 1000 / steps:.1f} ms"),
        *((f"{name} a step", f"{count / steps:,.1f}, {us / 1000 / steps:.1f} ms")
          for name, (count, us) in sorted(waits.items())),
    ):
        results.row("Traced steps", what=what, value=value)
    by_name: dict[str, list] = defaultdict(lambda: [0, 0.0])
    for one in on_device:
        by_name[one["name"]][0] += 1
        by_name[one["name"]][1] += one["dur"]
    total = sum(us for _, us in by_name.values())
    for name, (count, us) in sorted(by_name.items(), key=lambda x: -x[1][1])[:TOP]:
        results.row("Kernels by time", kernel=name[:160], calls_a_step=count / steps,
                    ms_a_step=us / 1000 / steps, share=us / total,
                    note="of the time of all kernels and copies in the traced steps")
    for kind, share in sorted(shares(by_name).items(), key=lambda x: -x[1]):
        results.row("Kernels by kind", kind=kind, ms_a_step=share / 1000 / steps,
                    share=share / total)


def shares(by_name: dict[str, list]) -> dict[str, float]:
    """Microseconds by what a kernel's name tells it is."""
    kinds = (
        ("attention", ("flash", "fmha", "attention", "cudnn_generated")),
        ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "wgmma", "xmma", "splitk")),
        ("compiled by torch", ("triton_",)),
        ("norms", ("norm",)),
        ("optimizer", ("adam", "multi_tensor")),
        ("copies and fills", ("memcpy", "memset", "copy", "fill", "catarray")),
        ("reductions", ("reduce",)),
        ("elementwise", ("elementwise",)),
        ("collectives", ("nccl", "rccl")),
    )
    found: dict[str, float] = defaultdict(float)
    for name, (_, us) in by_name.items():
        low = name.lower()
        kind = next((kind for kind, words in kinds if any(word in low for word in words)), "other")
        found[kind] += us
    return dict(found)


def busy_time(on_device: list) -> tuple[float, float]:
    """(span from the first to the last, time in which anything ran), microseconds."""
    intervals = sorted((one["ts"], one["ts"] + one["dur"]) for one in on_device)
    busy, reached = 0.0, intervals[0][0]
    for start, end in intervals:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return max(reached - intervals[0][0], 1e-9), busy


def operator_table(results: Results, operators: list) -> None:
    """Without a device: operators by the time in themselves."""
    own: dict[str, list] = defaultdict(lambda: [0, 0.0])
    stacks: dict[object, list] = defaultdict(list)
    for one in sorted(operators, key=lambda x: (x["ts"], -x["dur"])):
        stack = stacks[one["tid"]]
        while stack and stack[-1][0] <= one["ts"]:
            stack.pop()
        if stack:
            own[stack[-1][1]][1] -= one["dur"]
        own[one["name"]][0] += 1
        own[one["name"]][1] += one["dur"]
        stack.append((one["ts"] + one["dur"], one["name"]))
    total = sum(us for _, us in own.values()) or 1.0
    for name, (count, us) in sorted(own.items(), key=lambda x: -x[1][1])[:TOP]:
        results.row("Kernels by time", kernel=name, calls=count, ms=us / 1000, share=us / total,
                    note="no device was traced: operators of the CPU, without what they call")


def keep_small(trace: dict, path: Path) -> None:
    """The device's side of the trace and the calls that started it, without arguments."""
    kept = [
        {key: one[key] for key in ("ph", "cat", "name", "pid", "tid", "ts", "dur", "id", "bp", "s")
         if key in one}
        for one in trace["traceEvents"]
        if one.get("cat") in KEPT or one.get("ph") == "M"
    ]
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": kept}).encode(), 6))
    if path.stat().st_size > LARGEST:
        path.unlink()
