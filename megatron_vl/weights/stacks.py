"""Experts that a file holds as one tensor of a layer, in either of two orientations.

E experts of a layer, H hidden size, F width of an expert.

                  gate_up_proj   down_proj
    as published  [E, H, 2F]     [E, F, H]     turned: every expert's matrix is transposed
    in memory     [E, 2F, H]     [E, H, F]     as transformers 5 has them, and saves them

The F rows of gate are before those of up. Everywhere else an expert's matrices are tensors by
themselves, and are named so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vl.errors import InputError
from megatron_vl.weights.rules import Piece


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """One tensor of all experts of a layer: `{i}` in its names stands for the layer."""

    name: str
    keys: tuple[str, ...]  # of an expert's matrices, one below the other; `{e}` is the expert
    shape: tuple[int, int]  # of these together
    experts: int

    def numbered(self, layer: int) -> Stack:
        """The one of a layer."""
        name, *keys = (one.replace("{i}", str(layer)) for one in (self.name, *self.keys))
        return replace(self, name=name, keys=tuple(keys))

    def keys_of(self, expert: int) -> list[str]:
        """Published names of an expert's matrices."""
        return [key.replace("{e}", str(expert)) for key in self.keys]

    def whole(self, turned: bool) -> tuple[int, int, int]:
        """The tensor's shape."""
        rows, columns = self.shape
        return (self.experts, columns, rows) if turned else (self.experts, rows, columns)

    def pieces(self, expert: int, turned: bool) -> tuple[tuple[int, int], tuple[Piece, ...]]:
        """(shape, pieces) of an expert's part."""
        height, columns = self.shape[0] // len(self.keys), self.shape[1]
        pieces = tuple(
            Piece(key=key, start=(0, 0), at=(0, row) if turned else (row, 0),
                  shape=(height, columns), turned=turned)
            for key, row in zip(self.keys_of(expert), range(0, self.shape[0], height), strict=True)
        )
        return self.whole(turned)[1:], pieces


def are_turned(stacks: Sequence[Stack], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensors of a layer are turned: all of them are, or none.

    With H = F or H = 2F one of them looks alike in both orientations; never do both.

    Args:
        stacks: of the layer; not all need be there.
        shapes: of all tensors that are there.

    Raises:
        InputError: another shape, two orientations, or one that the shapes leave open.
    """
    allowed = {True, False}
    for one in (found := [one for one in stacks if one.name in shapes]):
        fits = {turned for turned in (True, False) if shapes[one.name] == one.whole(turned)}
        if not fits:
            raise InputError(
                f"{one.name} has shape {list(shapes[one.name])} but config.json asks for "
                f"{list(one.whole(True))}, or {list(one.whole(False))} as transformers 5 saves it; "
                f"use the config.json the checkpoint was made with."
            )
        allowed &= fits
    if len(allowed) == 1:
        return allowed.pop()
    what = " and ".join(f"{one.name} {list(shapes[one.name])}" for one in found)
    if not allowed:
        raise InputError(f"of {what} the experts of one are transposed and those of the other are "
                         f"not; use tensors that one program wrote.")
    raise InputError(f"the shape of {what} does not tell whether its experts are transposed; use "
                     f"a checkpoint that has all experts of a layer as one tensor, or none.")


def written_turned(stacks: Sequence[Stack]) -> bool:
    """Whether to write a layer's tensors as published.

    transformers 5 transposes what it reads only where the shape says so: what looks alike in both
    orientations must be as it is in memory, and then all are. Older versions refuse these shapes.
    """
    return not any(one.shape[0] == one.shape[1] for one in stacks)
