"""An adapter as PEFT stores it: adapter_config.json and adapter_model.safetensors.

A factor's key is `base_model.model.`, what transformers calls the layer in memory, and
`.lora_A.weight` or `.lora_B.weight`, of DoRA also `.lora_magnitude_vector`. A tensor trained in
full, one of `modules_to_save`, has its own name. Under a layer's published name, where that is
another, `PeftModel.from_pretrained` finds nothing, keeps the model as it is, and only warns.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.errors import InputError, shown
from megatron_vl.peft.adapter import MAGNITUDE, Adapter, Factors, factor_key
from megatron_vl.peft.adapter_map import AdapterMap
from megatron_vl.peft.targets import linears
from megatron_vl.typed import Positive, Shape, Size, Text, read_file
from megatron_vl.weights.convert import ADAPTER_CONFIG, Source
from megatron_vl.weights.dtypes import FLOAT32
from megatron_vl.weights.files import fingerprint
from megatron_vl.weights.hf_io import open_safetensors
from megatron_vl.weights.map import Stored, WeightMap, listed, whole_tensor
from megatron_vl.weights.plan import make_plan
from megatron_vl.weights.reshard import Reader
from megatron_vl.weights.rules import Piece

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
PREFIX = "base_model.model."
# What is adapted, and "A", "B" or MAGNITUDE; of a tensor of the model itself its name alone.
_TENSOR = re.compile(
    rf"(?:{re.escape(PREFIX)})?(.*?)(?:\.lora_(?:([AB])\.weight|({MAGNITUDE})))?", re.DOTALL
)
# What another kind of adapter sets, and what it then is.
_OTHER = {"fan_in_fan_out": "of transposed layers", "lora_bias": "with biases",
          "target_parameters": "of fused experts", "layer_replication": "of repeated layers",
          "trainable_token_indices": "of single tokens",
          "alora_invocation_tokens": "that begins at certain tokens (aLoRA)",
          "use_qalora": "of pooled inputs (QA-LoRA)", "use_bdlora": "of diagonal blocks (BD-LoRA)",
          "arrow_config": "that routes tokens (Arrow)", "kasa_config": "of singular values (KaSA)",
          "monteclora_config": "of random factors (MonteCLoRA)"}
# Beginnings whose factors are taken out of the model's weights: PEFT adds them to what is left.
_TAKEN_OUT = ("pissa", "olora", "corda", "loftq", "lora_ga")


class _Config(Shape):
    """adapter_config.json."""

    peft_type: Text
    r: Size
    lora_alpha: Positive
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: Text = "none"
    rank_pattern: dict[Text, Size] | None = None
    alpha_pattern: dict[Text, Positive] | None = None
    modules_to_save: list[Text] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAdapter:
    """An adapter and where its tensors lie."""

    adapter: Adapter
    source: Source
    full: tuple[str, ...] = ()  # published names of the model's tensors that were trained in full
    dora: bool = False  # the rows of W + s B A have lengths of their own: see MAGNITUDE

    def published(self, weights: WeightMap) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of it, in the order of the model."""
        whole = weights.published()
        found = AdapterMap(weights=weights, adapter=self.adapter).published()
        if self.dora:
            found |= {factor_key(key, MAGNITUDE): whole[key][:1] for key in self.adapter.factors}
        return found | {key: shape for key, shape in whole.items() if key in self.full}


def is_adapter_directory(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def read_adapter(directory: Path, weights: WeightMap) -> StoredAdapter:
    """Opens an adapter for the model that `weights` describes.

    Raises:
        InputError: files that are missing or damaged, another kind of adapter, or layers that this
            model has not, or has in another shape.
    """
    _check_files(directory)
    path = directory / CONFIG
    config = read_file(path, _Config, mend="copy it again")
    _check_kind(path, config, read_file(path, dict, mend="copy it again"))
    stored = _opened(directory / WEIGHTS, weights)
    if config.use_dora != stored.dora:
        raise InputError(
            f"{path} says {'DoRA' if config.use_dora else 'LoRA'}, and {WEIGHTS} has "
            f"{'no' if config.use_dora else 'its'} lora_magnitude_vector; copy both files again."
        )
    names = [one.name.removeprefix(PREFIX) for one in stored.source.inventory]
    if gone := [word for word in config.modules_to_save or ()
                if not any(_is_within(name, word) for name in names)]:
        raise InputError(
            f"{path} has {listed(gone)} in modules_to_save, which {WEIGHTS} lacks; copy both files "
            f"again."
        )
    factors = {}
    for key, one in stored.adapter.factors.items():
        # Whichever of them the file's own tensors have, its patterns have too.
        names = [name.removesuffix(".weight") for name in (weights.in_memory_name(key), key)]
        if (said := _by_pattern(config.rank_pattern, names, config.r)) != one.rank:
            raise InputError(
                f"{path} says that {names[0]} has rank {said}, and its factors in {WEIGHTS} have "
                f"{one.rank}; copy both files again."
            )
        alpha = _by_pattern(config.alpha_pattern, names, config.lora_alpha)
        factors[key] = Factors(one.rank, alpha)
    return replace(stored, adapter=Adapter(
        factors=factors, rank_stabilized=config.use_rslora, dropout=config.lora_dropout))


def read_factors(stored: StoredAdapter, weights: WeightMap) -> dict[str, np.ndarray]:
    """Every published tensor of an adapter but those of the model itself, in fp32."""
    wanted = [whole_tensor(key, shape) for key, shape in stored.published(weights).items()
              if key not in stored.full]
    found = {}
    with contextlib.ExitStack() as stack:
        reader = Reader(stored.source.tensors, stack)
        for plan in make_plan(stored.source.inventory, wanted, everything=False).tensors:
            rows, width = plan.target.shape[0], reader.row_bytes(plan)
            slabs = reader.chunks(plan, (0, rows, plan.ops), FLOAT32, width)
            found[plan.target.name] = np.concatenate(
                [slab.assembled().view("f4") for slab in slabs])
    return found


def adapter_mark(directory: Path) -> dict[str, str]:
    """What tells an adapter from others: the fingerprint of each of its files, by its name.

    Raises:
        InputError: there is none.
    """
    _check_files(directory)
    return {name: fingerprint(directory / name) for name in (CONFIG, WEIGHTS)}


def _check_files(directory: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            pickled = directory / "adapter_model.bin"
            if name == WEIGHTS and pickled.is_file():
                raise InputError(
                    f"{pickled} is not read; load the adapter with PEFT and save_pretrained it, "
                    f"which writes {WEIGHTS}."
                )
            raise InputError(
                f"{directory} has no {name}; give a directory that PEFT, or convert --to peft, "
                f"wrote."
            )


def _opened(path: Path, weights: WeightMap) -> StoredAdapter:
    """The tensors of an adapter; what its config.json says of them is not yet known.

    Raises:
        InputError: tensors that the model has no place for, or that are missing.
    """
    published, copies = weights.published(), dict(weights.hf_copies)
    linear = {one.key for one in linears(weights)}
    inventory, tensors, ranks, strange = [], {}, {}, []
    for name, at in open_safetensors(path).items():
        stem, a_or_b, magnitude = _TENSOR.fullmatch(name).groups()
        factor = a_or_b or magnitude
        key = weights.published_name(stem if factor is None else f"{stem}.weight")
        key = copies.get(key, key) if factor is None else key
        if key not in (published if factor is None else linear):
            strange.append(name)
            continue
        fits = shape = published[key]
        held = key if factor is None else factor_key(key, factor)
        if factor is not None:
            if factor != MAGNITUDE:
                ranks.setdefault(key, (*at.shape, 0)[0 if factor == "A" else len(at.shape) - 1])
            rank = ranks.get(key, 0)
            fits = {"A": (rank, shape[1]), "B": (shape[0], rank), MAGNITUDE: shape[:1]}[factor]
        if at.shape != fits or 0 in fits:
            raise InputError(
                f"{path} has {name} of shape {list(at.shape)}, which does not fit the layer's "
                f"{list(shape)}; give the adapter of this very model."
            )
        zeros = (0,) * len(fits)
        stored = Stored(file=WEIGHTS, part="", name=name, shape=fits,
                        pieces=(Piece(held, zeros, zeros, fits),))
        inventory.append(stored)
        tensors[stored.id] = at
    if strange:
        raise InputError(
            f"{path} adapts {len(strange)} layer(s) that this model has not, or that cannot be "
            f"adapted: {listed(strange)}; give the adapter of this very model."
        )
    held = {piece.key for stored in inventory for piece in stored.pieces}
    dora = any(factor_key(key, MAGNITUDE) in held for key in linear)
    missing = [factor_key(key, factor) for key in ranks
               for factor in ("A", "B", *[MAGNITUDE] * dora) if factor_key(key, factor) not in held]
    if missing or not ranks:
        raise InputError(
            f"{path} lacks {listed(missing) if missing else 'every factor'}; copy it again."
        )
    names = {stored.name.removeprefix(PREFIX) for stored in inventory}
    for copy, key in copies.items():
        if key in held and len(names & {copy, weights.in_memory_name(key), key}) == 1:
            raise InputError(
                f"{path} has {'the head' if copy in names else 'the embedding'} alone, which this "
                f"model has in one with the other; train both with PEFT's ensure_weight_tying."
            )
    factors = {key: Factors(ranks[key], 1.0) for key in published if key in ranks}
    return StoredAdapter(
        adapter=Adapter(factors=factors),
        source=Source(inventory=inventory, tensors=tensors,
                      dtypes={one: at.dtype for one, at in tensors.items()}),
        full=tuple(key for key in published if key in held), dora=dora,
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
    if other is not None:
        raise InputError(
            f"{path} describes an adapter {other}, and only LoRA or DoRA of linear layers is read; "
            "merge it into its model with PEFT, and give that."
        )


def _is_within(name: str, word: str) -> bool:
    """Whether a tensor is of a module that PEFT finds by a word of modules_to_save."""
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(word) for end in range(1, len(parts)))


def _by_pattern(
    patterns: Mapping[str, float] | None, names: Sequence[str], usual: float
) -> float:
    """Rank or alpha of one layer, as PEFT matches its patterns.

    Args:
        names: that the layer may have there.

    Raises:
        InputError: one is no regular expression.
    """
    for pattern, value in (patterns or {}).items():
        try:
            matched = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        except re.error as error:
            raise InputError(
                f"{CONFIG} has the pattern {shown(pattern)}, which is no regular expression "
                f"({error}); mend it."
            ) from error
        if matched:
            return value
    return usual
