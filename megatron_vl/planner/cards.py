"""What cards and the links between them can do, and which share of it a training step gets.

Peaks are the makers' data sheets'; their GB are taken as 10^9 bytes. Links are in one direction,
of one card. Shares are stated once, in `Card`; docs/planning.md says where each comes from. A
FILE.json replaces any of these numbers.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, create_model

from megatron_vl.errors import InputError
from megatron_vl.platform.peaks import peak_tflops
from megatron_vl.typed import Positive, Shape, read_file

GB = 10**9
Share = Annotated[Positive, Field(le=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One card in its node."""

    name: str  # as its maker calls it
    memory_gb: float
    peak_tflops: float  # dense bf16 products, 10^12 FLOPs a second
    memory_tb_s: float  # bandwidth of its memory, 10^12 bytes a second
    node_gb_s: float  # to other cards of the node, 10^9 bytes a second
    network_gb_s: float  # of one card to other nodes

    usable_memory: float = 0.92  # the rest is for libraries, and for gaps between tensors
    matrix_share: float = 0.77  # of peak_tflops, in products with weights
    attention_share: float = 0.2  # of peak_tflops, in scores and sums
    memory_share: float = 0.42  # of memory_tb_s, in elementwise operations, norms and the optimizer
    link_share: float = 0.75  # of node_gb_s and network_gb_s, in large messages
    node_latency_us: float = 10.0  # of a message within a node
    network_latency_us: float = 30.0  # between nodes
    layer_host_us: float = 4700.0  # in which Python queues the forward and backward of a layer

    @property
    def room(self) -> int:
        """Bytes that a run may fill."""
        return int(self.memory_gb * GB * self.usable_memory)

    def matrix_seconds(self, flops: float) -> float:
        return flops / (self.peak_tflops * 1e12 * self.matrix_share)

    def attention_seconds(self, flops: float) -> float:
        return flops / (self.peak_tflops * 1e12 * self.attention_share)

    def memory_seconds(self, nbytes: float) -> float:
        return nbytes / (self.memory_tb_s * 1e12 * self.memory_share)

    def link_seconds(self, nbytes: float, *, within_node: bool, messages: int = 1) -> float:
        """Of so many messages that carry `nbytes` together, from one card."""
        rate = self.node_gb_s if within_node else self.network_gb_s
        latency = self.node_latency_us if within_node else self.network_latency_us
        return nbytes / (rate * GB * self.link_share) + messages * latency / 1e6


def _card(name: str, memory: int, bandwidth: float, node: float, network: float) -> Card:
    return Card(name=name, memory_gb=memory, peak_tflops=peak_tflops(name), memory_tb_s=bandwidth,
                node_gb_s=node, network_gb_s=network)


# The network is that of the makers' reference nodes: 400 Gb/s a card beside H100, H200 and MI300X,
# 200 Gb/s beside A100, A800 and 910B; of cards on PCIe, 100 Gb/s for a node of eight.
CARDS = {
    "h200": _card("NVIDIA H200", 141, 4.8, 450, 50),
    "h100-80g": _card("NVIDIA H100 SXM", 80, 3.35, 450, 50),
    "a100-80g": _card("NVIDIA A100 SXM 80GB", 80, 2.039, 300, 25),
    "a100-40g": _card("NVIDIA A100 SXM 40GB", 40, 1.555, 300, 25),
    "a800": _card("NVIDIA A800 SXM 80GB", 80, 2.039, 200, 25),
    "mi300x": _card("AMD Instinct MI300X", 192, 5.3, 448, 50),
    "910b": _card("Ascend910B1", 64, 1.6, 196, 25),
    "l40s": _card("NVIDIA L40S", 48, 0.864, 32, 1.56),
    "24g": _card("NVIDIA GeForce RTX 4090", 24, 1.008, 32, 1.56),
    "16g": _card("NVIDIA GeForce RTX 4080", 16, 0.717, 32, 1.56),
}
# What drivers call these cards; others of nearly the same name have other rates.
DEVICES = {
    "h200": r"NVIDIA H200",
    "h100-80g": r"NVIDIA H100 80GB HBM3",
    "a100-80g": r"(NVIDIA )?A100-SXM4-80GB",
    "a100-40g": r"(NVIDIA )?A100-SXM4-40GB",
    "a800": r"NVIDIA A800-SXM4-80GB",
    "mi300x": r"AMD Instinct MI300X.*",
    "910b": r"Ascend910B\d",
    "l40s": r"NVIDIA L40S",
    "24g": r"NVIDIA GeForce RTX 4090",
    "16g": r"NVIDIA GeForce RTX 4080",
}
SHARES = ("usable_memory", "matrix_share", "attention_share", "memory_share", "link_share")
_File = create_model(
    "_File", __base__=Shape,
    __cls_kwargs__={"extra": "forbid"},
    like=(str | None, None),
    name=(str | None, None),
    **{one.name: ((Share if one.name in SHARES else Positive) | None, None)
       for one in fields(Card) if one.name != "name"},
)


def card_of(device_name: str) -> Card | None:
    """The card that a device's driver calls so; None of one that is not known."""
    return next((CARDS[name] for name, pattern in DEVICES.items()
                 if re.fullmatch(pattern, device_name)), None)


def read_card(text: str) -> Card:
    """The card of a name of CARDS, or of a FILE.json.

    The file has the fields of `Card`, and in `like` the name of the card that has the others.

    Raises:
        InputError: no such card, or a file with an unknown field or without one that it needs.
    """
    if text in CARDS:
        return CARDS[text]
    if not text.endswith(".json"):
        near = difflib.get_close_matches(text.lower(), CARDS, n=1)
        mend = f"did you mean {near[0]}?" if near else f"use {', '.join(CARDS)} or a FILE.json."
        raise InputError(f"--gpu {text} is no card that is known; {mend}")
    path = Path(text)
    given = read_file(path, _File, what="--gpu ", mend="see docs/planning.md").model_dump(
        exclude_none=True)
    like = given.pop("like", None)
    if like is not None and like not in CARDS:
        raise InputError(f"--gpu {path}: like is {like!r}; use one of {', '.join(CARDS)}.")
    if like is not None:
        return replace(CARDS[like], **given)
    missing = [one.name for one in fields(Card) if one.default is MISSING and one.name not in given]
    if missing:
        raise InputError(
            f"--gpu {path} has no {', '.join(missing)}; add them, or in like the name of the card "
            f"that has them."
        )
    return Card(**given)
