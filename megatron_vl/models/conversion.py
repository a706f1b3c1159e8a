"""What a conversion needs to know of a model: what its source is, and what it is to write."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_vl.errors import InputError
from megatron_vl.models.registry import load_spec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import Layout
from megatron_vl.parallel.stages import layer_list
from megatron_vl.weights import convert as work
from megatron_vl.weights.hub import local_model
from megatron_vl.weights.mcore_io import CheckpointInfo
from megatron_vl.weights.targets import HFTarget, McoreTarget, ShardedTarget, Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A checkpoint and the model in it."""

    directory: Path
    kind: str  # "hf" or "mcore"
    info: CheckpointInfo | None  # of a Megatron-Core checkpoint
    config_dir: Path  # where its config.json lies
    spec: ModelSpec


def describe(directory: Path, hf_config: Path | None, *, weights: bool = True) -> Described:
    """What lies in `directory`; `hf_config` holds config.json where none is beside the weights.

    Args:
        directory, hf_config: or models' names on a hub: see `local_model`.
        weights: whether more than config.json is needed of a model on a hub.

    Raises:
        InputError: no checkpoint, no config.json, or that of another model.
    """
    directory = local_model(directory, weights=weights)
    if hf_config is not None:
        hf_config = local_model(hf_config, weights=False)
    kind = work.detect(directory)
    info = work.inspect_checkpoint(directory) if kind == "mcore" else None
    config_dir = hf_config or _config_dir(directory, info)
    spec = load_spec(config_dir)
    if info is not None and info.model_type not in (None, spec.model_type):
        raise InputError(
            f"{directory} holds a {info.model_type} model but {config_dir} has the config.json of "
            f"{spec.model_type}; give the right one with --hf-config."
        )
    return Described(directory=directory, kind=kind, info=info, config_dir=config_dir, spec=spec)


def _config_dir(directory: Path, info: CheckpointInfo | None) -> Path:
    if info is None:
        return directory
    if not (info.root / "config.json").is_file():
        raise InputError(
            f"{info.root} has no config.json; give the model's Hugging Face directory with "
            f"--hf-config."
        )
    return info.root


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutOptions:
    """A Megatron-Core layout as it is typed; None: not given."""

    tp: int | None = None
    pp: int | None = None
    vp: int | None = None
    ep: int | None = None
    etp: int | None = None
    pp_layers: str | None = None
    vit_pp_layers: str | None = None
    first_stage_layers: int | None = None

    @property
    def given(self) -> str | None:
        """The first of them that was typed, as a flag."""
        names = (one.name for one in fields(self) if getattr(self, one.name) is not None)
        return next((f"--{name.replace('_', '-')}" for name in names), None)


def choose_target(
    spec: ModelSpec, source: str, wanted: LayoutOptions, *, to: str | None,
    file_format: str | None, max_shard_bytes: int,
) -> Target:
    """What to write of a checkpoint of kind `source`.

    Args:
        to: "hf", "mcore", or None: mcore of a Hugging Face source or if a layout or a format is
            given, hf otherwise.
        file_format: "torch", "torch_dist" or None, of Megatron-Core.

    Raises:
        InputError: options that do not go together, or a layout the model does not fit.
    """
    given = wanted.given
    if (to or ("mcore" if source == "hf" or given or file_format else "hf")) == "hf":
        if option := given or (file_format and "--format"):
            raise InputError(f"{option} is for a Megatron-Core DST; leave it out with --to hf.")
        return HFTarget(max_shard_bytes=max_shard_bytes)
    if file_format == "torch_dist":
        if given:
            raise InputError(
                f"{given} is for --format torch; a torch_dist checkpoint loads in every layout."
            )
        whole = Layout(), spec.split()
        return ShardedTarget(max_shard_bytes=max_shard_bytes,
                             args=lambda dtype: spec.megatron_args(*whole, dtype))
    sizes = {name: getattr(wanted, name) for name in ("tp", "pp", "vp", "ep", "etp")}
    layout = Layout(**{name: size for name, size in sizes.items() if size is not None})
    split = spec.split(
        pp=layout.pp, vp=layout.vp, first_stage_layers=wanted.first_stage_layers,
        llm=layer_list(wanted.pp_layers, "--pp-layers"),
        vit=layer_list(wanted.vit_pp_layers, "--vit-pp-layers"),
    )
    spec.check_layout(layout, split)
    return McoreTarget(layout=layout, split=split,
                       args=lambda dtype: spec.megatron_args(layout, split, dtype))
