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

from pydantic import AfterValidator, BeforeValidator, Field, create_model

from megatron_vl.errors import InputError
from megatron_vl.planner.rates import LinkRates, Points, Rates, message_seconds, rate_at
from megatron_vl.platform.peaks import peak_tflops
from megatron_vl.typed import Name, Positive, Shape, read_file

UNMEASURED = Rates()
GB, TERA = 10**9, 10**12
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
    matrix_share: float = 0.7  # of peak_tflops, in products with weights
    attention_share: float = 0.5  # of peak_tflops, in scores and sums
    memory_share: float = 0.42  # of memory_tb_s, in elementwise operations, norms and the optimizer
    link_share: float = 0.75  # of node_gb_s and network_gb_s, in large messages
    node_latency_us: float = 10.0  # of a message within a node
    network_latency_us: float = 30.0  # between nodes
    host_gb_s: float = 25.0  # of one card's share of the host's memory, and of the link to it
    operation_host_us: float = 20.0  # in which Python queues one operation
    host_runs_ahead: bool = True  # Python queues while the device computes; not on a CPU
    rates: Rates = UNMEASURED  # measured; each takes the place of the share of its kind

    @property
    def room(self) -> int:
        """Bytes that a run may fill."""
        return int(self.memory_gb * GB * self.usable_memory)

    def matrix_seconds(self, flops: float, *, products: float = 1) -> float:
        """Of so many products alike, `flops` together."""
        if not self.rates.products or not flops:
            return flops / (self.peak_tflops * TERA * self.matrix_share)
        return flops / TERA / rate_at(self.rates.products, flops / products / GB)

    def attention_seconds(self, flops: float, *, length: float, backward: bool = False) -> float:
        """Of scores and sums over segments of about `length` tokens."""
        rates = self.rates.attention_backward if backward else self.rates.attention
        if not rates:
            return flops / (self.peak_tflops * TERA * self.attention_share)
        return flops / TERA / rate_at(rates, length)

    def memory_seconds(self, nbytes: float, *, operations: float = 1) -> float:
        """Of so many operations alike that read and write `nbytes` together."""
        if not self.rates.memory or not nbytes:
            return nbytes / (self.memory_tb_s * TERA * self.memory_share)
        return nbytes / TERA / rate_at(self.rates.memory, nbytes / operations / 1e6)

    def host_seconds(self, operations: float) -> float:
        """In which Python queues so many operations."""
        return operations * self.operation_host_us / 1e6

    def host_memory_seconds(self, nbytes: float) -> float:
        """In which the host reads or writes them, or a card sends them there."""
        return nbytes / (self.host_gb_s * GB)

    def link_seconds(
        self, nbytes: float, *, kind: str, within_node: bool, messages: int = 1, lanes: float = 1
    ) -> float:
        """Of so many messages that carry `nbytes` together, from one card.

        Between nodes they take `lanes` cards' ways at once.

        Args:
            kind: a field of `LinkRates`.
        """
        points = getattr(self.rates.node if within_node else self.rates.network, kind)
        if points and nbytes:
            size = nbytes / messages / 1e6
            rate, latency = size / 1e3 / message_seconds(points, size), 0.0
        elif within_node:
            rate, latency = self.node_gb_s * self.link_share, self.node_latency_us
        else:
            rate, latency = self.network_gb_s * self.link_share, self.network_latency_us
        if not within_node:
            rate = min(lanes * rate, self.node_gb_s * self.link_share)
        return nbytes / (rate * GB) + messages * latency / 1e6


def _card(
    name: str, memory: int, bandwidth: float, node: float, network: float, **shares: float
) -> Card:
    return Card(name=name, memory_gb=memory, peak_tflops=peak_tflops(name), memory_tb_s=bandwidth,
                node_gb_s=node, network_gb_s=network, **shares)


# The network is that of the makers' reference nodes: 400 Gb/s a card beside H100, H200 and MI300X,
# 200 Gb/s beside A100, A800 and 910B; of cards on PCIe, 100 Gb/s for a node of eight.
CARDS = {
    "h200": _card("NVIDIA H200", 141, 4.8, 450, 50, matrix_share=0.77),
    "h100-80g": _card("NVIDIA H100 SXM", 80, 3.35, 450, 50),
    "a100-80g": _card("NVIDIA A100 SXM 80GB", 80, 2.039, 300, 25, matrix_share=0.74),
    "a100-40g": _card("NVIDIA A100 SXM 40GB", 40, 1.555, 300, 25, matrix_share=0.74),
    "a800": _card("NVIDIA A800 SXM 80GB", 80, 2.039, 200, 25, matrix_share=0.74),
    "mi300x": _card("AMD Instinct MI300X", 192, 5.3, 448, 50),
    "910b": _card("Ascend910B2", 64, 1.6, 196, 25),
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
    "910b": r"Ascend910B[12]",
    "l40s": r"NVIDIA L40S",
    "24g": r"NVIDIA GeForce RTX 4090",
    "16g": r"NVIDIA GeForce RTX 4080",
}
SHARES = ("usable_memory", "matrix_share", "attention_share", "memory_share", "link_share")


def _line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("it must be words of one line")
    return text


_Point = Annotated[list[Positive], Field(min_length=2, max_length=2)]
_Points = Annotated[list[_Point], Field(min_length=1)]
KINDS = tuple(one.name for one in fields(LinkRates))


def _by_kind(given: object) -> object:
    return dict.fromkeys(KINDS, given) if isinstance(given, list) else given


def _table(called: str, /, **fields: object) -> type:
    return create_model(called, __base__=Shape, __cls_kwargs__={"extra": "forbid"},
                        **{field: (kind | None, None) for field, kind in fields.items()})


_BY_KIND = Annotated[_table("_BY_KIND", **dict.fromkeys(KINDS, _Points)), BeforeValidator(_by_kind)]
_LINKS = {"node": _BY_KIND, "network": _BY_KIND}
_RATES = _table("_RATES", **{one.name: _LINKS.get(one.name, _Points) for one in fields(Rates)})
_KINDS = dict.fromkeys(SHARES, Share) | {
    "name": Annotated[Name, AfterValidator(_line)], "host_runs_ahead": bool, "rates": _RATES}
_File = _table("_File", like=str,
               **{one.name: _KINDS.get(one.name, Positive) for one in fields(Card)})


def card_of(device_name: str) -> Card | None:
    """The card that a device's driver calls so; None of one that is not known."""
    return next((CARDS[name] for name, pattern in DEVICES.items()
                 if re.fullmatch(pattern, device_name)), None)


def read_card(text: str, measured: Path | None = None) -> Card:
    """The card of a name of CARDS, or of a FILE.json.

    The file has the fields of `Card`, and in `like` the name of the card that has the others.

    Args:
        measured: another such file, without `like`, whose fields take the place of the card's.

    Raises:
        InputError: no such card, or a file with an unknown field or without one that it needs.
    """
    card = CARDS[text] if text in CARDS else _of_file(text)
    return card if measured is None else calibrated(card, measured)


def calibrated(card: Card, measured: Path) -> Card:
    """The card with what was measured on one. Raises InputError as `read_card` does."""
    given = _read(measured, "--calibrate ")
    if given.pop("like", None) is not None:
        raise InputError(f"--calibrate {measured} has like, but --gpu says which card; leave it "
                         f"out.")
    return replace(card, **given)


def _of_file(text: str) -> Card:
    if not text.endswith(".json"):
        near = difflib.get_close_matches(text.lower(), CARDS, n=1)
        mend = f"did you mean {near[0]}?" if near else f"use {', '.join(CARDS)} or a FILE.json."
        raise InputError(f"--gpu {text} is no card that is known; {mend}")
    path = Path(text)
    given = _read(path, "--gpu ")
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


def _read(path: Path, what: str) -> dict:
    """The fields that a file has."""
    found = read_file(path, _File, what=what, mend="see docs/planning.md")
    given = found.model_dump(exclude_none=True)
    if "rates" not in given:
        return given
    rates = given["rates"]
    for name in rates.keys() & _LINKS:
        rates[name] = LinkRates(**_ascending(rates[name], f"{what}{path}: ", f"rates.{name}"))
    points = {name: of for name, of in rates.items() if name not in _LINKS}
    rates |= _ascending(points, f"{what}{path}: ", "rates")
    return given | {"rates": Rates(**rates)}


def _ascending(points: dict[str, list], file: str, table: str) -> dict[str, Points]:
    for name, of in points.items():
        sizes = [size for size, _ in of]
        if sizes != sorted(set(sizes)):
            raise InputError(f"{file}the sizes of {table}.{name} are {sizes}; let them ascend.")
    return {name: tuple(map(tuple, of)) for name, of in points.items()}
