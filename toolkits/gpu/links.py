"""How fast the devices of this machine send one another messages, by kind and size.

    python links.py RESULT.json [--device cuda] [--tiny]

One process a device; on a CPU two. Over several machines, each of which runs this, with N and M of
its own cluster, the links between them are measured too:

    torchrun --nnodes N --nproc-per-node M --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
        links.py RESULT.json

The rates are what `megatron-vl plan --calibrate` reads. A message's bytes are those that one rank
sends in it; all ranks send at once, but in `send`, where of each pair one sends and one receives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from results import Results

NAMES = {"node": "within the machine", "network": "between machines"}
MEGABYTES, TINY = (0.01, 0.1, 1.0, 10.0, 100.0), (0.01, 0.1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def seconds_of(
    call: Callable[[], object], platform, calls: int, before: Callable[[], object]
) -> float:
    """Median of a call, by this rank's clock; every rank of the call's group has to be here."""
    for _ in range(3):  # connections are made
        call()
    platform.synchronize()
    marks = []
    for _ in range(calls):
        before()
        start = platform.mark()
        call()
        marks.append((start, platform.mark()))
    platform.synchronize()
    return statistics.median(platform.seconds_between(*both) for both in marks)


def messages(group, numbers: int, device) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(kind, a message in which one rank sends about so many fp32 numbers, how many messages)."""
    import torch
    import torch.distributed as dist

    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    part = torch.zeros(max(1, numbers // (ranks - 1)), device=device)
    whole, other = (part.new_zeros(ranks * part.numel()) for _ in range(2))
    half = part.new_zeros(numbers * ranks // (2 * (ranks - 1)))
    sent = part.new_zeros(numbers)
    peer = rank ^ 1

    def there_and_back() -> None:
        if peer >= ranks:  # the last of an odd number
            return
        peer_of_all = dist.get_global_rank(group, peer)
        for do in (dist.send, dist.recv) if rank < peer else (dist.recv, dist.send):
            do(sent, peer_of_all, group)

    yield "all_gather", lambda: dist.all_gather_into_tensor(whole, part, group), 1
    yield "reduce_scatter", lambda: dist.reduce_scatter_tensor(part, whole, group=group), 1
    yield "all_reduce", lambda: dist.all_reduce(half, group=group), 1
    yield "all_to_all", lambda: dist.all_to_all_single(other, whole, group=group), 1
    yield "send", there_and_back, 2


def rates_by_kind(
    group, platform, device, megabytes: Sequence[float], *, calls: int = 20,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[tuple[float, float]]]:
    """Kind -> (10^6 bytes that a rank sends, 10^9 bytes a second), in the mean over ranks.

    Args:
        before: what a rank does before each message, and is not timed; a message then takes as long
            as ranks wait for one another too.
    """
    import torch
    import torch.distributed as dist

    found: dict[str, list[tuple[float, float]]] = {}
    for size in megabytes:
        for kind, call, number in messages(group, int(size * 1e6 / 4), device):
            seconds = torch.tensor(seconds_of(call, platform, calls, before), device=device)
            dist.all_reduce(seconds, group=group)
            mean = float(seconds) / dist.get_world_size(group) / number
            found.setdefault(kind, []).append((size, size / 1e3 / mean))
    return found


def measure(args: argparse.Namespace) -> None:
    """As one rank of those that torchrun has started."""
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames collectives
    import torch.distributed as dist
    from device import platform_of

    from megatron_vl.platform import connect

    platform = platform_of(args.device)
    rank, world, local, of_node = (int(os.environ[name]) for name in (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    device = platform.device(local)
    connect()
    nodes, rates = range(0, world, of_node), {}
    groups = {  # every rank makes every group
        "node": [range(first, first + of_node) for first in nodes],
        "network": [range(place, world, of_node) for place in range(of_node)],
    }
    for name, of in groups.items():
        if len(of[0]) == 1:
            continue
        made = [dist.new_group(list(ranks)) for ranks in of]
        mine = next(group for group, ranks in zip(made, of, strict=True) if rank in ranks)
        rates[name] = rates_by_kind(mine, platform, device, TINY if args.tiny else MEGABYTES)
    if rank == 0:
        results = Results(args.result)
        for name, kinds in rates.items():
            for kind, points in kinds.items():
                results.row(
                    "Links", links=NAMES[name], ranks=len(groups[name][0]), message=kind,
                    **{f"{size:g} MB": rate for size, rate in points},
                    note="GB/s that one rank sends, by the bytes that it sends in one message")
        results.fact(rates=rates)
        print(json.dumps({"rates": rates}))
    dist.destroy_process_group()


def main() -> int:
    args = parse_arguments()
    if "LOCAL_RANK" in os.environ:
        measure(args)
        return 0
    from device import platform_of

    ranks = 2 if args.device == "cpu" else platform_of(args.device).device_count()
    results = Results(args.result)
    if ranks < 2:
        results.row("Links", links="none: this machine has one device")
        return 0
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(ranks), *sys.argv]).returncode


if __name__ == "__main__":
    sys.exit(main())
