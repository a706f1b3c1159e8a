"""One checkpoint into another: any kind, any layout, through one plan.

This room knows files and layouts but no model; a caller brings the family's `WeightMap`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.outputs import check_target, replacing
from megatron_vl.parallel import Layout
from megatron_vl.weights.dtypes import WEIGHTS, DType
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.found import is_mcore_directory, no_checkpoint
from megatron_vl.weights.hf_io import (
    copy_side_files,
    is_hf_directory,
    open_hf,
)
from megatron_vl.weights.map import Stored, WeightMap
from megatron_vl.weights.mcore_io import (
    CheckpointInfo,
    check_tensors,
    inspect_checkpoint,
    open_mcore,
)
from megatron_vl.weights.plan import CopyPlan, make_plan
from megatron_vl.weights.reshard import Updates, Written, run_plan, target_dtypes
from megatron_vl.weights.targets import Files, Ids, Target

ADAPTER_CONFIG = "adapter_config.json"  # of a directory of PEFT's
HF = "hf"  # the `format` of a Hugging Face directory


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An opened checkpoint: what it holds and where."""

    inventory: list[Stored]
    dtypes: Mapping[Ids, DType]
    tensors: Mapping[Ids, TensorAt] | None  # None when only config.json is there: plans, no weights
    updates: Updates = field(default_factory=dict)  # of tensors that are more than what is stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A conversion that was thought through and can be printed or run."""

    plan: CopyPlan
    source: Source
    target: Target
    dtypes: Mapping[Ids, DType]  # of the target's tensors
    files: Files  # of the target
    weights: WeightMap

    @property
    def nbytes(self) -> int:
        return sum(one.target.numel * self.dtypes[one.target.id].itemsize
                   for one in self.plan.tensors)

    @property
    def dtype(self) -> str:
        """Name of the target's dtype; of the widest one if it has several."""
        return max(set(self.dtypes.values()), key=lambda one: (one.itemsize, one.name)).name


def detect(directory: Path) -> str:
    """ "hf" or "mcore".

    Raises:
        InputError: neither.
    """
    kind = _kind(directory) if directory.is_dir() else None
    if kind is None:
        raise no_checkpoint(directory, "either")
    return kind


def _kind(directory: Path) -> str | None:
    if is_mcore_directory(directory):
        return "mcore"
    return "hf" if is_hf_directory(directory) or (directory / "config.json").is_file() else None


def inspect_weights(directory: str | Path) -> CheckpointInfo:
    """Describes a Hugging Face directory or a Megatron-Core checkpoint.

    Raises:
        InputError: it is neither; or see `inspect_checkpoint`.
    """
    directory = Path(directory)
    if not directory.is_dir() or is_mcore_directory(directory) or not is_hf_directory(directory):
        return inspect_checkpoint(directory, wanted="either")
    return CheckpointInfo(
        format=HF, root=directory, path=directory, iteration=0, release=True, layout=Layout(),
        split=None, model_type=None, dtype=None, args={},
    )


def open_weights(info: CheckpointInfo, weights: WeightMap) -> Source:
    """`open_source` of what `inspect_weights` described."""
    return open_source(info.path, weights, info=None if info.format == HF else info)


def open_source(
    directory: Path, weights: WeightMap, *, info: CheckpointInfo | None = None,
    planned_dtype: str | None = None,
) -> Source:
    """Opens a checkpoint's tables of contents and checks every name and shape.

    Args:
        info: of a Megatron-Core checkpoint; None for a Hugging Face directory.
        planned_dtype: dtype to plan with when a Hugging Face directory has no weights.

    Raises:
        InputError: gaps, surpluses, wrong shapes, unreadable files.
    """
    if info is not None:
        inventory, tensors = open_mcore(info, weights)
    elif planned_dtype is not None and not is_hf_directory(directory):
        inventory = weights.hf_inventory()
        dtype = WEIGHTS[planned_dtype]
        return Source(inventory=inventory, dtypes={one.id: dtype for one in inventory},
                      tensors=None)
    else:
        found = open_hf(directory, weights.published_name)
        inventory = weights.hf_inventory({one: at.shape for one, at in found.items()})
        tensors = {one.id: found[one.file, "", one.tensor].part(one.of[1]) if one.of
                   else found[one.id] for one in inventory}
        check_tensors(inventory, tensors)
    return Source(inventory=inventory, dtypes={one: at.dtype for one, at in tensors.items()},
                  tensors=tensors)


def plan_conversion(
    source: Source, weights: WeightMap, target: Target, dtype: str | None = None
) -> Conversion:
    """What has to be copied where; no I/O.

    Raises:
        InputError: the target cannot be filled from the source, or dtypes are mixed.
    """
    wanted = target.wanted(weights)
    plan = make_plan(source.inventory, wanted)
    dtypes = target_dtypes(plan, source.dtypes, WEIGHTS[dtype] if dtype else None)
    return Conversion(
        plan=plan, source=source, target=target, dtypes=dtypes, weights=weights,
        files=target.files(wanted, dtypes),
    )


def run_conversion(
    conversion: Conversion,
    directory: Path,
    *,
    side_files: Path,
    overwrite: bool = False,
    workers: int = 2,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Written:
    """Writes the target beside `directory` and puts it in its place when it is complete.

    Args:
        side_files: directory whose config.json, tokenizer and templates go along.

    Raises:
        InputError: the target exists, is no checkpoint that `overwrite` may replace, holds what is
            read, or cannot be written; or the source breaks off, or is deleted meanwhile.
    """
    target = conversion.target
    reads = {side_files, *(tensor.path for tensor in conversion.source.tensors.values())}
    check_target(
        directory, overwrite=overwrite, needed=sorted(reads), what="checkpoint",
        is_ours=lambda there: _kind(there) is not None or (there / ADAPTER_CONFIG).is_file(),
    )
    with replacing(directory) as new:
        free = shutil.disk_usage(new).free
        if free < conversion.nbytes:
            raise InputError(
                f"{directory.parent} has {free:,} bytes free but {conversion.nbytes:,} are needed; "
                f"free space or choose another target."
            )
        tensors = target.lay_out(
            new, conversion.files, conversion.dtypes, conversion.dtype, conversion.weights
        )
        try:
            written = run_plan(
                conversion.plan, conversion.source.tensors, tensors,
                updates=conversion.source.updates, workers=workers, progress=progress,
            )
        except FileNotFoundError as error:  # the target's are laid out already
            raise InputError(
                f"{error.filename} was deleted while it was read, as a run that trains deletes its "
                f"old checkpoints; start again, or let it keep more by save-total-limit."
            ) from error
        copy_side_files(side_files, new, target.side_files)
        target.finish(new, conversion.dtype)
    return written


@contextlib.contextmanager
def progress_bar(
    nbytes: int, what: str = "convert"
) -> Iterator[Callable[[int], object]]:
    """A bar with rate and time left on a terminal; nothing elsewhere, or without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda _: None
        return
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc=what, disable=None) as bar:
        yield bar.update


__all__ = [
    "Conversion",
    "Source",
    "detect",
    "inspect_checkpoint",
    "inspect_weights",
    "open_source",
    "open_weights",
    "plan_conversion",
    "progress_bar",
    "run_conversion",
]
