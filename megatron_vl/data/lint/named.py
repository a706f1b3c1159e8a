"""Samples of prepared data by the names that a run calls them."""

from __future__ import annotations

from collections.abc import Collection

from megatron_vl.data.encode.samples import ConversationSample, sample_name
from megatron_vl.data.lint.look import build_encoder
from megatron_vl.data.lint.reading import open_leaves
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.mixture import Mixture


def samples_named(
    mixture: Mixture, split: str, names: Collection[str]
) -> dict[str, ConversationSample]:
    """Those of `names` that `split` has, by their names; reads the shards that hold them.

    Raises:
        InputError: see `open_leaves`.
    """
    encoder = build_encoder(
        DataConfig(train=mixture, seq_length=1), None, None, None, split=split
    )
    datasets, found = mixture.names(split), {}
    for leaf in open_leaves(mixture, split):
        for place in leaf.places_beside(names):
            raw = leaf.read(place)
            name = "" if raw is None else sample_name(raw, datasets)
            if name in names:
                found[name] = encoder.conversation(leaf.load(raw))
    return found
