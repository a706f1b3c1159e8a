"""Bytes of tensors, counted from when an operation makes them until they are gone."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class AllocatedBytes(TorchDispatchMode):
    """Entered, it counts every storage that an operation makes, until it is gone.

    torch's own MemTracker would, but it calls `buffers()` of every module, which Megatron-Core's
    data-parallel wrapper has as a list.

    Args:
        known: tensors of before, which are not counted.
        device: the type of the devices whose storages are counted.
        resized: whether storages may be emptied and filled without an operation, as selective
            recompute does. What is filled counts again from the operation that uses it; what is
            emptied is looked for at every new peak.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, known: Iterable[torch.Tensor], device: str = "cpu", *, resized: bool = True):
        super().__init__()
        self._device, self._resized = device, resized
        self._known = [one.untyped_storage() for one in known]  # kept, so that no other has its id
        self._sizes = {storage._cdata: 0 for storage in self._known}
        self._made: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not all(one in (torch.Tensor, torch.nn.Parameter) for one in types):
            return NotImplemented  # a quantised weight comes again, as the operations on its codes
        out = func(*args, **(kwargs or {}))
        for one in tree_iter((args, kwargs)) if self._resized else ():
            if isinstance(one, torch.Tensor):
                self._measure(one.untyped_storage())
        for one in tree_iter(out):
            if isinstance(one, torch.Tensor) and one.device.type == self._device:
                self._count(one.untyped_storage())
        if self.now > self.peak:
            for made in [*self._made.values()] if self._resized else ():
                if (storage := made()) is not None:
                    self._measure(storage)
            self.peak = max(self.peak, self.now)
        return out

    def take_peak(self) -> int:
        """The peak so far; it starts again."""
        peak, self.peak = self.peak, self.now
        return peak

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._made[key] = weakref.ref(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key)

    def _measure(self, storage: torch.UntypedStorage) -> None:
        """Takes the size that it has by now."""
        key = storage._cdata
        if key in self._made:
            self.now += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._made[key]
