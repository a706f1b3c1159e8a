"""An adapter that a run trained, as PEFT's files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from megatron_vl.errors import InputError
from megatron_vl.models.common.parts import part_of
from megatron_vl.parallel import StageSplit
from megatron_vl.peft.adapter import Adapter
from megatron_vl.peft.adapter_map import FACTOR_NAMES, AdapterMap
from megatron_vl.peft.files import CONFIG, PREFIX, WEIGHTS, StoredAdapter
from megatron_vl.peft.targets import linears
from megatron_vl.weights.convert import Source
from megatron_vl.weights.dtypes import DType
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.hf_io import lay_out_hf
from megatron_vl.weights.map import Stored, WeightMap
from megatron_vl.weights.mcore_io import CheckpointInfo
from megatron_vl.weights.rules import Piece
from megatron_vl.weights.targets import Files, Ids
from megatron_vl.weights.torch_dist import open_torch_dist


def open_trained(info: CheckpointInfo, weights: WeightMap) -> StoredAdapter:
    """The adapter in a run's checkpoint.

    Raises:
        InputError: it holds none, or is damaged.
    """
    if info.adapter is None:
        raise InputError(
            f"{info.path} holds no adapter, but all weights of a model; leave out --to peft and "
            f"--merge."
        )
    adapter = adapter_of(info)
    inventory, tensors = open_torch_dist(info.path, AdapterMap(weights=weights, adapter=adapter))
    own, places = open_beside(info, weights)
    trained = _keys(weights, info.adapter["trained"])
    own = [one for one in own if any(piece.key in trained for piece in one.pieces)]
    inventory, tensors = [*inventory, *own], tensors | {one.id: places[one.id] for one in own}
    held = {piece.key for one in own for piece in one.pieces}
    return StoredAdapter(
        adapter=adapter, full=tuple(key for key in trained if key in held),
        source=Source(inventory=inventory, tensors=tensors,
                      dtypes={one: at.dtype for one, at in tensors.items()}),
    )


def open_beside(
    info: CheckpointInfo, weights: WeightMap
) -> tuple[list[Stored], dict[Ids, TensorAt]]:
    """(inventory, where each lies) of the model's own weights in a checkpoint with an adapter."""
    known = replace(weights, partial=True, mcore_ignored=(*weights.mcore_ignored, FACTOR_NAMES))
    return open_torch_dist(info.path, known)


def _keys(weights: WeightMap, parts: Collection[str]) -> list[str]:
    """Published names of the weights of some parts, in the order of the model."""
    whole = StageSplit.create(layers=weights.layers)
    return [key for weight, layer, _ in weights.chunk_weights(whole, 0, 0)
            if part_of(weight.name) in parts
            for expert in weight.each for key in weight.rule_of(layer, expert).published()]


def adapter_of(info: CheckpointInfo) -> Adapter:
    """What a checkpoint says of the adapter that it holds.

    Raises:
        InputError: nothing that makes sense.
    """
    try:
        return Adapter.from_dict(info.adapter)
    except ValueError as error:
        raise InputError(
            f"{info.path} does not describe its adapter ({error}); copy it again."
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftTarget:
    """adapter_config.json and adapter_model.safetensors; see `megatron_vl.peft.files`."""

    side_files: ClassVar[Sequence[str]] = ()
    of: AdapterMap
    base: Path  # the model it is beside, as the file is to call it

    def wanted(self, weights: WeightMap) -> list[Stored]:
        found = []
        for key, shape in self.of.published().items():
            stem, factor = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key).groups()
            name = weights.in_memory_name(f"{stem}.weight").removesuffix(".weight")
            found.append(Stored(
                file=WEIGHTS, part="", name=f"{PREFIX}{name}.{factor}.weight", shape=shape,
                pieces=(Piece(key, (0, 0), (0, 0), shape),),
            ))
        return found

    def files(self, wanted: Sequence[Stored], dtypes: Mapping[Ids, DType]) -> Files:
        return {WEIGHTS: wanted}

    def lay_out(
        self, root: Path, files: Files, dtypes: Mapping[Ids, DType], dtype: str, weights: WeightMap
    ) -> dict[Ids, TensorAt]:
        return lay_out_hf(root, files, dtypes)

    def finish(self, root: Path, dtype: str) -> None:
        text = json.dumps(peft_config(self.of, self.base), indent=2)
        (root / CONFIG).write_text(f"{text}\n", encoding="utf-8")


def peft_config(of: AdapterMap, base: Path) -> dict[str, Any]:
    """What adapter_config.json says."""
    adapter, weights = of.adapter, of.weights
    names = {key: weights.in_memory_name(key).removesuffix(".weight") for key in adapter.factors}
    rank = Counter(one.rank for one in adapter.factors.values()).most_common(1)[0][0]
    alpha = Counter(one.alpha for one in adapter.factors.values()).most_common(1)[0][0]

    def number(value: float) -> float:
        return int(value) if value.is_integer() else value  # as PEFT's own files have it

    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": rank, "lora_alpha": number(alpha), "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilized, "target_modules": _targets(of, names),
        "rank_pattern": {names[key]: one.rank for key, one in adapter.factors.items()
                         if one.rank != rank},
        "alpha_pattern": {names[key]: number(one.alpha) for key, one in adapter.factors.items()
                          if one.alpha != alpha},
        "bias": "none", "fan_in_fan_out": False, "use_dora": False, "modules_to_save": None,
        "init_lora_weights": True, "inference_mode": True, "layers_to_transform": None,
        "layers_pattern": None, "exclude_modules": None, "revision": None,
    }


def _targets(of: AdapterMap, names: Mapping[str, str]) -> str | list[str]:
    """An expression for just the adapted layers, or their names.

    Short names would be looked for everywhere: gate_proj is in some vision towers too.
    """
    kinds = dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name))
                          for name in names.values())
    expression = "|".join(kinds)
    hit = {one.key for one in linears(of.weights) if re.fullmatch(expression, one.in_memory)}
    return expression if hit == names.keys() else list(names.values())
