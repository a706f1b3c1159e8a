"""The layouts that are compared with transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from megatron_vl.errors import InputError
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import LANGUAGE, VISION, Layout, StageSplit
from megatron_vl.parity.cases import MICROBATCHES


def check_microbatches(layout: Layout) -> None:
    """Whether the microbatches of every case can be dealt out to `layout`.

    Raises:
        InputError: more data ranks than microbatches, or too few a rank for virtual stages.
    """
    if MICROBATCHES % layout.dp:
        raise InputError(
            f"dp {layout.dp} does not divide the {MICROBATCHES} microbatches of every case; use a "
            f"dp that does."
        )
    if layout.vp > 1 and MICROBATCHES // layout.dp % layout.pp:
        raise InputError(
            f"virtual stages need a multiple of pp {layout.pp} microbatches a data rank, and dp "
            f"{layout.dp} leaves {MICROBATCHES // layout.dp} of {MICROBATCHES}; use a smaller dp."
        )


def sweep(spec: ModelSpec, ranks: int) -> Iterator[tuple[Layout, StageSplit]]:
    """Every layout of `ranks` ranks that fits the model.

    Pipelines with an even and, where there is one, an uneven first stage, and, under sequence
    parallelism or without tensor parallelism, with the vision tower over several chunks; all with
    and without two virtual stages, and with every context parallelism. With sequence parallelism
    the last of these splits again with images divided over tensor-parallel ranks. Of a model with
    experts the first of the splits again with every expert parallelism, whatever share of an expert
    a tensor-parallel rank has. Where features of the tower may travel, two stages by themselves
    also have every number of language layers on the first that lets some, none, and all but one.
    """
    sizes = [size for size in range(1, ranks + 1) if not ranks % size]
    features = 0 if spec.vision is None else spec.vision.num_features
    for cp, tp, pp, vp, sequence_parallel in product(sizes, sizes, sizes, (1, 2), (False, True)):
        if ranks % (tp * pp * cp) or (vp > 1 and pp == 1) or (sequence_parallel and tp == 1):
            continue
        layout = Layout(
            tp=tp, pp=pp, vp=vp, cp=cp, dp=ranks // (tp * pp * cp),
            sequence_parallel=sequence_parallel,
        )
        firsts = range(1, spec.decoder.num_layers) if pp > 1 else ()
        if travels := features and pp == ranks == 2 and vp == 1:
            firsts = [*range(1, features + 1), spec.decoder.num_layers - 1, 0]
        found = [split for first in (None, *firsts)
                 if (split := _fitting(spec, layout, first_stage_layers=first))]
        splits = list(dict.fromkeys(found))[: None if travels else 2]
        if spec.vision is not None and pp > 1 and (tp == 1 or sequence_parallel):
            spread = _fitting(spec, layout, **_spread(spec, pp * vp))
            splits += [spread] if spread and not _has_an_empty_chunk(spread) else []
        yield from ((layout, split) for split in splits)
        if spec.vision is not None and sequence_parallel and splits:
            yield replace(layout, vit_data_parallel=True), splits[-1]
        for divided in _divided(layout, sizes) if spec.decoder.experts and splits else ():
            if split := _fitting(spec, divided):
                yield divided, split


def _divided(layout: Layout, sizes: Sequence[int]) -> Iterator[Layout]:
    """The layout with experts divided over its ranks, which may be too few for it."""
    for ep, etp in product(sizes, sizes):
        if ep > 1 and not layout.tp % etp:
            yield replace(layout, ep=ep, etp=etp)


def _fitting(spec: ModelSpec, layout: Layout, **split) -> StageSplit | None:
    """The split, if the model and the cases fit it."""
    try:
        made = spec.split(pp=layout.pp, vp=layout.vp, **split)
        spec.check_run(layout, made)
        check_microbatches(layout)
    except InputError:
        return None
    return made


def _has_an_empty_chunk(split: StageSplit) -> bool:
    return not all(map(sum, zip(split.flat(VISION), split.flat(LANGUAGE), strict=True)))


def _spread(spec: ModelSpec, chunks: int) -> dict[str, list[int]]:
    """Vision layers on as many chunks as there are, language layers from the last of them on."""
    vision = min(spec.vision.depth, chunks)
    language = chunks - (vision - 1)

    def even(layers: int, parts: int) -> list[int]:
        return [layers // parts + (part < layers % parts) for part in range(parts)]

    return {
        VISION: [*even(spec.vision.depth, vision), *[0] * (chunks - vision)],
        LANGUAGE: [*[0] * (vision - 1), *even(spec.decoder.num_layers, language)],
    }
