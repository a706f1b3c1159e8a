"""What a run trains, by its options: weights of the model, or an adapter beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.peft.adapter import Adapter, Factors
from megatron_vl.peft.adapter_map import AdapterMap
from megatron_vl.peft.conversion import adapter_of
from megatron_vl.peft.files import StoredAdapter, read_adapter
from megatron_vl.peft.fused import fused
from megatron_vl.peft.targets import resolve
from megatron_vl.peft.trainable import Trainable
from megatron_vl.training.checkpoint.start import source_of
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.weights.map import WeightMap, listed


def trainable_of(config: TrainConfig, spec: ModelSpec) -> Trainable:
    """What a run of `config` trains of a model.

    Raises:
        InputError: an adapter that does not fit the model, or layers that it has not.
    """
    weights = family(spec.model_type).weight_map(spec)
    return Trainable(
        frozen=config.frozen, constants=config.model.train_constants,
        adapter=AdapterMap(weights=weights, adapter=_adapter(config, weights))
        if config.lora.given else None,
        quantize_base=config.lora.quantize_base,
    )


def stored_adapter(config: TrainConfig, weights: WeightMap) -> StoredAdapter | None:
    """The adapter that a run begins with; None: a new one.

    Raises:
        InputError: one that is not trained; see also `read_adapter`.
    """
    given = config.lora.adapter
    if given is None:
        return None
    stored = read_adapter(Path(given), weights)
    if stored.dora or stored.full:
        what = "is DoRA" if stored.dora else f"has layers trained in full ({listed(stored.full)})"
        raise InputError(
            f"adapter {given} {what}, from which no training begins; merge it into its model by "
            f"convert {config.checkpoint.load} MERGED --merge --adapter {given}, and load MERGED "
            f"with lora-rank."
        )
    return stored


def _adapter(config: TrainConfig, weights: WeightMap) -> Adapter:
    options = config.lora
    info, own = source_of(config)
    if own and info.adapter is not None:
        # What is trained already stays what it is, whatever has become of its first directory.
        return replace(adapter_of(info), dropout=options.lora_dropout)
    if (stored := stored_adapter(config, weights)) is not None:
        given = (fused(stored, weights, Path(options.adapter)) if options.lora_fused
                 else stored.adapter)
        return replace(given, dropout=options.lora_dropout)
    one = Factors(options.lora_rank, options.alpha)
    return Adapter(factors=dict.fromkeys(resolve(weights, options.lora_target), one),
                   rank_stabilized=options.use_rslora, dropout=options.lora_dropout,
                   fused=options.lora_fused)
