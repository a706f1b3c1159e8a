"""Every layout of so many cards that a model can be trained in, as options of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vl.errors import InputError
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import LANGUAGE, Layout, StageSplit

ROWS = (1, 2, 4, 8)  # of a microbatch
RECOMPUTE_OPTIONS = ("recompute_granularity", "vit_recompute_granularity")
# Of both towers, from the fastest to the smallest.
RECOMPUTE = ({}, {"recompute_granularity": "selective"}, {"recompute_granularity": "full"})
MOST_CHUNKS = 4  # of a stage: more make a small bubble little smaller, and send all the more
LEAST_TOKENS = 128  # of a row on one rank: fewer leave a card idle


def _recompute(language: str | None, tower: str) -> dict[str, object]:
    return {"vit_recompute_granularity": tower} | (
        {"recompute_granularity": language} if language else {})


# Where a level is needed and the one before is too large: one of the towers less than that.
BETWEEN = {
    1: [_recompute(None, "selective"), _recompute(None, "full"), _recompute("selective", "none")],
    2: [_recompute(None, "full"), _recompute("selective", "full"), _recompute("full", "none"),
        _recompute("full", "selective")],
}


@dataclass(frozen=True, slots=True)
class Unfit:
    """A layout that cannot be, and the reason under which it is counted."""

    reason: str


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if not number % size]


def layouts(
    spec: ModelSpec, *, gpus: int, per_node: int, row_length: int
) -> Iterator[Layout | Unfit]:
    """Layouts of `gpus` ranks, TP within a node and with sequence parallelism."""
    number = spec.decoder.num_layers
    for tp in (size for size in divisors(gpus) if not per_node % size):
        for pp in (size for size in divisors(gpus // tp) if size <= number + 1):
            for cp in divisors(gpus // tp // pp):
                if row_length // (tp * cp) < LEAST_TOKENS and tp * cp > 1:
                    yield Unfit(f"a rank has fewer than {LEAST_TOKENS} tokens of a row")
                    continue
                yield from _of_sizes(spec, tp=tp, pp=pp, cp=cp, dp=gpus // (tp * pp * cp))


def _of_sizes(spec: ModelSpec, **sizes: int) -> Iterator[Layout | Unfit]:
    tp, pp = sizes["tp"], sizes["pp"]
    stage = tp * sizes["cp"] * sizes["dp"]
    experts = 1 if spec.decoder.experts is None else spec.decoder.experts.count
    chunks = [vp for vp in range(1, MOST_CHUNKS + 1)
              if vp == 1 or (pp > 1 and pp * vp <= spec.decoder.num_layers)]
    for ep in (size for size in divisors(experts) if not stage % size):
        for etp in (None, 1) if ep > 1 and tp > 1 else (None,):
            for whole in (False, True) if tp > 1 and spec.vision is not None else (False,):
                for vp in chunks:
                    layout = Layout(**sizes, vp=vp, ep=ep, etp=etp, sequence_parallel=True,
                                    vit_data_parallel=whole)
                    try:
                        spec.check_run(layout, any_split(spec, layout))
                    except InputError:
                        yield Unfit("TP, CP or EP does not divide the model's sizes")
                        continue
                    yield layout


def any_split(spec: ModelSpec, layout: Layout) -> StageSplit:
    """Layers by count, the tower on the first chunk."""
    return spec.split(pp=layout.pp, vp=layout.vp, **{LANGUAGE: even(spec, layout)})


def even(spec: ModelSpec, layout: Layout) -> list[list[int]]:
    """Language layers as even as they get, what is left over on the last chunks: [chunk][stage]."""
    chunks, number = layout.pp * layout.vp, spec.decoder.num_layers
    flat = [number // chunks + (at >= chunks - number % chunks) for at in range(chunks)]
    return [flat[at : at + layout.pp] for at in range(0, chunks, layout.pp)]


def options_of(layout: Layout) -> dict[str, object]:
    """The options of a run that say `layout`, those that are not the default."""
    said = {
        "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
        "num_virtual_stages_per_pipeline_rank": layout.vp, "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
    }
    return {name: size for name, size in said.items() if size > 1} | {
        name: value for name, value in (
            ("expert_tensor_parallel_size", layout.etp),
            ("sequence_parallel", layout.sequence_parallel),
            ("vit_data_parallel", layout.vit_data_parallel),
            ("overlap_grad_reduce", layout.dp * layout.cp > 1),
        ) if value
    }


