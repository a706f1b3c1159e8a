"""A family's weights expanded over layers, stages and TP ranks: which tensor holds what, where.

`WeightMap` is what a family states: one `Weight` a kind of tensor, with the rule between its
published and its Megatron-Core form, and the place in the model it belongs to. From it follow the
inventories, lists of `Stored`, of the same model in any kind of checkpoint and any layout. A gap, a
surplus or a collision is an error that names the keys.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vl.errors import InputError, shown
from megatron_vl.parallel import Layout, Shard, StageSplit
from megatron_vl.parallel.stages import LANGUAGE
from megatron_vl.weights.rules import Piece, Rule
from megatron_vl.weights.stacks import Stack, are_turned, written_turned

SHOWN = 4  # keys an error message spells out
RANK_FILE = "model_optim_rng.pt"  # in a directory for each rank
Shapes = Mapping[tuple[str, str, str], tuple[int, ...]]  # of tensors, by `Stored.id`


class Where(enum.Enum):
    """Which model chunk keeps a weight of a tower."""

    START = "where an encoder's input enters: stage 0"
    LAYER = "where its layer is"
    END = "where an encoder ends: its last norm and its projection"
    EMBEDDING = "where the encoders' features meet text: the chunk of the last END"
    LAST = "the last chunk of the last stage"
    LAST_COPY = "as LAST, a copy that is left out where the embedding itself is"


@dataclass(frozen=True, slots=True)
class Place:
    """Which model chunk keeps a weight: `Where`, and of which tower."""

    where: Where
    tower: str = LANGUAGE


EMBEDDING, LAST, LAST_COPY = map(Place, (Where.EMBEDDING, Where.LAST, Where.LAST_COPY))


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One kind of tensor: `{i}` in its names stands for a layer, `{e}` for an expert."""

    place: Place
    name: str  # Megatron-Core's; `{i}` counts the layers of one chunk
    rule: Rule  # with published names; `{i}` counts the layers of the model
    constant: bool = False  # stored with the others; trained only if a run asks for it
    experts: int | None = None  # of a layer, with a tensor each; None: there is no `{e}`

    @property
    def each(self) -> range:
        """The numbers that `{e}` takes."""
        return range(1 if self.experts is None else self.experts)

    def held(self, layout: Layout, shard: Shard) -> range:
        """Those of the experts in one part of a stage's weights.

        Raises:
            InputError: `ep` does not divide the experts.
        """
        if self.experts is None:
            return self.each
        if self.experts % layout.ep:
            raise InputError(
                f"EP {layout.ep} does not divide the {self.experts} experts of a layer; use an EP "
                f"that does."
            )
        size = self.experts // layout.ep
        return range(shard.ep * size, (shard.ep + 1) * size)

    def tp_of(self, layout: Layout, shard: Shard) -> tuple[int, int]:
        """(ranks that share a tensor, which of them has this part)."""
        if self.experts is None:
            return layout.tp, shard.tp
        return layout.expert_tp, shard.tp % layout.expert_tp

    def named(self, layer: int, expert: int) -> str:
        """Megatron-Core's name of one tensor."""
        return self.name.replace("{i}", str(layer)).replace("{e}", str(expert))

    def stacked(self, layer: int | None = None) -> str:
        """The name under which torch_dist keeps the tensors of all layers, or of one, as one."""
        name = self.name.replace(".local_experts.{e}.", ".experts.")
        return name.replace("{i}.", "" if layer is None else f"{layer}.")

    def rule_of(self, layer: int, expert: int) -> Rule:
        """The rule of one tensor; both numbers count those of the model."""
        return self.rule.numbered(i=layer, e=expert)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One tensor of a checkpoint and what it holds of the published ones."""

    file: str  # relative to the checkpoint; "" while the files are not decided
    part: str  # "model", "model0".. inside a torch-format file, else ""
    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    of: tuple[str, int] | None = None  # a file's tensor that it is a part of, and its place in that

    @property
    def id(self) -> tuple[str, str, str]:
        return self.file, self.part, self.name

    @property
    def tensor(self) -> str:
        """Name of the file's tensor: its own, or of what it is a part of."""
        return self.of[0] if self.of else self.name

    @property
    def numel(self) -> int:
        return volume(self.shape)

    def __str__(self) -> str:
        return ":".join(filter(None, (self.file, self.part, self.name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPart:
    """A part of a tensor that a torch_dist checkpoint holds by itself."""

    name: str  # of the tensor
    at: tuple[int, ...]  # its place in the dimensions in which layers, and experts, are stacked
    stack: tuple[int, ...]  # the extents of these, which are the tensor's first
    stored: Stored  # the part, without them


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMap:
    """All weights of one model.

    Raises:
        InputError: two weights with the same name, or that hold the same published tensor.
    """

    source: str  # file a missing weight is to be added to, for error messages
    layers: Mapping[str, int]  # of every tower, in the order they run
    weights: tuple[Weight, ...]
    renamed: tuple[tuple[str, str], ...] = ()  # (prefix some files use, the published prefix)
    hf_copies: tuple[tuple[str, str], ...] = ()  # (key that may be there, key it is a copy of)
    hf_ignored: tuple[str, ...] = ()  # patterns of published keys that are no weights
    mcore_ignored: tuple[str, ...] = ()  # patterns of Megatron-Core keys that are no weights
    directions: tuple[str, ...] = ()  # published keys of which the rows' lengths do not count
    stacks: tuple[Stack, ...] = ()  # how files may hold the experts of a layer as one
    stacked: bool = False  # the published ones do
    partial: bool = False  # take a checkpoint that lacks keys: inventories are of what is there

    def __post_init__(self) -> None:
        names = [w.name for w in self.weights]
        keys = [key for w in self.weights if w.place != LAST_COPY
                for key in w.rule.published()]
        for what, found in (("Megatron-Core name", names), ("published key", keys)):
            twice = sorted({one for one in found if found.count(one) > 1})
            if twice:
                raise InputError(f"{what} {listed(twice)} appears twice in {self.source}.")

    # ---- the published form -------------------------------------------------------------------

    def published(self) -> dict[str, tuple[int, ...]]:
        """Shape of every published tensor, in the order of the model."""
        shapes: dict[str, tuple[int, ...]] = {}
        for place in self.places:
            for weight, i, e in self._tensors(place):
                shapes.update(weight.rule_of(i, e).published())
        return shapes

    def counts(self) -> dict[str, int]:
        """Numbers that the model has of every kind of weight, under its Megatron-Core name."""
        return {
            weight.name: len(self._layers(weight.place)) * len(weight.each)
            * sum(map(volume, weight.rule.published().values()))
            for weight in self.weights if weight.place != LAST_COPY
        }

    @property
    def constants(self) -> frozenset[str]:
        """Megatron-Core names of the constant weights."""
        return frozenset(weight.name for weight in self.weights if weight.constant)

    def published_name(self, key: str) -> str:
        """The published name of a key as some file spells it."""
        for old, new in self.renamed:
            if key.startswith(old):
                return new + key.removeprefix(old)
        return key

    def in_memory_name(self, key: str) -> str:
        """What transformers calls a published key's module; the inverse of `published_name`."""
        for old, new in self.renamed:
            if key.startswith(new):
                return old + key.removeprefix(new)
        return key

    def hf_inventory(self, found: Shapes | None = None) -> list[Stored]:
        """The published tensors, whole; of stacked experts each by itself, one after the other.

        Args:
            found: the shape of every tensor that is there, by `Stored.id`; None: as published.

        Raises:
            InputError: `found` lacks keys, holds unknown ones, or experts twice; or `are_turned`.
        """
        shapes = self.published()
        if found is None:
            return self._as_published(shapes)
        files, copies = {name: file for file, _, name in found}, dict(self.hf_copies)
        parts = self._found_parts(files, {name: shape for (*_, name), shape in found.items()})
        held = {piece.key: one for one in parts for piece in one.pieces}
        if twice := sorted(held.keys() & files.keys()):
            key, part = twice[0], held[twice[0]]
            raise InputError(f"{key} is in {files[key]} and again, within {part.tensor}, in "
                             f"{part.file}; remove one of them.")
        known = {*shapes, *copies, *(one.tensor for one in parts)}
        extra = [name for name in files if name not in known
                 and not _matches(self.hf_ignored, name)]
        missing = [key for key in shapes if key not in files and key not in held]
        self._complain("published", self._named_whole(missing), extra)
        wanted = {**{key: key for key in shapes}, **copies}
        wanted = {name: key for name, key in wanted.items() if name in files}
        whole = [_whole(files[name], name, key, shapes[key]) for name, key in wanted.items()]
        return [*whole, *parts]

    def _as_published(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Stored]:
        """What published files hold of the tensors of these shapes, by their keys."""
        parts = {
            piece.key: part
            for layer in (self._stacks() if self.stacked else ())
            for stack in layer
            for part in _parts("", stack, written_turned(layer)) for piece in part.pieces
        }
        tensors: dict[str, dict[str, Stored]] = {}  # of a file, and the parts of each
        for key, shape in shapes.items():
            one = parts.get(key) or whole_tensor(key, shape)
            tensors.setdefault(one.tensor, {})[one.name] = one
        return [one for tensor in tensors.values() for one in tensor.values()]

    def _stacks(self) -> Iterator[list[Stack]]:
        """Those of a layer, layer after layer."""
        for i in range(self.layers[LANGUAGE] if self.stacks else 0):
            yield [stack.numbered(i) for stack in self.stacks]

    def _found_parts(
        self, files: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> list[Stored]:
        """Each expert of the stacked ones that are there."""
        return [part for layer in self._stacks()
                for stack in layer if stack.name in files
                for part in _parts(files[stack.name], stack, are_turned(layer, shapes))]

    def _named_whole(self, missing: Sequence[str]) -> list[str]:
        """Names of missing tensors; of experts that are published as one, and all missing, that."""
        if not (self.stacked and missing):
            return list(missing)
        whole, lacking = {}, set(missing)
        for stack in (one for layer in self._stacks() for one in layer):
            keys = [key for e in range(stack.experts) for key in stack.keys_of(e)]
            if lacking.issuperset(keys):
                whole |= dict.fromkeys(keys, stack.name)
        return list(dict.fromkeys(whole.get(key, key) for key in missing))

    # ---- Megatron-Core's forms ----------------------------------------------------------------

    def mcore_inventory(
        self, *, split: StageSplit, layout: Layout, found: Shapes | None = None
    ) -> list[Stored]:
        """What every rank's file holds in the torch format, file after file.

        `found` gives the shape of every tensor that is there, by `Stored.id`; None: as we pad them.
        """
        return [
            stored
            for stage in range(split.pp)
            for shard in layout.shards
            for chunk in range(split.vp)
            for stored in self.chunk_inventory(
                split=split, layout=layout, shard=shard, stage=stage, chunk=chunk, found=found
            )
        ]

    def chunk_inventory(
        self, *, split: StageSplit, layout: Layout, shard: Shard, stage: int, chunk: int = 0,
        found: Shapes | None = None,
    ) -> list[Stored]:
        """What one model chunk of a rank with this shard holds; `found` as in `mcore_inventory`."""
        file, of_first = (rank_file(layout, one, stage) for one in (shard, Shard()))
        part = f"model{chunk}" if split.vp > 1 else "model"
        stored = []
        for weight, layer, local in self.chunk_weights(split, stage, chunk):
            tp, rank = weight.tp_of(layout, shard)
            for place, e in enumerate(weight.held(layout, shard)):
                name, rule = weight.named(local, place), weight.rule_of(layer, e)
                # All ranks by the first one's shapes, so that ranks that differ do not fit.
                if found is not None and (of_first, part, name) in found:
                    rule = rule.as_stored(found[of_first, part, name], tp)
                shape, pieces = rule.pieces(tp, rank)
                stored.append(Stored(file=file, part=part, name=name, shape=shape, pieces=pieces))
        return stored

    def chunk_weights(
        self, split: StageSplit, stage: int, chunk: int
    ) -> Iterator[tuple[Weight, int, int]]:
        """(weight, global layer, local layer) of one model chunk; layers are 0 where none."""
        here, last = (stage, chunk), (split.pp - 1, split.vp - 1)
        for place in self.places:
            if place.where is Where.LAYER:
                layers = split.layers(place.tower, stage, chunk)
            else:
                holds = {
                    Where.START: here == (0, 0),
                    Where.END: place.tower != LANGUAGE and here == split.end(place.tower),
                    Where.EMBEDDING: here == split.embedding_chunk,
                    Where.LAST: here == last,
                    Where.LAST_COPY: here == last and here != split.embedding_chunk,
                }
                layers = range(holds[place.where])
            for local, layer in enumerate(layers):
                for weight in self.at(place):
                    yield weight, layer, local

    def global_inventory(self, found: Mapping[str, tuple[int, ...]]) -> list[Stored]:
        """What a torch_dist checkpoint holds: whole tensors, layers stacked or numbered.

        `found` gives the shape of every tensor that is there.

        Raises:
            InputError: gaps, surpluses or wrong shapes, named.
        """
        inventory, missing, used = [], [], set()
        for place in self.places:
            if place == LAST_COPY:  # tied: stored once, under the embedding's name
                continue
            for weight in self.at(place):
                for i in self._layers(place):
                    stacked, numbered = weight.stacked(), weight.stacked(i)
                    name = stacked if stacked in found else numbered
                    if name not in found:
                        missing.append(numbered)
                        continue
                    used.add(name)
                    for e in weight.each:
                        at, stack = self._in_stack(weight, i, e, layers=name != numbered)
                        rule = weight.rule_of(i, e).as_stored(found[name][len(stack):], 1)
                        shape, pieces = rule.pieces(1, 0)
                        inventory.append(Stored(
                            file="", part="", name=name, shape=(*stack, *shape),
                            pieces=tuple(_stacked(piece, at) for piece in pieces),
                        ))
        extra = [name for name in found if name not in used
                 and not _matches(self.mcore_ignored, name)]
        self._complain("Megatron-Core", missing, extra)
        return inventory

    def global_chunks(self) -> list[TensorPart]:
        """What a torch_dist checkpoint is written as: whole tensors, a chunk a layer or expert."""
        parts = []
        for place in self.places:
            for weight, i, e in () if place == LAST_COPY else self._tensors(place):
                at, stack = self._in_stack(weight, i, e)
                stored = _of_rule(weight.named(i, e), weight.rule_of(i, e))
                parts.append(TensorPart(name=weight.stacked(), at=at, stack=stack, stored=stored))
        return parts

    def _in_stack(
        self, weight: Weight, layer: int, expert: int, *, layers: bool = True
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(place, extents) in the dimensions in which torch_dist stacks a weight's tensors."""
        stack = []
        if layers and weight.place.where is Where.LAYER:
            stack.append((layer, len(self._layers(weight.place))))
        if weight.experts is not None:
            stack.append((expert, weight.experts))
        return tuple(at for at, _ in stack), tuple(size for _, size in stack)

    def match_mcore(
        self, expected: Iterable[Stored], found: Iterable[tuple[str, str, str]]
    ) -> None:
        """Whether a torch-format checkpoint holds just what the layout asks for.

        Raises:
            InputError: gaps and surpluses, named.
        """
        want, have = {stored.id for stored in expected}, set(found)
        self._complain(
            "Megatron-Core",
            [":".join(one) for one in sorted(want - have)],
            [":".join(one) for one in sorted(have - want)
             if not _matches(self.mcore_ignored, one[2])],
        )

    # ---- parts --------------------------------------------------------------------------------

    def at(self, place: Place) -> list[Weight]:
        return [weight for weight in self.weights if weight.place == place]

    @property
    def places(self) -> list[Place]:
        """In the order of the model."""
        encoders = [Place(where, tower) for tower in self.layers if tower != LANGUAGE
                    for where in (Where.START, Where.LAYER, Where.END)]
        return [*encoders, EMBEDDING, Place(Where.LAYER), LAST, LAST_COPY]

    def _tensors(self, place: Place) -> Iterator[tuple[Weight, int, int]]:
        """(weight, layer, expert) of every tensor at a place, layer after layer."""
        for layer in self._layers(place):
            for weight in self.at(place):
                for expert in weight.each:
                    yield weight, layer, expert

    def _layers(self, place: Place) -> range:
        return range(self.layers[place.tower] if place.where is Where.LAYER else 1)

    def _complain(self, kind: str, missing: list[str], extra: list[str]) -> None:
        if missing and not self.partial:
            raise InputError(
                f"{len(missing)} {kind} key(s) are missing: {listed(missing)}; use a complete "
                f"checkpoint and the config.json it was made with."
            )
        if extra:
            raise InputError(
                f"{len(extra)} {kind} key(s) are unmapped: {listed(extra)}; add them to "
                f"{self.source} or remove them from the checkpoint."
            )


def rank_file(layout: Layout, shard: Shard, pp: int) -> str:
    """Megatron's path of one rank's file, relative to the iteration's directory."""
    suffix = f"_{pp:03d}" if layout.pp > 1 else ""
    suffix += f"_{shard.ep:03d}" if layout.ep > 1 else ""
    return f"mp_rank_{shard.tp:02d}{suffix}/{RANK_FILE}"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown(name) for name in names[:SHOWN]) + more


def volume(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def whole_tensor(key: str, shape: tuple[int, ...]) -> Stored:
    """A published tensor under its own name, no file decided."""
    return _whole("", key, key, shape)


def _whole(file: str, name: str, key: str, shape: tuple[int, ...]) -> Stored:
    zeros = (0,) * len(shape)
    piece = Piece(key=key, start=zeros, at=zeros, shape=shape)
    return Stored(file=file, part="", name=name, shape=shape, pieces=(piece,))


def _parts(file: str, stack: Stack, turned: bool) -> Iterator[Stored]:
    """The experts of a stack."""
    for e in range(stack.experts):
        shape, pieces = stack.pieces(e, turned)
        yield Stored(file=file, part="", name=f"{stack.name}[{e}]", shape=shape, pieces=pieces,
                     of=(stack.name, e))


def _of_rule(name: str, rule: Rule) -> Stored:
    shape, pieces = rule.pieces(1, 0)
    return Stored(file="", part="", name=name, shape=shape, pieces=pieces)


def _stacked(piece: Piece, at: tuple[int, ...]) -> Piece:
    """The piece inside a tensor that has dimensions in front: `at` gets as many numbers more."""
    return replace(piece, at=(*at, *piece.at))


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
