"""An adapter as PEFT stores it: adapter_config.json and adapter_model.safetensors.

A factor's key is `base_model.model.`, what transformers calls the layer in memory, and
`.lora_A.weight` or `.lora_B.weight`. Under the published name of a layer, where that is another,
`PeftModel.from_pretrained` finds nothing, keeps the model as it is, and only warns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.errors import InputError, shown
from megatron_vl.peft.adapter import Adapter, Factors, factor_key
from megatron_vl.peft.targets import linears
from megatron_vl.typed import Shape, Text, read_file
from megatron_vl.weights.convert import ADAPTER_CONFIG, Source
from megatron_vl.weights.hf_io import open_safetensors
from megatron_vl.weights.map import Stored, WeightMap, listed
from megatron_vl.weights.rules import Piece

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])\.weight")
# What another kind of adapter sets, and what it then is.
_OTHER = {"use_dora": "DoRA", "fan_in_fan_out": "of transposed layers", "lora_bias": "with biases",
          "target_parameters": "of fused experts", "layer_replication": "of repeated layers",
          "trainable_token_indices": "of single tokens",
          "alora_invocation_tokens": "that begins at certain tokens (aLoRA)",
          "use_qalora": "of pooled inputs (QA-LoRA)", "use_bdlora": "of diagonal blocks (BD-LoRA)",
          "arrow_config": "that routes tokens (Arrow)", "kasa_config": "of singular values (KaSA)"}
# Beginnings whose factors are taken out of the model's weights: PEFT adds them to what is left.
_TAKEN_OUT = ("pissa", "olora", "corda", "loftq", "lora_ga")


class _Config(Shape):
    """adapter_config.json."""

    peft_type: Text
    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: Text = "none"
    rank_pattern: dict[Text, int] | None = None
    alpha_pattern: dict[Text, float] | None = None
    modules_to_save: list[Text] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAdapter:
    """An adapter and where its factors lie."""

    adapter: Adapter
    source: Source


def is_adapter_directory(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def read_adapter(directory: Path, weights: WeightMap) -> StoredAdapter:
    """Opens an adapter for the model that `weights` describes.

    Raises:
        InputError: files that are missing or damaged, another kind of adapter, or layers that this
            model has not, or has in another shape.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise InputError(
                f"{directory} has no {name}; give a directory that PEFT, or convert --to peft, "
                f"wrote."
            )
    path = directory / CONFIG
    config = read_file(path, _Config, mend="copy it again")
    _check_kind(path, config, read_file(path, dict, mend="copy it again"))
    known, published = {one.key for one in linears(weights)}, weights.published()
    inventory, tensors, ranks, strange = [], {}, {}, []
    for name, at in open_safetensors(directory / WEIGHTS).items():
        match = _FACTOR.fullmatch(name)
        key = weights.published_name(f"{match[1]}.weight") if match else None
        if key not in known:
            strange.append(name)
            continue
        factor, (rows, columns) = match[2], published[key]
        rank = ranks.setdefault(key, at.shape[0 if factor == "A" else -1])
        if at.shape != ((rank, columns) if factor == "A" else (rows, rank)):
            raise InputError(
                f"{directory / WEIGHTS} has {name} of shape {list(at.shape)}, which does not fit "
                f"the layer's [{rows}, {columns}]; give the adapter of this very model."
            )
        stored = Stored(
            file=WEIGHTS, part="", name=name, shape=at.shape,
            pieces=(Piece(factor_key(key, factor), (0, 0), (0, 0), at.shape),),
        )
        inventory.append(stored)
        tensors[stored.id] = at
    if strange:
        raise InputError(
            f"{directory / WEIGHTS} adapts {len(strange)} layer(s) that this model has not, or "
            f"that cannot be adapted: {listed(strange)}; give the adapter of this very model."
        )
    held = {piece.key for stored in inventory for piece in stored.pieces}
    missing = [factor_key(key, factor) for key in ranks for factor in "AB"
               if factor_key(key, factor) not in held]
    if missing or not ranks:
        raise InputError(
            f"{directory / WEIGHTS} lacks {listed(missing) if missing else 'every factor'}; copy "
            f"it again."
        )
    factors = {}
    for key in (key for key in published if key in ranks):
        name = weights.in_memory_name(key).removesuffix(".weight")
        if (said := _by_pattern(config.rank_pattern, name, config.r)) != ranks[key]:
            raise InputError(
                f"{path} says that {name} has rank {said}, and its factors in {WEIGHTS} have "
                f"{ranks[key]}; copy both files again."
            )
        alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
        factors[key] = Factors(ranks[key], alpha)
    dtypes = {one: at.dtype for one, at in tensors.items()}
    return StoredAdapter(
        adapter=Adapter(factors=factors, rank_stabilized=config.use_rslora,
                        dropout=config.lora_dropout),
        source=Source(inventory=inventory, dtypes=dtypes, tensors=tensors),
    )


def _check_kind(path: Path, config: _Config, whole: dict[str, Any]) -> None:
    other = next((what for key, what in _OTHER.items() if whole.get(key)), None)
    if config.peft_type.upper() != "LORA":
        other = f"of the kind {shown(config.peft_type)}"
    begun = str(whole.get("init_lora_weights"))
    if begun.lower().startswith(_TAKEN_OUT):
        other = f"beside what its beginning, {shown(begun)}, left of the weights"
    if config.bias != "none":
        other = f"with biases ({config.bias})"
    if config.modules_to_save:
        other = f"with layers trained in full ({listed(config.modules_to_save)})"
    if other is not None:
        raise InputError(
            f"{path} describes an adapter {other}, and LoRA of linear layers alone is read; merge "
            f"it into its model with PEFT, and give that."
        )


def _by_pattern(patterns: Mapping[str, float] | None, name: str, usual: float) -> float:
    """Rank or alpha of one layer, as PEFT matches its patterns.

    Raises:
        InputError: one is no regular expression.
    """
    for pattern, value in (patterns or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise InputError(
                f"{CONFIG} has the pattern {shown(pattern)}, which is no regular expression "
                f"({error}); mend it."
            ) from error
        if matched:
            return value
    return usual
