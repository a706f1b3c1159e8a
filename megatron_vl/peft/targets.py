"""Which linear layers are adapted, by the words that users of this field name them with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vl.errors import InputError, shown
from megatron_vl.models.common.parts import PARTS, part_of
from megatron_vl.parallel import LANGUAGE, StageSplit
from megatron_vl.weights.map import WeightMap
from megatron_vl.weights.rules import Vocab

ALL_LINEAR = "all-linear"
MCORE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
HELP = (
    f"{ALL_LINEAR} (those of the language model), {', '.join(PARTS)} (those of a part), "
    f"{', '.join(MCORE)}, published names such as q_proj, W_pack or mlp.fc1, or a regular "
    f"expression for whole published names"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A published linear layer."""

    key: str  # published name of its weight
    mcore: str  # leaf of the name of the Megatron-Core layer it is a part of
    part: str  # key of PARTS
    in_memory: str  # what transformers calls the layer

    @property
    def name(self) -> str:
        return self.key.removesuffix(".weight")

    def ends_with(self, word: str) -> bool:
        return f".{self.name}".endswith(f".{word}")


def linears(weights: WeightMap) -> Iterator[Linear]:
    """Every published layer that can be adapted, in the order of the model.

    Experts, whose weights are published as one, and the head are none of them.
    """
    whole = StageSplit.create(layers=weights.layers)
    for weight, layer, _ in weights.chunk_weights(whole, 0, 0):
        rule = weight.rule_of(layer, 0)
        if (weight.experts is not None or rule.axis is None or isinstance(rule, Vocab)
                or len(rule.tail) != 1 or not weight.name.endswith(".weight")):
            continue
        for key in rule.published():
            if key.endswith(".weight"):
                yield Linear(key=key, mcore=weight.name.split(".")[-2], part=part_of(weight.name),
                             in_memory=weights.in_memory_name(key).removesuffix(".weight"))


def resolve(weights: WeightMap, targets: Sequence[str]) -> list[str]:
    """Published names of the weights that `targets` name, in the order of the model.

    Raises:
        InputError: one of them names nothing.
    """
    known = list(linears(weights))
    hit = {one.key for target in targets for one in _named(target, known)}
    return [one.key for one in known if one.key in hit]


def _named(target: str, known: list[Linear]) -> list[Linear]:
    """Those of `known` that one word of `--lora-target` names."""
    language = [one for one in known if one.part == LANGUAGE]
    if target == ALL_LINEAR:
        return language
    if target in PARTS:
        found = [one for one in known if one.part == target]
    elif target in MCORE:
        found = [one for one in language if one.mcore == target]
    else:
        # Of a short name the language model's come first: gate_proj is in some towers too.
        found = ([one for one in language if one.ends_with(target)]
                 or [one for one in known if one.ends_with(target)] or _matched(target, known))
    if not found:
        names = dict.fromkeys(one.name.split(".")[-1] for one in known)
        raise InputError(
            f"lora-target {shown(target)} names no linear layer of this model, which has "
            f"{', '.join(names)}; give {HELP}."
        )
    return found


def _matched(target: str, known: list[Linear]) -> list[Linear]:
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise InputError(
            f"lora-target {shown(target)} is no regular expression ({error}); mend it."
        ) from error
    return [one for one in known
            if pattern.fullmatch(one.name) or pattern.fullmatch(one.in_memory)]
