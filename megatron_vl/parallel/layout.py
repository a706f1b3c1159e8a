"""How many ranks a model is spread over in each direction, and which rank sits where.

Megatron-Core's default rank order is ``tp-cp-ep-dp-pp``: tensor-parallel neighbours are adjacent,
pipeline stages are farthest apart. `Layout` does the same arithmetic without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

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
class Layout:
    """Sizes of the parallel dimensions.

    Raises:
        InputError: a size below 1, or virtual stages without a pipeline.
    """

    tp: int = 1  # tensor parallel: ranks that share every layer
    pp: int = 1  # pipeline parallel: stages that hold different layers
    vp: int = 1  # virtual pipeline: model chunks per stage
    cp: int = 1  # context parallel: ranks that share one row's tokens
    dp: int = 1  # data parallel: ranks that see different rows
    sequence_parallel: bool = False  # split norm and residual activations over tp
    vit_data_parallel: bool = False  # tp ranks see images of their own, with a whole vision tower

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vp", "cp", "dp"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MOST:
                raise InputError(
                    f"{name} is {shown(repr(size))}; give a whole number from 1 to {MOST}."
                )
        if self.vp > 1 and self.pp == 1:
            raise InputError(f"vp {self.vp} needs a pipeline; give pp of at least 2, or vp 1.")
        if self.tp == 1:
            # One layout, one name: without tensor parallelism there is nothing to choose.
            for name in ("sequence_parallel", "vit_data_parallel"):
                object.__setattr__(self, name, False)

    @property
    def model_size(self) -> int:
        """Ranks that together hold one replica of the model."""
        return self.tp * self.pp * self.cp

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

        Each then tells the next stage its own. Not under virtual stages: Megatron-Core sends
        lengths both ways in one batch, and between the same two neighbours they are swapped.
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
        names += [f"DP{self.dp}"]
        more = "+SP" if self.sequence_parallel else ""
        return "x".join(names) + more + ("+VDP" if self.vit_data_parallel else "")
