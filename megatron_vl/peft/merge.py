"""An adapter added to the weights it is beside, while these are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_vl.errors import InputError
from megatron_vl.peft.adapter import MAGNITUDE, factor_key
from megatron_vl.peft.conversion import open_beside, open_trained
from megatron_vl.peft.files import StoredAdapter, read_adapter, read_factors
from megatron_vl.weights.convert import Source, inspect_weights, open_source, open_weights
from megatron_vl.weights.dtypes import DType
from megatron_vl.weights.map import WeightMap
from megatron_vl.weights.mcore_io import CheckpointInfo
from megatron_vl.weights.reshard import Update


def open_whole(
    directory: Path, info: CheckpointInfo | None, weights: WeightMap, *,
    base: Path | None = None, adapter: Path | None = None,
) -> Source:
    """All weights of a model, with the adapter that it holds, or `adapter`, merged.

    Args:
        info: of a Megatron-Core checkpoint; None of a Hugging Face directory.
        base: see `open_model`.
        adapter: a directory of PEFT's.

    Raises:
        InputError: two adapters, or a base of none; see also `open_source`, `open_trained`,
            `read_adapter` and `open_model`.
    """
    holds = info is not None and info.adapter is not None
    if holds and adapter is not None:
        raise InputError(
            f"{directory} holds an adapter of its own; leave out --adapter, or give it beside the "
            f"model {info.adapter['base']}."
        )
    if holds:
        return merged(open_model(info, weights, base), open_trained(info, weights), weights)
    if base is not None:
        raise InputError(f"{directory} is a whole model; leave out --base.")
    source = open_source(directory, weights, info=info)
    return source if adapter is None else merged(source, read_adapter(adapter, weights), weights)


def open_model(info: CheckpointInfo, weights: WeightMap, base: Path | None) -> Source:
    """The model that a checkpoint's adapter is beside: what was trained of it, and the rest as it
    was.

    Args:
        base: where the rest is; None: where the run found it.

    Raises:
        InputError: it is not there, or another model.
    """
    inventory, tensors = open_beside(info, weights)
    held = {piece.key for one in inventory for piece in one.pieces}
    if held >= weights.published().keys():
        if base is not None:
            raise InputError(
                f"{info.path} holds all weights of its model beside the adapter; leave out --base."
            )
        rest = Source(inventory=[], dtypes={}, tensors={})
    else:
        found = Path(info.adapter["base"]) if base is None else base
        if not found.is_dir():
            raise InputError(
                f"{info.path} holds an adapter of the model {found}, which is not there; give its "
                f"directory with --base."
            )
        rest = open_weights(inspect_weights(found), weights)
    others = [one for one in rest.inventory
              if not any(piece.key in held for piece in one.pieces)]
    tensors |= {one.id: rest.tensors[one.id] for one in others}
    return Source(inventory=[*inventory, *others], tensors=tensors,
                  dtypes={one: at.dtype for one, at in tensors.items()})


def merged(base: Source, stored: StoredAdapter, weights: WeightMap) -> Source:
    """`base` with an adapter added, in the dtypes of `base`.

    W is read as W + s B A, of DoRA with its rows at the length that the adapter says, computed in
    fp32 and cast once. Tensors that were trained in full take the place of those of `base`.
    """
    full, inventory = set(stored.full), []
    dtypes, tensors = dict(base.dtypes), dict(base.tensors)
    dtype_of: dict[str | None, DType] = {}
    for one in base.inventory:
        dtype_of |= dict.fromkeys((piece.key for piece in one.pieces), base.dtypes[one.id])
        pieces = tuple(piece for piece in one.pieces if piece.key not in full)
        if any(piece.key is not None for piece in pieces):
            inventory.append(replace(one, pieces=pieces))
    for one in stored.source.inventory:
        if any(piece.key in full for piece in one.pieces):
            inventory.append(one)
            tensors[one.id] = stored.source.tensors[one.id]
            dtypes[one.id] = dtype_of.get(one.pieces[0].key, stored.source.dtypes[one.id])
    return Source(inventory=inventory, dtypes=dtypes, tensors=tensors,
                  updates=_updates(stored, weights))


def _updates(stored: StoredAdapter, weights: WeightMap) -> dict[str, Update]:
    factors = read_factors(stored, weights)

    def update(key: str) -> Update:
        a, b = (factors[factor_key(key, factor)] for factor in "AB")
        b = b * np.float32(stored.adapter.scale(stored.adapter.factors[key]))
        lengths = factors.get(factor_key(key, MAGNITUDE))

        def read(first: int, rows: np.ndarray) -> np.ndarray:
            rows = rows + b[first : first + len(rows)] @ a
            if lengths is not None:
                wanted = lengths[first : first + len(rows), None]
                rows *= wanted / np.linalg.norm(rows, axis=1, keepdims=True)
            return rows

        return read

    return {key: update(key) for key in stored.adapter.factors}
