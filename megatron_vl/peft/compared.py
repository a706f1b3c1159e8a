"""What is compared of two checkpoints of which one may be, or hold, an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.conversion import Described, describe
from megatron_vl.models.registry import family, load_spec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.peft.adapter import MAGNITUDE, Adapter, Factors, factor_key
from megatron_vl.peft.conversion import open_trained
from megatron_vl.peft.files import StoredAdapter, is_adapter_directory, read_adapter
from megatron_vl.peft.merge import open_whole
from megatron_vl.weights.convert import Source
from megatron_vl.weights.hub import local_model
from megatron_vl.weights.map import WeightMap


@dataclass(frozen=True, kw_only=True, slots=True)
class Both:
    """Two opened checkpoints."""

    sources: tuple[Source, Source]
    shapes: Mapping[str, tuple[int, ...]]  # of the published tensors to compare
    differing: Mapping[str, str] = field(default_factory=dict)  # layers adapted otherwise, and how


def open_both(
    a: Path, b: Path, hf_config: Path | None, *, adapter: Path | None, base: Path | None
) -> Both:
    """Open A, with `adapter` merged, and B.

    Two adapters are compared as such, in a run's checkpoint or in PEFT's files. An adapter in a
    checkpoint and a model are compared as models, the adapter merged into `base`.

    Raises:
        InputError: one of them cannot be read, or the two not be compared.
    """
    paths, alone = (a, b), [is_adapter_directory(one) for one in (a, b)]
    found = [None if peft else describe(path, hf_config)
             for path, peft in zip(paths, alone, strict=True)]
    spec = _spec(paths, found, hf_config)
    weights = replace(family(spec.model_type).weight_map(spec), partial=True)
    holds = [peft or (one.info is not None and one.info.adapter is not None)
             for peft, one in zip(alone, found, strict=True)]
    if all(holds) and adapter is None:
        if base is not None:
            raise InputError(f"{a} and {b} are compared as adapters; leave out --base.")
        return _adapters(*(read_adapter(path, weights) if one is None
                           else open_trained(one.info, weights)
                           for path, one in zip(paths, found, strict=True)), weights)
    for path, peft in zip(paths, alone, strict=True):
        if peft:
            raise InputError(
                f"{path} is an adapter alone and is compared with another, or with the checkpoint "
                f"of a run that trained one; compare models by giving it as --adapter."
            )
    if base is not None and not any(holds):
        raise InputError(f"--base is for a run's adapter, and neither {a} nor {b} holds one; leave "
                         f"it out.")
    return Both(shapes=weights.published(), sources=tuple(
        open_whole(one.directory, one.info, weights, adapter=merge, base=base if own else None)
        for one, own, merge in zip(found, holds, (adapter, None), strict=True)
    ))


def _spec(
    paths: tuple[Path, Path], found: list[Described | None], hf_config: Path | None
) -> ModelSpec:
    """Of the model that both are of."""
    specs = [one.spec for one in found if one is not None]
    if not specs:
        if hf_config is None:
            raise InputError(
                f"{paths[0]} is an adapter alone, and so is {paths[1]}; give the directory of "
                f"their model with --hf-config."
            )
        return load_spec(local_model(hf_config, weights=False))
    if specs[0].model_type != specs[-1].model_type:
        raise InputError(
            f"{paths[0]} holds a {specs[0].model_type} model but {paths[1]} a "
            f"{specs[-1].model_type}; compare checkpoints of one model."
        )
    return specs[0]


def _adapters(first: StoredAdapter, second: StoredAdapter, weights: WeightMap) -> Both:
    """Factor by factor, and tensors that were trained in full; layers of other ranks or scales are
    told apart by these alone."""
    adapters = first.adapter, second.adapter
    differing = {
        key: f"{_words(adapters[0], one)} and {_words(adapters[1], adapters[1].factors[key])}"
        for key, one in adapters[0].factors.items()
        if key in adapters[1].factors
        and (one.rank, adapters[0].scale(one)) != (
            adapters[1].factors[key].rank, adapters[1].scale(adapters[1].factors[key]))
    }
    shapes = second.published(weights) | first.published(weights)
    for key in differing:
        for factor in ("A", "B", MAGNITUDE):
            shapes.pop(factor_key(key, factor), None)
    return Both(sources=(first.source, second.source), shapes=shapes, differing=differing)


def _words(adapter: Adapter, one: Factors) -> str:
    return f"rank {one.rank} at scale {adapter.scale(one):.9g}"
