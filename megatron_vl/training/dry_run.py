"""What a run would be, as text: its layout, what is on which stage, and what every rank holds.

Nothing is allocated and no process is started, so it may run where the run will not: a laptop tells
of a cluster. What only this machine lacks, datasets and checkpoints that are not there yet among
it, is a note; what no machine could run is refused as at a start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from megatron_vl.data.encode.model_files import check_model_files
from megatron_vl.errors import InputError
from megatron_vl.models.registry import family
from megatron_vl.ops.attention import ORDERS
from megatron_vl.parallel import LANGUAGE, Layout, StageSplit
from megatron_vl.parallel.stages import WORDS
from megatron_vl.training.activations import cross_entropy_chunks
from megatron_vl.training.checkpoint.start import check_weights, find_checkpoint, needs_load
from megatron_vl.training.epochs import with_steps
from megatron_vl.training.machine import check_machine, communication_buffers
from megatron_vl.training.memory import ChunkMemory, Held, RankMemory, copies, rank_memory
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.paths import check_outputs, datasets, mixtures
from megatron_vl.training.plan import Plan, plan_run
from megatron_vl.training.stage_memory import stage_memory
from megatron_vl.training.trace.show import trace_rows
from megatron_vl.weights.map import Where

GIB = 2**30


def dry_run(
    config: TrainConfig, *, nnodes: int, nproc_per_node: int, traced: Sequence[int] | None = None
) -> str:
    """All that can be said of a run without starting it.

    Args:
        traced: ranks whose memory is traced; empty: `telling_ranks`; None: none is.

    Raises:
        InputError: what would be refused at a start on any machine.
    """
    notes: list[str] = []
    config = _with_steps(config, notes)
    plan = plan_run(_without_missing_checkpoint(config, notes), nnodes * nproc_per_node, here=False)
    source, own = find_checkpoint(plan.config, plan.spec)
    if source is not None:
        check_weights(plan.config, plan.spec, source, own)
        notes.append(f"weights come from {source.path}, which fits this model.")
    _look_around(plan, notes)
    stages = [rank_memory(plan, stage) for stage in range(plan.layout.pp)]
    parts = [
        _head(plan, nnodes, nproc_per_node),
        "\n".join(aligned(_layer_rows(plan, stages))),
        *_expert_table(plan),
        "\n".join(aligned(_memory_rows(plan, stages))),
        "\n".join(aligned(_activation_rows(plan, stages))),
        *([] if traced is None else ["\n".join(aligned(trace_rows(plan, traced)))]),
        _sums(plan, stages),
        *_shape_tables(stages),
    ]
    if travelling := plan.spec.travelling_features(plan.split):
        layers = plan.spec.vision.num_features
        notes.append(
            f"{travelling} of the vision tower's {layers} features travel to later stages, so that "
            f"stages send {1 + travelling} times the hidden states; with {layers} language layers "
            f"where the tower ends none does."
        )
    if cut := plan.trainable.cut_within_blocks(plan.layout):
        notes.append(f"{cut}.")
    if buffers := communication_buffers(plan.layout, plan.split.embedding_chunk[0]):
        notes.append(buffers)
    if notes:
        parts.append("\n".join(f"note: {note}" for note in notes))
    return "\n\n".join(parts)


# ---- what this machine has -----------------------------------------------------------------------


def _with_steps(config: TrainConfig, notes: list[str]) -> TrainConfig:
    """The configuration with its epochs in steps, where its data are here."""
    try:
        return with_steps(config)
    except InputError as error:
        if config.data.train_data_path is None or all(
            path.exists() for path in mixtures(config)[0].paths
        ):
            raise
        notes.append(f"how many steps num-train-epochs comes to is not known: {error}")
        return config


def _without_missing_checkpoint(config: TrainConfig, notes: list[str]) -> TrainConfig:
    """The configuration without a `load` that is yet to be made, or is no longer needed."""
    checkpoint = config.checkpoint
    if checkpoint.load is None or Path(checkpoint.load).exists():
        return config
    without = replace(config, checkpoint=replace(checkpoint, load=None))
    if not needs_load(config):
        return without
    if checkpoint.hf_config is None:
        raise InputError(
            f"load {checkpoint.load} is not there yet, so the model is unknown; give --hf-config "
            f"a directory with its config.json."
        )
    notes.append(f"load {checkpoint.load} is not there yet.")
    return without


def _look_around(plan: Plan, notes: list[str]) -> None:
    """Notes on this machine; a dataset that is here is checked as at a start."""
    config = plan.config
    model = family(plan.spec.model_type)
    _note(notes, lambda: check_model_files(plan.hf_dir, plan.spec, model))
    for mixture, split in datasets(config):
        missing = [path for path in mixture.paths if not path.exists()]
        notes += [f"the dataset {path} is not there yet." for path in missing]
        if not missing:
            mixture.check(split)
    _note(notes, lambda: check_outputs(config))
    run = config.model
    asks = (run.fp8_format, run.cpu_offloading, config.offload.offload_modules,
            config.tp_overlap.tp_comm_overlap, config.optimizer.optimizer_cpu_offload,
            run.attention_backend not in (*ORDERS, "sdpa"))
    if any(asks):  # else every machine will do, and torch need not be imported
        _note(notes, lambda: check_machine(config, plan.spec))
    notes[:] = dict.fromkeys(notes)


def _note(notes: list[str], check: Callable[[], None]) -> None:
    try:
        check()
    except InputError as error:
        notes.append(f"on this machine it would be refused: {error}")


# ---- tables --------------------------------------------------------------------------------------


def _head(plan: Plan, nnodes: int, nproc_per_node: int) -> str:
    config, layout = plan.config, plan.layout
    frozen = ", ".join(part for part in plan.trainable.still
                       if plan.spec.vision is not None or part == LANGUAGE)
    kinds = [plan.precision]
    kinds += ["distributed optimizer"] if config.optimizer.use_distributed_optimizer else []
    kinds += [f"optimizer {config.optimizer.optimizer_offload_fraction:.0%} in host memory"
              ] if config.optimizer.optimizer_cpu_offload else []
    kinds += [f"frozen: {frozen}"] if frozen else []
    chunks = cross_entropy_chunks(plan)
    kinds += [f"cross-entropy in {chunks} chunks"] if chunks > 1 else []
    offloaded = config.offload.offload_modules
    kinds += [f"offloaded: {', '.join(offloaded)}, which the predicted activations still count"
              ] if offloaded else []
    form = plan.trainable.quantize_base
    kinds += [f"linear weights of the language layers in {form}"] if form is not None else []
    kinds += [plan.described_experts] if plan.described_experts else []
    return (
        f"dry run of {plan.spec.model_type}, {layout}: {plan.split}\n"
        f"{layout.world_size} processes = {nnodes} node{'s' * (nnodes > 1)} x {nproc_per_node}\n"
        f"{config.batch.global_batch_size} rows of {plan.described_length} a step = "
        f"{plan.num_microbatches} microbatches x {config.batch.micro_batch_size} rows x "
        f"{layout.dp} data ranks; {config.batch.train_iters} steps\n"
        f"{'; '.join(kinds)}"
    )


def stage_rows(layout: Layout, split: StageSplit) -> Iterable[tuple[str, ...]]:
    """What every chunk of every stage holds, below a header; layers count from 0."""
    vp, per_stage = split.vp, layout.world_size // layout.pp
    yield ("stage", *(("chunk",) if vp > 1 else ()), "ranks",
           *(f"{WORDS.get(tower, tower)} layers" for tower in split.towers))
    for stage in range(layout.pp):
        ranks = range(stage * per_stage, (stage + 1) * per_stage)
        for chunk in range(vp):
            yield (
                str(stage), *((str(chunk),) if vp > 1 else ()), _span(ranks),
                *(_span(split.layers(tower, stage, chunk)) for tower in split.towers),
            )


def expert_rows(layout: Layout, experts: int) -> Iterable[tuple[str, ...]]:
    """Where the experts of a layer lie among the ranks of its stage, below a header; both count
    from 0."""
    yield "experts of a layer", "part of each", "ranks of the stage"
    held, parts = experts // layout.ep, layout.expert_tp
    for group in range(layout.ep):
        for part in range(parts):
            ranks = [rank for rank in range(layout.world_size // layout.pp)
                     if (shard := layout.shard(rank)).ep == group and shard.tp % parts == part]
            yield (_span(range(group * held, (group + 1) * held)), f"{part + 1} of {parts}",
                   ", ".join(map(str, ranks)))


def _layer_rows(plan: Plan, stages: Sequence[RankMemory]) -> Iterable[Sequence[str]]:
    header, *rows = stage_rows(plan.layout, plan.split)
    yield *header, "and"
    chunks = [chunk for stage in stages for chunk in stage.chunks]
    for row, chunk in zip(rows, chunks, strict=True):
        yield *row, ", ".join(_ends(chunk)) or "-"


def _expert_table(plan: Plan) -> Iterable[str]:
    if plan.layout.ep > 1:
        yield "\n".join(aligned(expert_rows(plan.layout, plan.spec.decoder.experts.count)))


def _ends(chunk: ChunkMemory) -> list[str]:
    """What is on a chunk beside layers."""
    places, names = ({getattr(one, key) for one in chunk.held} for key in ("where", "name"))
    return [what for what, here in (
        ("patch embedding", Where.START in places),
        ("merger", Where.END in places),
        ("embedding", Where.EMBEDDING in places),
        ("last norm", Where.LAST in places),
        ("head", "language_model.output_layer.weight" in names),
    ) if here]


def _memory_rows(plan: Plan, stages: Sequence[RankMemory]) -> Iterable[Sequence[str]]:
    """Of each stage's ranks, in bytes."""
    host = plan.config.optimizer.optimizer_cpu_offload
    yield ("bytes of a rank", "parameters", "weights", "gradients", "optimizer", "together", "GiB",
           *(("in host memory",) if host else ()))
    for stage in stages:
        numbers = (stage.weights, stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes,
                   stage.device_bytes)
        yield (f"stage {stage.stage}", *(f"{number:,}" for number in numbers),
               f"{stage.device_bytes / GIB:.2f}", *((f"{stage.host_bytes:,}",) if host else ()))


def _activation_rows(plan: Plan, stages: Sequence[RankMemory]) -> Iterable[Sequence[str]]:
    """Of each stage's ranks, the most bytes of every moment of a step."""
    moments = {"losses": "losses", "layer": "language layer", "vision": "vision tower",
               "embedding": "embedding"}
    if plan.spec.vision is None:
        del moments["vision"]
    yield ("activations, at most", "microbatches", "kept", *moments.values(), "peak GiB",
           "with the above")
    for held in stages:
        whole = stage_memory(plan, held.stage, held=held)
        memory = whole.activations
        yield (f"on stage {held.stage}", f"{memory.in_flight:g}", f"{memory.kept:,}",
               *(f"{getattr(memory, name):,}" for name in moments), f"{memory.peak / GIB:.2f}",
               f"{whole.bytes / GIB:.2f}")


def _sums(plan: Plan, stages: Sequence[RankMemory]) -> str:
    found, layout = copies(plan), plan.layout
    parts = len(layout.shards)
    over = "TP" if layout.ep == 1 else "TP and EP"
    ranks = (f"TP {layout.tp} x PP {layout.pp} ranks" if layout.ep == 1
             else f"{parts * layout.pp} ranks, one of every part of it,")
    more = [(found.replicated, f"replicated over {over}"), (found.padding, "padding"),
            (found.tied, "tied embedding again"), (found.adapter, "of the adapter")]
    held = sum(stage.weights for stage in stages) * parts
    assert held == found.total, "a weight is counted twice, or not at all"
    return (
        f"the model has {found.model:,} parameters; {ranks} hold {held:,}"
        + "".join(f" + {number:,} {what}" for number, what in more if number).replace(
            " + ", " = " + f"{found.model:,} + ", 1)
        + "\nwhat libraries take for themselves, and gaps between tensors, come on top"
    )


def _shape_tables(stages: Sequence[RankMemory]) -> Iterable[str]:
    """Matrices of each chunk; chunks that hold the same are shown once."""
    chunks = [chunk for stage in stages for chunk in stage.chunks]

    def matrices(chunk: ChunkMemory):
        return [one for one in chunk.held if len(one.shape) > 1]

    for same, group in groupby(chunks, matrices):
        where = [f"{one.stage}" + (f".{one.chunk}" if len(stages[0].chunks) > 1 else "")
                 for one in group]
        title = f"shapes on stage {where[0]}" + (f" to {where[-1]}" if len(where) > 1 else "")
        rows = [(title, "shape", "layers", "")]
        rows += [(one.name, str(list(one.shape)), _times(one),
                  "" if one.trained else one.form or "frozen") for one in same]
        yield "\n".join(aligned(rows))


def _times(one: Held) -> str:
    """How many layers have it, and how many experts of each."""
    layers = str(one.layers) if "{i}" in one.name else "-"
    return f"{layers} x {one.experts}" if "{e}" in one.name else layers


def _span(numbers: range) -> str:
    if not numbers:
        return "-"
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def aligned(rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (cell.ljust(width) if number == 0 else cell.rjust(width)
                          for number, (cell, width) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join((first, *others)).rstrip()
