"""Which vision and language layers live on which pipeline stage.

A model chunk is one (stage, virtual chunk) pair. Layers run through the chunks chunk-major: all
stages of chunk 0, then all stages of chunk 1, as Megatron-Core's interleaved schedule does. The
same `StageSplit` is read by the converter, the model builder and the trainer, so a checkpoint and
the model that loads it can never disagree about where a layer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.errors import InputError, shown
from megatron_vl.inputs import json_value


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSplit:
    """Layer counts, `llm[chunk][stage]` and `vit[chunk][stage]`.

    Raises:
        InputError: rows of unequal length, negative counts, a vision tower that does not start on
            stage 0, or a vision layer that would run after a language layer.
    """

    llm: tuple[tuple[int, ...], ...]
    vit: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for name, rows in (("llm", self.llm), ("vit", self.vit)):
            if not rows or any(len(row) != len(rows[0]) or not row for row in rows):
                raise InputError(
                    f"{name} layer list {shown(rows)} needs one number per pipeline stage."
                )
            if any(count < 0 for row in rows for count in row):
                raise InputError(f"{name} layer list {shown(rows)} holds a negative number.")
        if len(self.llm) != len(self.vit) or len(self.llm[0]) != len(self.vit[0]):
            raise InputError(
                f"the vision list {shown(self.vit)} and the language list {shown(self.llm)} must "
                f"have the same stages and chunks."
            )
        llm_flat, vit_flat = self.flat("llm"), self.flat("vit")
        if any(vit_flat) and not vit_flat[0]:
            raise InputError(
                f"vision layers {shown(vit_flat)} leave stage 0 without one, but pixels enter "
                f"there; put at least one vision layer on stage 0."
            )
        last_vit = max((i for i, n in enumerate(vit_flat) if n), default=0)
        first_llm = min((i for i, n in enumerate(llm_flat) if n), default=len(llm_flat))
        if last_vit > first_llm:
            raise InputError(
                f"vision layers {shown(vit_flat)} reach stage {last_vit} but language layers "
                f"{shown(llm_flat)} start on stage {first_llm}; the vision tower must end where "
                f"the language model starts, or before."
            )

    # ---- construction -------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        vision_layers: int,
        pp: int = 1,
        vp: int = 1,
        first_stage_layers: int | None = None,
        llm: Sequence | None = None,
        vit: Sequence | None = None,
    ) -> StageSplit:
        """The split a user asked for.

        `llm` and `vit` are explicit lists, flat (one number a stage) or nested (a row a chunk).
        Without `llm`, `first_stage_layers` go to stage 0 and the rest is divided evenly over the
        other stages; without either, layers are divided evenly. Without `vit`, the whole vision
        tower is on the first chunk of stage 0.

        Raises:
            InputError: a list that does not sum to the model's layers, or a division that leaves a
                remainder.
        """
        if llm is not None:
            if first_stage_layers is not None:
                raise InputError("give either pp-layers or first-stage-layers, not both.")
            llm_rows = _rows(llm, pp, vp, "language", num_layers)
        elif first_stage_layers is not None and pp > 1:
            llm_rows = cls._uneven_first(num_layers, pp, vp, first_stage_layers)
        else:
            if first_stage_layers not in (None, num_layers):
                raise InputError(
                    f"first-stage-layers is {first_stage_layers} but with pp 1 stage 0 holds all "
                    f"{num_layers} layers; leave first-stage-layers unset or raise PP."
                )
            if num_layers % (pp * vp):
                raise InputError(
                    f"{num_layers} language layers do not divide over pp {pp} x vp {vp}; set "
                    f"first-stage-layers to the number stage 0 shall hold."
                )
            llm_rows = ((num_layers // (pp * vp),) * pp,) * vp
        if vit is not None:
            vit_rows = _rows(vit, pp, vp, "vision", vision_layers)
        else:
            first = (vision_layers,) + (0,) * (pp - 1)
            vit_rows = (first,) + ((0,) * pp,) * (vp - 1)
        return cls(llm=llm_rows, vit=vit_rows)

    @staticmethod
    def _uneven_first(num_layers, pp, vp, first) -> tuple[tuple[int, ...], ...]:
        rest = num_layers - first
        if first < 0 or rest < 0:
            raise InputError(
                f"first-stage-layers is {first} but the model has {num_layers} language layers; "
                f"give a number between 0 and {num_layers}."
            )
        if rest % ((pp - 1) * vp) or first % vp:
            fits = [n for n in range(num_layers + 1)
                    if not (num_layers - n) % ((pp - 1) * vp) and not n % vp and n < num_layers]
            raise InputError(
                f"first-stage-layers {first} leaves {rest} of {num_layers} language layers, which "
                f"do not divide over the other {pp - 1} stages x vp {vp}; use one of "
                f"{', '.join(map(str, fits)) or 'another pp'}."
            )
        if rest == 0:
            raise InputError(
                f"first-stage-layers {first} leaves no language layer for the other {pp - 1} "
                f"stages; give at most {num_layers - (pp - 1)}."
            )
        return ((first // vp,) + (rest // ((pp - 1) * vp),) * (pp - 1),) * vp

    # ---- questions ----------------------------------------------------------------------------

    @property
    def pp(self) -> int:
        return len(self.llm[0])

    @property
    def vp(self) -> int:
        return len(self.llm)

    @property
    def num_layers(self) -> int:
        return sum(self.flat("llm"))

    @property
    def vision_layers(self) -> int:
        return sum(self.flat("vit"))

    def flat(self, tower: str) -> list[int]:
        """Layer counts of `tower` ("llm" or "vit") in the order the chunks run."""
        return [count for row in getattr(self, tower) for count in row]

    def layers(self, tower: str, stage: int, chunk: int = 0) -> range:
        """Global layer numbers, from 0, that `tower` keeps on this chunk."""
        counts = self.flat(tower)
        at = chunk * self.pp + stage
        start = sum(counts[:at])
        return range(start, start + counts[at])

    def find(self, tower: str, layer: int) -> tuple[int, int, int]:
        """(stage, chunk, local layer number) of global layer `layer`."""
        for at, count in enumerate(self.flat(tower)):
            if layer < count:
                return at % self.pp, at // self.pp, layer
            layer -= count
        raise IndexError(f"{tower} has no such layer")

    @property
    def last_vision_chunk(self) -> tuple[int, int]:
        """(stage, chunk) that holds the end of the vision tower: its last norm and merger."""
        last = max((i for i, n in enumerate(self.flat("vit")) if n), default=0)
        return last % self.pp, last // self.pp

    @property
    def vision_spans_chunks(self) -> bool:
        """Whether more than one chunk holds vision layers, which then travel between stages."""
        return sum(1 for count in self.flat("vit") if count) > 1

    def to_dict(self) -> dict:
        return {"llm": [list(row) for row in self.llm], "vit": [list(row) for row in self.vit]}

    @classmethod
    def from_dict(cls, rows: dict) -> StageSplit:
        return cls(
            llm=tuple(tuple(row) for row in rows["llm"]),
            vit=tuple(tuple(row) for row in rows["vit"]),
        )

    def __str__(self) -> str:
        def one(rows):
            return "/".join("-".join(map(str, row)) for row in rows)

        return f"llm {one(self.llm)}, vision {one(self.vit)}"


def _rows(given: Sequence, pp: int, vp: int, name: str, total: int) -> tuple[tuple[int, ...], ...]:
    nested = given and isinstance(given[0], Sequence)
    rows = tuple(tuple(row) for row in given) if nested else (tuple(given),)
    if len(rows) == 1 and vp > 1 and len(rows[0]) == pp * vp:
        rows = tuple(rows[0][i * pp : (i + 1) * pp] for i in range(vp))
    if len(rows) != vp or any(len(row) != pp for row in rows):
        raise InputError(
            f"the {name} layer list {shown(list(given))} needs {vp} row(s) of {pp} numbers "
            f"(vp {vp}, pp {pp})."
        )
    if sum(map(sum, rows)) != total:
        raise InputError(
            f"the {name} layer list {shown(list(given))} sums to {sum(map(sum, rows))} but "
            f"config.json has {total} {name} layers."
        )
    return rows


def layer_list(text: str | None, option: str) -> list | None:
    """ "1,10,10,7" or "[[0,1],[4,3]]" -> lists."""
    if text is None:
        return None
    try:
        rows = json_value(text if text.lstrip().startswith("[") else f"[{text}]")
    except ValueError as error:
        raise InputError(
            f"{option} {shown(repr(text))} is no list; write 1,10,10,7 or [[0,1],[4,3]]."
        ) from error
    flat = [n for row in rows for n in (row if isinstance(row, list) else [row])]
    even = len({isinstance(row, list) for row in rows}) == 1
    if not even or not all(isinstance(n, int) and not isinstance(n, bool) for n in flat):
        raise InputError(
            f"{option} {shown(repr(text))} is no list of whole numbers; write 1,10,10,7."
        )
    return rows
