"""What a conversion may write: which tensors, in which files, laid out how."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron_vl.parallel import Layout, StageSplit
from megatron_vl.typed import read_file
from megatron_vl.weights.dtypes import DType
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.hf_io import SIDE_FILES, lay_out_hf, shard, shard_names
from megatron_vl.weights.map import Stored, WeightMap, rank_file
from megatron_vl.weights.mcore_io import lay_out_mcore, lay_out_sharded

Ids = tuple[str, str, str]
Files = Mapping[str, Sequence[Stored]]  # a file's name -> the tensors in it


class Target(Protocol):
    """One kind of checkpoint. `dtype` is the name of the widest dtype in it."""

    side_files: ClassVar[Sequence[str]]  # patterns of the model's own files that go along

    def wanted(self, weights: WeightMap) -> list[Stored]:
        """The tensors that it holds."""

    def files(self, wanted: Sequence[Stored], dtypes: Mapping[Ids, DType]) -> Files:
        """What is in which file."""

    def lay_out(
        self, root: Path, files: Files, dtypes: Mapping[Ids, DType], dtype: str, weights: WeightMap
    ) -> dict[Ids, TensorAt]:
        """Writes the files with room for their tensors; answers where each of these lies."""

    def finish(self, root: Path, dtype: str) -> None:
        """Once the weights and the model's own files are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HFTarget:
    """Published names in safetensors of at most `max_shard_bytes`."""

    side_files: ClassVar[Sequence[str]] = SIDE_FILES
    max_shard_bytes: int = 5 * 10**9

    def wanted(self, weights: WeightMap) -> list[Stored]:
        return weights.hf_inventory()

    def files(self, wanted: Sequence[Stored], dtypes: Mapping[Ids, DType]) -> Files:
        groups = shard(wanted, dtypes, self.max_shard_bytes)
        return dict(zip(shard_names(len(groups)), groups, strict=True))

    def lay_out(
        self, root: Path, files: Files, dtypes: Mapping[Ids, DType], dtype: str, weights: WeightMap
    ) -> dict[Ids, TensorAt]:
        return lay_out_hf(root, files, dtypes)

    def finish(self, root: Path, dtype: str) -> None:
        """config.json names the weights' dtype; after a cast it must name the new one."""
        path = root / "config.json"
        config = read_file(path, dict, mend="copy it again")
        changed = False
        for section in (config, config.get("text_config"), config.get("vision_config")):
            for key in ("torch_dtype", "dtype"):
                if isinstance(section, dict) and section.get(key) not in (None, dtype):
                    section[key], changed = dtype, True
        if changed:
            text = json.dumps(config, indent=2, ensure_ascii=False)
            path.write_text(f"{text}\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class McoreTarget:
    """One torch-format file a (TP, PP, EP) rank."""

    side_files: ClassVar[Sequence[str]] = SIDE_FILES
    layout: Layout
    split: StageSplit
    args: Callable[[str], Mapping[str, Any]]  # dtype name -> the checkpoint's `args`

    def wanted(self, weights: WeightMap) -> list[Stored]:
        return weights.mcore_inventory(split=self.split, layout=self.layout)

    def files(self, wanted: Sequence[Stored], dtypes: Mapping[Ids, DType]) -> Files:
        # A rank without weights has its file too: the loader looks for every rank's.
        files: dict[str, list[Stored]] = {
            rank_file(self.layout, shard, stage): []
            for stage in range(self.split.pp) for shard in self.layout.shards
        }
        for stored in wanted:
            files[stored.file].append(stored)
        return files

    def lay_out(
        self, root: Path, files: Files, dtypes: Mapping[Ids, DType], dtype: str, weights: WeightMap
    ) -> dict[Ids, TensorAt]:
        return lay_out_mcore(root, files, dtypes, self.args(dtype))

    def finish(self, root: Path, dtype: str) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardedTarget:
    """A torch_dist checkpoint, which has no layout, in files of at most `max_shard_bytes`."""

    side_files: ClassVar[Sequence[str]] = SIDE_FILES
    max_shard_bytes: int
    args: Callable[[str], Mapping[str, Any]]

    def wanted(self, weights: WeightMap) -> list[Stored]:
        return [chunk.stored for chunk in weights.global_chunks()]

    def files(self, wanted: Sequence[Stored], dtypes: Mapping[Ids, DType]) -> Files:
        groups = shard(wanted, dtypes, self.max_shard_bytes)
        return {f"__0_{number}.distcp": group for number, group in enumerate(groups)}

    def lay_out(
        self, root: Path, files: Files, dtypes: Mapping[Ids, DType], dtype: str, weights: WeightMap
    ) -> dict[Ids, TensorAt]:
        chunks = {chunk.stored.name: chunk for chunk in weights.global_chunks()}
        return lay_out_sharded(root, files, dtypes, chunks, self.args(dtype))

    def finish(self, root: Path, dtype: str) -> None:
        """Nothing is left to do."""
