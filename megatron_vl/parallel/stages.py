"""Which layers of which tower live on which pipeline stage.

A model is a language model and the encoders that run before it: none, one or several towers. A
model chunk is one (stage, virtual chunk) pair. Layers run through the chunks chunk-major: all
stages of chunk 0, then all stages of chunk 1, as Megatron-Core's interleaved schedule does. The
same `StageSplit` is read by the converter, the model builder and the trainer, so a checkpoint and
the model that loads it can never disagree about where a layer is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vl.errors import InputError, shown
from megatron_vl.inputs import json_value

LANGUAGE, VISION = "llm", "vit"
WORDS = {LANGUAGE: "language", VISION: "vision"}  # of towers; others are called by their name
Rows = tuple[tuple[int, ...], ...]  # [chunk][stage]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSplit:
    """Layer counts of every tower.

    Raises:
        InputError: rows of unequal length, negative counts, an encoder that does not start on
            stage 0, or a layer of one that would run after a language layer.
    """

    llm: Rows
    encoders: tuple[tuple[str, Rows], ...] = ()  # (name, layers)

    def __post_init__(self) -> None:
        for name in self.towers:
            rows = self.rows(name)
            if not rows or any(len(row) != len(rows[0]) or not row for row in rows):
                raise InputError(
                    f"{name} layer list {shown(rows)} needs one number per pipeline stage."
                )
            if any(count < 0 for row in rows for count in row):
                raise InputError(f"{name} layer list {shown(rows)} holds a negative number.")
        for name, rows in self.encoders:
            self._check_encoder(name, rows)

    def _check_encoder(self, name: str, rows: Rows) -> None:
        word, llm = _word(name), self.flat(LANGUAGE)
        if len(self.llm) != len(rows) or len(self.llm[0]) != len(rows[0]):
            raise InputError(
                f"the {word} list {shown(rows)} and the language list {shown(self.llm)} must "
                f"have the same stages and chunks."
            )
        counts = self.flat(name)
        if any(counts) and not counts[0]:
            raise InputError(
                f"{word} layers {shown(counts)} leave stage 0 without one, but "
                f"{'pixels enter' if name == VISION else 'its input enters'} there; put at least "
                f"one {word} layer on stage 0."
            )
        last = _last(counts)
        first = min((i for i, n in enumerate(llm) if n), default=len(llm))
        if last > first:
            raise InputError(
                f"{word} layers {shown(counts)} reach stage {last} but language layers "
                f"{shown(llm)} start on stage {first}; the {word} tower must end where "
                f"the language model starts, or before."
            )

    # ---- construction -------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        *,
        layers: Mapping[str, int],
        pp: int = 1,
        vp: int = 1,
        first_stage_layers: int | None = None,
        **lists: Sequence | None,
    ) -> StageSplit:
        """The split a user asked for.

        Args:
            layers: of every tower, "llm" and the encoders.
            lists: explicit lists by tower, flat (one number a stage) or nested (a row a chunk).

        Without a list, `first_stage_layers` language layers go to stage 0 and the rest is divided
        evenly over the other stages; without either, they are divided evenly. An encoder without a
        list is whole on the first chunk of stage 0.

        Raises:
            InputError: a list that does not sum to the tower's layers, or is for a tower that the
                model lacks; or a division that leaves a remainder.
        """
        num_layers, llm = layers[LANGUAGE], lists.pop(LANGUAGE, None)
        for name, given in lists.items():
            if given is not None and name not in layers:
                raise InputError(
                    f"the {_word(name)} layer list is {shown(list(given))}, but this model has no "
                    f"{_word(name)} tower; leave it out."
                )
        if llm is not None:
            if first_stage_layers is not None:
                raise InputError("give either pp-layers or first-stage-layers, not both.")
            llm_rows = _rows(llm, pp, vp, LANGUAGE, num_layers)
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
        encoders = []
        for name, count in layers.items():
            if name == LANGUAGE:
                continue
            first = (count,) + (0,) * (pp - 1)
            given = lists.get(name)
            rows = ((first,) + ((0,) * pp,) * (vp - 1) if given is None
                    else _rows(given, pp, vp, name, count))
            encoders.append((name, rows))
        return cls(llm=llm_rows, encoders=tuple(encoders))

    @staticmethod
    def _uneven_first(num_layers, pp, vp, first) -> Rows:
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
    def towers(self) -> tuple[str, ...]:
        """Their names, in the order they run."""
        return (*(name for name, _ in self.encoders), LANGUAGE)

    @property
    def num_layers(self) -> int:
        """Of the language model."""
        return self.count(LANGUAGE)

    def rows(self, tower: str) -> Rows:
        """Layer counts of `tower`; empty if this model has no such tower."""
        return self.llm if tower == LANGUAGE else dict(self.encoders).get(tower, ())

    def flat(self, tower: str) -> list[int]:
        """Layer counts of `tower` in the order the chunks run."""
        return [count for row in self.rows(tower) for count in row]

    def count(self, tower: str) -> int:
        """Layers of `tower` in all."""
        return sum(self.flat(tower))

    def layers(self, tower: str, stage: int, chunk: int = 0) -> range:
        """Global layer numbers, from 0, that `tower` keeps on this chunk."""
        counts, at = self.flat(tower), chunk * self.pp + stage
        return range(sum(counts[:at]), sum(counts[: at + 1]))

    def find(self, tower: str, layer: int) -> tuple[int, int, int]:
        """(stage, chunk, local layer number) of global layer `layer`."""
        for at, count in enumerate(self.flat(tower)):
            if layer < count:
                return at % self.pp, at // self.pp, layer
            layer -= count
        raise IndexError(f"{tower} has no such layer")

    def end(self, tower: str) -> tuple[int, int]:
        """(stage, chunk) that holds the end of an encoder: its last norm and its projection."""
        last = _last(self.flat(tower))
        return last % self.pp, last // self.pp

    @property
    def embedding_chunk(self) -> tuple[int, int]:
        """(stage, chunk) that holds the word embedding: where the last encoder ends, else the first
        one."""
        return max((self.end(name) for name, _ in self.encoders), default=(0, 0),
                   key=lambda at: at[::-1])

    def spans(self, tower: str) -> bool:
        """Whether more than one chunk holds layers of it, whose states then travel between them."""
        return sum(1 for count in self.flat(tower) if count) > 1

    @property
    def encoders_span(self) -> bool:
        """Whether any encoder spans chunks; the word embedding is then not on the first one."""
        return any(self.spans(name) for name, _ in self.encoders)

    def to_dict(self) -> dict:
        names = (LANGUAGE, *(name for name, _ in self.encoders))
        return {name: [list(row) for row in self.rows(name)] for name in names}

    @classmethod
    def from_dict(cls, rows: Mapping[str, Sequence[Sequence[int]]]) -> StageSplit:
        towers = {name: tuple(map(tuple, of_tower)) for name, of_tower in rows.items()}
        return cls(llm=towers.pop(LANGUAGE), encoders=tuple(towers.items()))

    def __str__(self) -> str:
        def one(rows):
            return "/".join("-".join(map(str, row)) for row in rows)

        named = [(LANGUAGE, self.llm), *((_word(name), rows) for name, rows in self.encoders)]
        return ", ".join(f"{name} {one(rows)}" for name, rows in named)


def _word(tower: str) -> str:
    return WORDS.get(tower, tower)


def _last(counts: Sequence[int]) -> int:
    """Where the last layer is; 0 without any."""
    return max((at for at, count in enumerate(counts) if count), default=0)


def _rows(given: Sequence, pp: int, vp: int, tower: str, total: int) -> Rows:
    name = _word(tower)
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
