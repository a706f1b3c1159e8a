"""Megatron-Core checkpoints on disk: found, described, opened, and laid out to be filled.

The `torch` format is a directory of one file a (TP, PP, EP) rank:

    latest_checkpointed_iteration.txt            "release", or the iteration
    release/mp_rank_{tp:02d}[_{pp:03d}][_{ep:03d}]/model_optim_rng.pt
        {"args", "checkpoint_version": 3.0, "iteration", "model"}      model0, model1.. with VP

The `torch_dist` format, which the trainer writes, is the matter of `torch_dist.py`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import model_validator

from megatron_vl.errors import InputError, shown
from megatron_vl.parallel import LANGUAGE, VISION, Layout, Shard, StageSplit
from megatron_vl.typed import Count, Name, Shape, Size, typed
from megatron_vl.weights.dtypes import WEIGHTS, DType
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.found import (
    LATEST,
    RELEASE,
    Wanted,
    latest,
    mcore_format,
    no_checkpoint,
)
from megatron_vl.weights.map import RANK_FILE, Stored, TensorPart, WeightMap, rank_file
from megatron_vl.weights.torch_dist import lay_out_torch_dist, open_torch_dist, read_common
from megatron_vl.weights.torch_file import lay_out_torch_file, map_tensor, open_torch_file

ENTRY = "megatron_vl"  # of a checkpoint's `args`, or of torch_dist's common.pt: our own description

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_GROUPED = re.compile(r"(?<=\.mlp\.experts\.)(linear_fc[12])\.weight(\d+)")  # as TEGroupedMLP
_LAYER = re.compile(r"(language_model|vision_model)\.decoder\.layers\.(\d+)\.")


class _Sizes(Shape):
    tp: Size = 1
    pp: Size = 1
    vp: Size = 1
    ep: Size = 1
    etp: Size | None = None


class _Noted(Shape):
    """A checkpoint's ENTRY; empty in those of other tools."""

    model_type: Name | None = None
    dtype: Name | None = None
    layout: _Sizes = _Sizes()
    split: dict[Name, list[list[Count]]] | None = None  # by tower; see `StageSplit.to_dict`
    adapter: dict[Name, Any] | None = None  # what is trained beside the weights of a model

    @property
    def stages(self) -> StageSplit | None:
        return None if self.split is None else StageSplit.from_dict(self.split)

    @property
    def sizes(self) -> Layout:
        return Layout(**self.layout.model_dump())

    @model_validator(mode="after")
    def _is_one(self) -> _Noted:
        assert self.split is None or LANGUAGE in self.split, "its split names no language model"
        assert self.sizes and (self.split is None or self.stages)
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """What a checkpoint says about itself, without its weights."""

    format: str  # "torch", "torch_dist", or "hf" of what `inspect_weights` found
    root: Path  # directory with latest_checkpointed_iteration.txt, side files beside it
    path: Path  # directory of the iteration
    iteration: int  # 0 for a converted one
    release: bool  # converted, not trained
    layout: Layout  # tp, pp, vp, ep, etp it was written with
    split: StageSplit | None  # None if a torch_dist checkpoint of another tool does not say
    model_type: str | None  # None if the checkpoint does not say; then config.json does
    dtype: str | None
    args: Mapping[str, Any]  # what its maker noted; a run of ours its options by their names
    adapter: Mapping[str, Any] | None = None  # which it holds, of what; None: a model's weights


def inspect_checkpoint(directory: str | Path, *, wanted: Wanted = "mcore") -> CheckpointInfo:
    """Describes a checkpoint: a directory with latest_checkpointed_iteration.txt, or one iteration.

    Args:
        wanted: what would have done as well, for the error's words.

    Raises:
        InputError: not a checkpoint, an iteration or a rank's file that is missing, or a layer
            split that does not fit what the files hold.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise no_checkpoint(directory, wanted)
    root, path = _locate(directory, wanted)
    kind = mcore_format(path)
    if kind is None:
        raise InputError(
            f"{path} holds neither mp_rank_* directories nor .metadata; give a checkpoint."
        )
    release = path.name == RELEASE
    number = re.fullmatch(r"iter_(\d+)", path.name)
    common = {"format": kind, "root": root, "path": path, "release": release,
              "iteration": int(number[1]) if number else 0}
    return (_describe_torch if kind == "torch" else _describe_torch_dist)(path, common)


def load_rank(
    checkpoint: CheckpointInfo | str | Path, tp: int, pp: int, ep: int = 0
) -> dict[str, dict[str, Any]]:
    """The state dicts of one rank: {"model": ..} or {"model0": .., "model1": ..}, mapped from disk.

    The torch tensors have the shapes and names of the model's own state dict on that rank; entries
    that are no tensors are left out.

    Raises:
        InputError: the checkpoint has no such rank, or is not of the torch format.
    """
    info = checkpoint if isinstance(checkpoint, CheckpointInfo) else inspect_checkpoint(checkpoint)
    if info.format != "torch":
        raise InputError(
            f"{info.path} is a {info.format} checkpoint; load it by dist_checkpointing."
        )
    shard = Shard(tp=tp, ep=ep)
    if not (shard in info.layout.shards and 0 <= pp < info.layout.pp):
        raise InputError(
            f"{info.path} was written for {info.layout}, it has no rank TP {tp} PP {pp} EP {ep}; "
            f"convert it again for this layout."
        )
    found = open_torch_file(_rank_path(info.path, info.layout, shard, pp))
    return {
        part: {name: map_tensor(at) for name, at in found[part].items() if isinstance(at, TensorAt)}
        for part in _parts(found)
    }


def open_mcore(
    info: CheckpointInfo, weights: WeightMap
) -> tuple[list[Stored], dict[tuple[str, str, str], TensorAt]]:
    """(inventory, where each tensor lies) of a checkpoint's weights.

    Raises:
        InputError: gaps, surpluses or wrong shapes, named.
    """
    check_whole(info)
    if info.format == "torch_dist":
        return open_torch_dist(info.path, weights)
    tensors = {}
    for stage in range(info.layout.pp):
        for shard in info.layout.shards:
            file = str(_rank_path(info.path, info.layout, shard, stage).relative_to(info.path))
            content = open_torch_file(info.path / file)
            key = rank_file(info.layout, shard, stage)
            for part in _parts(content):
                found = content[part]
                tensors |= {(key, part, _of_expert(name, found)): at for name, at in found.items()
                            if isinstance(at, TensorAt)}
    inventory = weights.mcore_inventory(
        split=info.split, layout=info.layout, found={one: at.shape for one, at in tensors.items()}
    )
    weights.match_mcore(inventory, tensors)
    inventory = [stored for stored in inventory if stored.id in tensors]
    check_tensors(inventory, tensors)
    return inventory, {stored.id: tensors[stored.id] for stored in inventory}


def _of_expert(name: str, names: Container[str]) -> str:
    """A weight's name where each expert is a module, also of one where all are one; its own where
    that is another weight's of `names`."""
    of_module = _GROUPED.sub(r"local_experts.\2.\1.weight", name)
    return name if of_module in names else of_module


def check_whole(info: CheckpointInfo) -> None:
    """Raises InputError: a checkpoint holds an adapter, where the weights of a model are wanted."""
    if info.adapter is not None:
        raise InputError(
            f"{info.path} holds an adapter of the model {shown(info.adapter.get('base'))}; make it "
            f"PEFT's by convert --to peft, which --adapter takes, or merge it into the model by "
            f"convert --merge."
        )


def check_tensors(
    inventory: Sequence[Stored], tensors: Mapping[tuple[str, str, str], TensorAt]
) -> None:
    """Whether every tensor has the shape the inventory says, and numbers that can be converted.

    Raises:
        InputError: one has not.
    """
    for stored in inventory:
        shape, dtype = tensors[stored.id].shape, tensors[stored.id].dtype
        if dtype not in WEIGHTS.values():
            raise InputError(
                f"{stored} has dtype {dtype}; only {', '.join(WEIGHTS)} are supported, convert it "
                f"first."
            )
        if shape != stored.shape:
            raise InputError(
                f"{stored} has shape {list(shape)} but config.json and the layout ask for "
                f"{list(stored.shape)}; use the config.json the checkpoint was made with."
            )


def lay_out_mcore(
    root: Path,
    files: Mapping[str, Sequence[Stored]],
    dtypes: Mapping[tuple[str, str, str], DType],
    args: Mapping[str, Any],
) -> dict[tuple[str, str, str], TensorAt]:
    """Writes every rank's file with room for its tensors; answers where each of them lies."""
    tensors, vp = {}, args[ENTRY]["layout"]["vp"]
    parts = [f"model{chunk}" for chunk in range(vp)] if vp > 1 else ["model"]
    for file, group in files.items():
        path = root / RELEASE / file
        path.parent.mkdir(parents=True, exist_ok=True)
        places = lay_out_torch_file(
            path,
            {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 0},
            # A chunk without weights has its entry too.
            {part: {one.name: (dtypes[one.id], one.shape) for one in group if one.part == part}
             for part in parts},
        )
        tensors |= {one.id: places[one.part, one.name] for one in group}
    (root / LATEST).write_text(RELEASE)
    return tensors


def lay_out_sharded(
    root: Path,
    files: Mapping[str, Sequence[Stored]],
    dtypes: Mapping[tuple[str, str, str], DType],
    chunks: Mapping[str, TensorPart],
    args: Mapping[str, Any],
) -> dict[tuple[str, str, str], TensorAt]:
    """The same of a torch_dist checkpoint, which loads in every layout."""
    common = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 0}
    tensors = lay_out_torch_dist(root / RELEASE, files, dtypes, chunks, common)
    (root / LATEST).write_text(RELEASE)
    return tensors


# ---- finding and describing -------------------------------------------------------------------


def _locate(directory: Path, wanted: Wanted) -> tuple[Path, Path]:
    if not (directory / LATEST).is_file():
        if mcore_format(directory) is None and not re.fullmatch(r"iter_\d+", directory.name):
            raise no_checkpoint(directory, wanted)
        return directory.parent, directory
    says = latest(directory)
    return directory, directory / (RELEASE if says is None else f"iter_{says:07d}")


def _describe_torch(path: Path, common: dict) -> CheckpointInfo:
    ranks = {match.groups(): one / RANK_FILE for one in path.iterdir()
             if (match := _RANK.fullmatch(one.name))}
    some = min((file for file in ranks.values() if file.is_file()), default=None)
    args = {} if some is None else _arguments(open_torch_file(some).get("args"))
    ours = _noted(args.get(ENTRY), path)
    layout = _layout_of(ranks, _said(args, ours, path), path)
    said = replace(ours.sizes, vp=1)
    if ours.split is not None and layout != said:
        raise InputError(
            f"{path} says it was written for {said} but its ranks' directories are those of "
            f"{layout}; copy it again."
        )
    for stage in range(layout.pp):
        for shard in layout.shards:
            if not _rank_path(path, layout, shard, stage).is_file():
                missing = rank_file(layout, shard, stage)
                raise InputError(f"{path} lacks {missing}; copy the missing rank's file.")
    stages = [open_torch_file(_rank_path(path, layout, Shard(), stage))
              for stage in range(layout.pp)]
    split = _split_of(stages, path)
    if ours.stages not in (None, split):
        raise InputError(
            f"{path} says its layers are split {ours.stages} but its files hold {split}; convert "
            f"it again."
        )
    return CheckpointInfo(
        **common, layout=replace(layout, vp=split.vp), split=split,
        model_type=ours.model_type, dtype=ours.dtype, args=args,
    )


def _layout_of(
    ranks: Iterable[tuple[str, str | None, str | None]], said: _Sizes, path: Path
) -> Layout:
    """The layout that the numbers in the names of ranks' directories show, without its VP.

    Where there are two, the second counts stages; of a model of one stage it counts the parts of
    the experts, where the checkpoint says that there are some.
    """
    numbers = [(int(tp), int(pp or 0), int(ep or 0)) for tp, pp, ep in ranks]
    if said.ep > 1 and said.pp == 1 and not any(third for *_, third in ranks):
        numbers = [(tp, 0, ep) for tp, ep, _ in numbers]
    tp, pp, ep = (1 + max(at[i] for at in numbers) for i in range(3))
    try:
        return Layout(tp=tp, pp=pp, ep=ep, etp=said.etp if ep > 1 else None)
    except InputError as error:
        raise _unusable(path, error) from error


def _said(args: Mapping[str, Any], ours: _Noted, path: Path) -> _Sizes:
    """The sizes that a checkpoint gives itself: ours, or under Megatron's names."""
    if ours.split is not None:
        return ours.layout
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size",
             "ep": "expert_model_parallel_size", "etp": "expert_tensor_parallel_size"}
    try:
        return typed(_Sizes, {short: args[name] for short, name in names.items()
                              if args.get(name) is not None})
    except ValueError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: ValueError) -> InputError:
    what = str(error).rstrip(".")
    return InputError(f"{path} says an unusable layout of itself ({what}); copy it again.")


def _describe_torch_dist(path: Path, common: dict) -> CheckpointInfo:
    saved = read_common(path)
    args = _arguments(saved.get("args"))
    ours = _noted(saved.get(ENTRY) or args.get(ENTRY), path)
    return CheckpointInfo(
        **common, layout=ours.sizes, split=ours.stages,
        model_type=ours.model_type, dtype=ours.dtype, args=args, adapter=ours.adapter,
    )


def _noted(entry: Any, path: Path) -> _Noted:
    """What a checkpoint notes of itself as ENTRY. Raises InputError: it is none of ours."""
    try:
        return typed(_Noted, entry or {})
    except ValueError as error:
        raise InputError(
            f"{path} does not describe itself as a checkpoint of ours does ({error}); copy it "
            f"again, or convert the Hugging Face checkpoint again."
        ) from error


def _split_of(stages: Sequence[Mapping[str, Any]], path: Path) -> StageSplit:
    """The split the files themselves show: layers counted chunk by chunk."""
    vp = max(len(_parts(stage)) for stage in stages)
    counts = {"language_model": [], "vision_model": []}
    for chunk in range(vp):
        rows = {tower: [] for tower in counts}
        for number, stage in enumerate(stages):
            parts = _parts(stage)
            if len(parts) != vp:
                raise InputError(
                    f"{path}: stage {number} has {len(parts)} model chunk(s), others have {vp}; "
                    f"copy the checkpoint again."
                )
            found = {match.groups() for name in stage[parts[chunk]]
                     if (match := _LAYER.match(str(name)))}
            for tower in rows:
                rows[tower].append(sum(1 for one, _ in found if one == tower))
        for tower in counts:
            counts[tower].append(tuple(rows[tower]))
    llm, vit = (tuple(rows) for rows in counts.values())
    return StageSplit(llm=llm, encoders=((VISION, vit),) if any(map(any, vit)) else ())


def _arguments(args: Any) -> dict:
    return args if isinstance(args, dict) else getattr(args, "__dict__", {})


def _parts(content: Any) -> list[str]:
    """"model", or "model0", "model1".. in order."""
    if not isinstance(content, dict):
        raise InputError("a rank's file holds no table; copy the checkpoint again.")
    numbered = [key for key in content if re.fullmatch(r"model\d+", str(key))]
    parts = sorted(numbered, key=lambda key: int(key[5:])) or [k for k in content if k == "model"]
    if not parts:
        raise InputError("a rank's file holds no 'model' entry; give a model checkpoint.")
    return parts


def _rank_path(path: Path, layout: Layout, shard: Shard, pp: int) -> Path:
    usual = path / rank_file(layout, shard, pp)
    if usual.is_file() or layout.pp > 1:
        return usual
    # Some tools always name the stage.
    with_stage = path / rank_file(replace(layout, pp=2), shard, pp)
    return with_stage if with_stage.is_file() else usual
