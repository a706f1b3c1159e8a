"""What the device refuses and counts, and what its platform answers and says, row by row.

    python rows.py

prints, as JSON, by name: what was said of a refused row, how often the host waited in another, what
a third gave.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch

SHADOW = Path(__file__).resolve().parent
sys.path[:0] = [str(SHADOW.parent)]

from shadow import device  # noqa: E402


def drawn(seed: int) -> list[float]:
    """By a generator of the CPU."""
    return torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()


def drawn_here() -> list[float]:
    return torch.rand(3, device="npu").tolist()


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
    "a sum of float64": lambda x, y, h: torch.distributed.reduce(
        torch.zeros(1, dtype=torch.float64, device="npu"), 0),
    "a bitwise sum": lambda x, y, h: torch.distributed.all_reduce(
        x.int(), op=torch.distributed.ReduceOp.BOR),
    "a norm in float64": lambda x, y, h: torch._foreach_norm([x], 2, dtype=torch.float64),
    "an operator of the vendor's on the host": lambda x, y, h: sys.modules["torch_npu"].npu_gelu(h),
    "another process's device": lambda x, y, h: torch.npu.set_device(1),
    "time between events that tell none": lambda x, y, h: torch.npu.Event().elapsed_time(
        torch.npu.Event()),
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




def seeded(seed: int):
    from megatron_vl.platform.init import seed_everything

    seed_everything(seed)
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def in_tracker(then_outside: bool) -> list[float]:
    with seeded(7).fork():
        inside = drawn_here()
    return drawn_here() if then_outside else inside


def cpu_beside_the_device() -> list[float]:
    """Which has drawn less often than the device afterwards."""
    torch.manual_seed(7)
    drawn_here()
    drawn_here()
    return torch.rand(3).tolist()


def again() -> bool:
    from megatron_vl.platform import device_random_state, set_device_random_state

    cpu_beside_the_device()
    state = device_random_state()
    first = drawn_here()
    set_device_random_state(state)
    return drawn_here() == first


def reduced(op) -> list:
    """Of float64, which float32 could not hold."""
    numbers = torch.tensor([[1 / 3], [2.0**53 - 1]], dtype=torch.float64, device="npu")
    torch.distributed.all_reduce(numbers, op=op)
    return [str(numbers.dtype), numbers.tolist()]


def timed() -> bool:
    start, end = platform().mark(), platform().mark()
    platform().synchronize()
    return 0 <= platform().seconds_between(start, end) < 1


def in_stream() -> bool:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        return torch.cuda.current_stream() is stream


def platform():
    from megatron_vl.platform import select_platform

    return select_platform()


def gelu(form: str, own: bool) -> bool:
    """Whether it has that form, forward and backward, by torch or by the vendor's operator."""
    host = torch.linspace(-3, 3, 7, requires_grad=True)
    here = host.detach().to("npu").requires_grad_()
    expected = torch.nn.functional.gelu(host, approximate=form)
    found = (sys.modules["torch_npu"].npu_gelu if own else torch.nn.functional.gelu)(here)
    expected.square().sum().backward()
    found.square().sum().backward()
    return torch.equal(found.detach().cpu(), expected) and torch.equal(here.grad.cpu(), host.grad)


def hidden() -> str:
    with patch.dict(os.environ, ASCEND_RT_VISIBLE_DEVICES=""):
        return platform().name


FLOAT64 = ["torch.float64", [[1 / 3], [2.0**53 - 1]]]
GIVES = {
    "the platform": ("npu", lambda: platform().name),
    "the platform where nobody may see one": ("cpu", hidden),
    "the backend": ("hccl", lambda: torch.distributed.get_backend()),
    "the current device": ("npu:0", lambda: str(torch.cuda.current_device())),
    "a tensor on CUDA": ("npu:0", lambda: str(torch.zeros(1, device="cuda").device)),
    "its type to Megatron-Core": ("torch.cuda.FloatTensor", lambda: eval(
        "x.type()", {"__name__": "megatron.core", "x": torch.zeros(1, device="npu")})),
    "formats and programs": ([False, [False]], lambda: [
        torch.npu.config.allow_internal_format, torch.npu.compile_modes]),
    "a capability to compare": (0, lambda: torch.cuda.get_device_capability()[0]),
    "a tensor made float64": ("torch.float32", lambda: str(
        torch.zeros(1, device="npu").double().dtype)),
    "a stream": (True, in_stream),
    "a time": (True, timed),
    "memory": (True, lambda: platform().peak_memory_bytes() > 2**20),
    "its name": ("Ascend910B2", lambda: platform().device_name()),
    "numbers of the tracker": (drawn(7 + 2718), lambda: in_tracker(False)),
    "numbers behind the tracker": (drawn(7), lambda: in_tracker(True)),
    "numbers of the CPU": (drawn(7), cpu_beside_the_device),
    "numbers of a state that was kept": (True, again),
    "torch's gelu": (True, lambda: gelu("tanh", own=False)),
    "the vendor's gelu": (True, lambda: gelu("none", own=True)),
    "a sum of float64 over ranks": (
        FLOAT64, lambda: reduced(torch.distributed.ReduceOp.SUM)),
    "a maximum of float64 over ranks": (
        FLOAT64, lambda: reduced(torch.distributed.ReduceOp.MAX)),
}


def of_card(name: str, act) -> None:
    with patch.dict(os.environ, SHADOW_NPU=name):
        act()


def beside_mindspeed() -> None:
    from megatron_vl.platform import npu

    adaptor = "mindspeed.megatron_adaptor"
    with patch.dict(sys.modules, {adaptor: ModuleType(adaptor)}), patch.object(
            npu, "_installed", False):
        platform().install()


SAYS = {
    "no card": ("torch_npu is installed and finds no NPU; ", lambda: of_card("", platform)),
    "the first generation": (
        "Ascend910ProB has no bf16, and in fp16 saturates",
        lambda: of_card("Ascend910ProB", lambda: platform().device(0))),
    "more ranks than cards": (
        "process 1 of this node has no NPU of its own, there are 1; ",
        lambda: platform().device(1)),
    "MindSpeed": ("mindspeed.megatron_adaptor has changed Megatron-Core", beside_mindspeed),
}


def of_host():
    return torch.distributed.new_group(backend="gloo")


def main() -> None:
    sys.path[:0] = [str(SHADOW / "site")]
    import torch_npu  # noqa: F401

    from megatron_vl.errors import InputError
    from megatron_vl.parallel import Layout
    from megatron_vl.platform import initialize

    initialize(Layout())

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
    found |= {name: row() for name, (_, row) in GIVES.items()}
    for name, (_, row) in SAYS.items():
        try:
            found[name] = f"gives {row()}"
        except InputError as error:
            found[name] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
