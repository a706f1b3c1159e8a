"""A small random model as a true Hugging Face directory, to try a layout or a change on.

A family gives the files of the directory without weights; those follow from its weight map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.errors import InputError
from megatron_vl.outputs import replacing

if TYPE_CHECKING:
    import torch

    from megatron_vl.models.registry import Family
    from megatron_vl.models.spec import ModelSpec
    from megatron_vl.weights.map import WeightMap

LARGE = 10_000  # entries; a larger file is written without indents


def _size(default: int, what: str) -> int:
    return field(default=default, metadata={"what": what})


@dataclass(frozen=True, kw_only=True, slots=True)
class TinySizes:
    """What a tiny model may be told, whatever its family.

    Raises:
        InputError: sizes that do not fit one another.
    """

    hidden_size: int = _size(128, "width of the language model")
    num_layers: int = _size(4, "language layers")
    num_heads: int = _size(4, "query heads")
    num_kv_heads: int = _size(2, "key/value heads")
    ffn_size: int = _size(384, "width of gate and up")
    vision_depth: int = _size(2, "vision layers")
    vision_hidden_size: int = _size(64, "width of the vision tower")
    vision_heads: int = _size(4, "heads of the vision tower")
    patch_size: int = _size(14, "pixels a side of a patch; small images want smaller ones")
    vision_mlp_ratio: int = _size(4, "vision MLP width / vision width")
    vision_queries: int = _size(256, "tokens of an image, where a resampler makes them")
    max_positions: int = _size(32768, "max_position_embeddings")
    ranks: int = _size(4096, "BPE ranks to keep, 151643 for the published vocabulary")
    min_pixels: int = _size(56 * 56, "smallest image, in pixels, after resizing")
    max_pixels: int = _size(28 * 28 * 1280, "largest image, in pixels, after resizing")
    seed: int = _size(0, "of the random weights")
    init_std: float = 0.02  # standard deviation of the random weights
    dtype: str = "bfloat16"
    untied: bool = False  # the output layer is no copy of the embedding
    mrope_section: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            size = getattr(self, one.name)
            least = 0 if one.name == "seed" else 1
            if one.type == "int" and size < least:
                raise InputError(f"{_flag(one.name)} is {size}; give {least} or more.")
        for what, size, parts in (
            ("--hidden-size", self.hidden_size, self.num_heads),
            ("--num-heads", self.num_heads, self.num_kv_heads),
            ("--vision-hidden-size", self.vision_hidden_size, self.vision_heads),
            ("vision head width", self.vision_hidden_size // self.vision_heads, 4),
            ("head width", self.hidden_size // self.num_heads, 2),
        ):
            if size % parts:
                raise InputError(f"{what} is {size}; it must be a multiple of {parts}.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def write_tiny(out: Path, family: Family, sizes: TinySizes) -> tuple[ModelSpec, int]:
    """Writes a model into a new directory; answers its spec and its number of parameters.

    Raises:
        InputError: `out` is there already, or the family has no such model.
    """
    from safetensors.torch import save_file

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty; remove it or choose another OUT.")
    files = _files(family, sizes)
    spec = family.read_config(files["config.json"])
    weights = random_weights(family.weight_map(spec), spec, sizes.seed)
    for name, table in family.tiny_constants(spec).items():
        weights[name] = table.to(weights[name].dtype)
    with replacing(out) as directory:
        write_files(directory, files)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return spec, sum(one.numel() for one in weights.values())


class _Asked:
    """Sizes that know which of them were asked for."""

    def __init__(self, sizes: TinySizes):
        self._sizes, self.names = sizes, {"seed"}

    def __getattr__(self, name: str):
        self.names.add(name)
        return getattr(self._sizes, name)


def _files(family: Family, sizes: TinySizes) -> dict[str, object]:
    """Those of the family.

    Raises:
        InputError: a size was given on which nothing of the family depends; and what it raises.
    """
    asked = _Asked(sizes)
    files = family.tiny(asked)
    plain = family.tiny_sizes()
    for one in fields(sizes):
        value = getattr(sizes, one.name)
        if one.name not in asked.names and value != getattr(plain, one.name):
            raise InputError(
                f"{_flag(one.name)} is {value}, but nothing of a {family.model_type} depends on "
                f"it; leave it out."
            )
    return files


def write_files(directory: Path, files: Mapping[str, object]) -> None:
    """Text and bytes as they are, all else as JSON."""
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
            continue
        if not isinstance(content, str):
            large = name == "tokenizer.json" or len(content) > LARGE
            content = json.dumps(content, ensure_ascii=False, indent=None if large else 2) + "\n"
        (directory / name).write_text(content, encoding="utf-8")


def random_weights(
    weights: WeightMap, spec: ModelSpec, seed: int
) -> dict[str, torch.Tensor]:
    """Every tensor of published files: normal, around one for the weights of norms, the only
    vectors that are weights. Biases are not zero, for that would hide one that is lost."""
    import torch

    from megatron_vl.weights.recut import to_files

    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in weights.published().items():
        mean = 1.0 if len(shape) == 1 and name.endswith(".weight") else 0.0
        tensor = torch.empty(shape).normal_(mean, spec.decoder.init_std, generator=generator)
        drawn[name] = tensor.to(getattr(torch, spec.dtype))
    return to_files(drawn, weights)
