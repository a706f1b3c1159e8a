"""What the device refuses and what it counts, row by row.

    python rows.py

prints, as JSON, by name: what was said of a refused row, how often the host waited in another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

SHADOW = Path(__file__).resolve().parent
sys.path[:0] = [str(SHADOW.parent)]

from shadow import device  # noqa: E402

# Of x and y, float [4, 3] on the device, and h, the like on the host.
REFUSED = {
    "an operation on both sides": lambda x, y, h: x + h,
    "in place": lambda x, y, h: x.mul_(h),
    "in a list": lambda x, y, h: torch.cat([x, h]),
    "an index from the host": lambda x, y, h: x.index_select(0, torch.tensor([1])),
    "a number from the host where none is computed with": lambda x, y, h: torch.stack(
        [x.sum(), torch.tensor(1.0)]),
    "data of the host": lambda x, y, h: setattr(x, "data", h),
    "numpy": lambda x, y, h: x.numpy(),
    "a host's tensor in a group of the device": lambda x, y, h: torch.distributed.all_reduce(h),
    "a device's tensor in a group of the host": lambda x, y, h: torch.distributed.all_reduce(
        x, group=of_host()),
}
WAITS = {
    "computing": (0, lambda x, y, h: (x @ y.t()).softmax(-1).sum().mul(2.0)),
    "a number of the host": (0, lambda x, y, h: x * torch.tensor(2.0)),
    "a collective": (0, lambda x, y, h: torch.distributed.all_reduce(x)),
    "a copy that goes on behind": (0, lambda x, y, h: h.to(x.device, non_blocking=True)),
    "a copy into place that goes on behind": (0, lambda x, y, h: x.copy_(h, non_blocking=True)),
    "a copy that stays": (0, lambda x, y, h: y.copy_(x)),
    "a number put where a mask is": (0, lambda x, y, h: x.__setitem__(x > 0, 0.0)),
    "there": (1, lambda x, y, h: h.to(x.device)),
    "back": (1, lambda x, y, h: x.cpu()),
    "into a tensor of the host": (1, lambda x, y, h: h.copy_(x)),
    "a new tensor": (1, lambda x, y, h: torch.tensor([1, 2], device=x.device)),
    "a number read": (1, lambda x, y, h: x.sum().item()),
    "a float": (1, lambda x, y, h: float(x[0, 0])),
    "a condition": (1, lambda x, y, h: bool((x > 0).any())),
    "a list": (1, lambda x, y, h: x.tolist()),
    "places": (1, lambda x, y, h: x.nonzero()),
    "a mask": (1, lambda x, y, h: x[x > 0]),
    "numbers put where a mask is": (1, lambda x, y, h: x.__setitem__(x > 9, x[0, :0])),
    "a mask's numbers": (1, lambda x, y, h: x.masked_select(x > 0)),
    "a comparison": (1, lambda x, y, h: torch.equal(x, y)),
    "a repetition of unknown length": (
        1, lambda x, y, h: x.repeat_interleave(torch.ones_like(x[:, 0], dtype=torch.int64), 0)),
    "a repetition of known length": (0, lambda x, y, h: x.repeat_interleave(2, dim=0)),
    "a synchronization": (1, lambda x, y, h: torch.npu.synchronize()),
}  # fmt: skip


def of_host():
    return torch.distributed.new_group(backend="gloo")


def main() -> None:
    sys.path[:0] = [str(SHADOW / "site")]
    import torch_npu  # noqa: F401

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(device.BACKEND, rank=0, world_size=1, store=store)

    def tensors() -> list[torch.Tensor]:
        torch.manual_seed(0)
        host = torch.randn(4, 3)
        return [host.to(device.TYPE), host.to(device.TYPE), host]

    found = {}
    for name, row in REFUSED.items():
        try:
            found[name] = f"gives {row(*tensors())}"
        except (RuntimeError, TypeError) as error:
            found[name] = f"refused: {error}"
    for name, (_, row) in WAITS.items():
        given = tensors()
        device.waits.clear()
        row(*given)
        found[name] = device.waits.total()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
