"""How many ranks a model is spread over in each direction, and which rank sits where.

Megatron-Core's default rank order is ``tp-cp-ep-dp-pp``: tensor-parallel neighbours are adjacent,
pipeline stages are farthest apart. `Layout` does the same arithmetic without torch.

Experts have an order of their own, ``etp-ep-edp-pp``, over the same ranks of a stage: those that
share an expert are adjacent, then come those with the others. So the experts of a layer lie on
tensor, context and data ranks, wherever `etp` leaves them room.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from megatron_vl.errors import InputError, shown

MOST = 2**20  # ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Where one rank sits; every field counts from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Which part of a stage's weights a rank holds; both fields count from 0."""

    tp: int = 0
    ep: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the parallel dimensions.

    Raises:
        InputError: a size below 1, virtual stages without a pipeline, or an `etp` that
            Megatron-Core has not.
    """

    tp: int = 1  # tensor parallel: ranks that share every layer
    pp: int = 1  # pipeline parallel: stages that hold different layers
    vp: int = 1  # virtual pipeline: model chunks per stage
    cp: int = 1  # context parallel: ranks that share one row's tokens
    dp: int = 1  # data parallel: ranks that see different rows
    ep: int = 1  # expert parallel: ranks that hold different experts of a layer
    etp: int | None = None  # ranks that share an expert; None: `tp`
    sequence_parallel: bool = False  # split norm and residual activations over tp
    vit_data_parallel: bool = False  # tp ranks see images of their own, with a whole vision tower

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vp", "cp", "dp", "ep", "etp"):
            size = getattr(self, name)
            if name == "etp" and size is None:
                continue
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MOST:
                raise InputError(
                    f"{name} is {shown(repr(size))}; give a whole number from 1 to {MOST}."
                )
        if self.vp > 1 and self.pp == 1:
            raise InputError(f"vp {self.vp} needs a pipeline; give pp of at least 2, or vp 1.")
        if self.etp == self.tp:
            object.__setattr__(self, "etp", None)
        elif self.etp is not None and (self.ep == 1 or self.tp % self.etp):
            # Megatron-Core reduces the gradients of experts apart from others' only under EP; and
            # its files, named by TP and EP rank, do not tell a larger etp's ranks apart.
            raise InputError(
                f"etp {self.etp} with tp {self.tp} and ep {self.ep} is not supported; give an etp "
                f"that divides tp, together with an ep of at least 2, or leave it out."
            )
        if self.tp == 1:
            # One layout, one name: without tensor parallelism there is nothing to choose.
            for name in ("sequence_parallel", "vit_data_parallel"):
                object.__setattr__(self, name, False)

    @property
    def model_size(self) -> int:
        """Ranks that together hold one replica of the model."""
        return self.tp * self.pp * self.cp

    @property
    def expert_tp(self) -> int:
        """Ranks that share an expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.tp * self.cp * self.dp // (self.expert_tp * self.ep)

    @property
    def shards(self) -> list[Shard]:
        """The parts that a stage's weights are in, every one that some rank holds."""
        # Tensor-parallel ranks of one group of etp have like experts; groups that are a multiple of
        # this apart have, too.
        period = gcd(self.tp // self.expert_tp, self.ep)
        return [Shard(tp=tp, ep=ep) for tp in range(self.tp)
                for ep in range(tp // self.expert_tp % period, self.ep, period)]

    @property
    def cut(self) -> dict[str, int]:
        """The sizes that say how the weights of a checkpoint are cut, by their names here."""
        names = ["tp", "pp", "vp", *(["ep"] if self.ep > 1 else []), *(["etp"] if self.etp else [])]
        return {name: getattr(self, name) for name in names}

    @property
    def vit_tp(self) -> int:
        """Ranks that share every vision layer."""
        return 1 if self.vit_data_parallel else self.tp

    @property
    def media_ranks(self) -> int:
        """Ranks that a microbatch's images and videos are divided over."""
        return self.cp * (self.tp // self.vit_tp)

    @property
    def row_parts(self) -> int:
        """Ranks that a row's hidden states are cut over."""
        return self.cp * (self.tp if self.sequence_parallel else 1)

    @property
    def lengths_vary(self) -> bool:
        """Whether microbatches may differ in the length of their rows.

        Not under virtual stages: a schedule of chunks that take turns takes tensors of one shape.
        """
        return self.vp == 1

    @property
    def world_size(self) -> int:
        return self.model_size * self.dp

    @classmethod
    def for_world(cls, world_size: int, **sizes) -> Layout:
        """The layout that fills `world_size` ranks: dp is what tp, pp and cp leave.

        Raises:
            InputError: the world is not a multiple of tp x pp x cp.
        """
        one = cls(**sizes)
        if world_size % one.model_size:
            raise InputError(
                f"{world_size} processes cannot hold tp {one.tp} x pp {one.pp} x cp {one.cp} = "
                f"{one.model_size}; start a multiple of {one.model_size} processes."
            )
        return cls(**sizes, dp=world_size // one.model_size)

    def shard(self, rank: int) -> Shard:
        """Which part of its stage's weights a rank holds."""
        at = self.coordinates(rank)
        place = at.tp + self.tp * (at.cp + self.cp * at.dp)
        return Shard(tp=at.tp, ep=place // self.expert_tp % self.ep)

    def first_with_its_shard(self, rank: int) -> bool:
        """Whether no rank before it, of its stage, holds the same part of the weights."""
        stage = self.coordinates(rank).pp
        before = range(stage * (self.world_size // self.pp), rank)
        return self.shard(rank) not in map(self.shard, before)

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.world_size:
            raise InputError(f"rank {rank} is outside this layout's 0..{self.world_size - 1}.")
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        pp, dp = divmod(rank, self.dp)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, at: Coordinates) -> int:
        return at.tp + self.tp * (at.cp + self.cp * (at.dp + self.dp * at.pp))

    def __str__(self) -> str:
        names = [f"TP{self.tp}", f"PP{self.pp}"]
        names += [f"VP{self.vp}"] if self.vp > 1 else []
        names += [f"CP{self.cp}"] if self.cp > 1 else []
        names += [f"EP{self.ep}"] if self.ep > 1 else []
        names += [f"ETP{self.etp}"] if self.etp else []
        names += [f"DP{self.dp}"]
        more = "+SP" if self.sequence_parallel else ""
        return "x".join(names) + more + ("+VDP" if self.vit_data_parallel else "")
