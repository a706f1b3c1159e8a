"""What of a model is trained; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_vl.models.common.parts import PARTS, part_of
from megatron_vl.models.common.quantized_base import cut_within_blocks, is_layer_linear
from megatron_vl.parallel import Layout
from megatron_vl.peft.adapter_map import AdapterMap
from megatron_vl.weights.map import Weight


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Weights of their own, factors beside them, or both."""

    frozen: tuple[str, ...] = ()  # keys of PARTS whose own weights are not trained
    constants: bool = False  # also weights that the published model declares constant
    adapter: AdapterMap | None = None
    quantize_base: str | None = None  # of ops.blockwise.FORMS: that of what `quantizes` names

    def trains(self, weight: Weight) -> bool:
        """Whether a weight of the model itself is trained."""
        return part_of(weight.name) not in self.frozen and (self.constants or not weight.constant)

    def quantizes(self, weight: Weight) -> bool:
        """Whether a weight is kept in blocks: linear ones of the language layers, experts' too."""
        return self.quantize_base is not None and is_layer_linear(weight)

    def cut_within_blocks(self, layout: Layout) -> str:
        """Which quantised weights have other values than in one piece, in words; or nothing."""
        if self.quantize_base is None:
            return ""
        return cut_within_blocks(self.adapter.weights, layout)

    @cached_property
    def adapted(self) -> tuple[str, ...]:
        """Keys of PARTS that have factors."""
        return () if self.adapter is None else self.adapter.parts

    @property
    def still(self) -> tuple[str, ...]:
        """Keys of PARTS of which nothing is trained."""
        return tuple(part for part in self.frozen if part not in self.adapted)

    @cached_property
    def adapter_numbers(self) -> dict[str, int]:
        """Numbers of all factors in every part that has some."""
        found = dict.fromkeys(self.adapted, 0)
        for one in self.adapter.whole() if self.adapter else ():
            found[part_of(one.weight.name)] += one.numbers
        return {part: found[part] for part in PARTS if part in found}
