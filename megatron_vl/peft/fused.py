"""One A for all published layers that a Megatron-Core layer is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_vl.errors import InputError
from megatron_vl.peft.adapter import Adapter, factor_key
from megatron_vl.peft.adapter_map import AdapterMap
from megatron_vl.peft.files import StoredAdapter, read_factors
from megatron_vl.weights.map import WeightMap


def fused(stored: StoredAdapter, weights: WeightMap, directory: Path) -> Adapter:
    """The adapter in `directory`, which `stored` is, with its equal A's as one.

    Raises:
        InputError: two that are to be one differ, as in most adapters that are PEFT's own.
    """
    factors = read_factors(stored, weights)
    for one in AdapterMap(weights=weights, adapter=stored.adapter).whole():
        first, *others = stored.adapter.of(one.rule)
        a = factors[factor_key(first, "A")]
        for other in others:
            if not np.array_equal(factors[factor_key(other, "A")], a):
                raise InputError(
                    f"lora-fused has one A for {first} and {other}, and those of adapter "
                    f"{directory} differ; leave out lora-fused."
                )
    return replace(stored.adapter, fused=True)
