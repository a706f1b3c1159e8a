"""The judge's model beside quantised weights: with the values that the published ones then have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_vl.models.common.quantized_base import is_layer_linear
from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.quantized import QuantizedTensor
from megatron_vl.parity.ranks import Setting
from megatron_vl.parity.run import SHARD_BYTES, convert
from megatron_vl.weights.recut import from_files, to_files
from megatron_vl.weights.targets import HFTarget


def write_quantized(work_dir: Path, hf_dir: Path, spec: ModelSpec, setting: Setting) -> Path:
    """WORK_DIR/quantized, the model of `hf_dir`; each published weight is quantised by itself."""
    directory = work_dir / "quantized"
    convert(hf_dir, directory, hf_dir, spec, HFTarget(max_shard_bytes=SHARD_BYTES), setting.dtype)
    weights = family(spec.model_type).weight_map(spec)
    quantized = {
        key for weight in weights.weights if is_layer_linear(weight)
        for layer in range(weights.layers[weight.place.tower]) for expert in weight.each
        for key in weight.rule_of(layer, expert).published()
    }
    files = {file: load_file(file) for file in directory.glob("*.safetensors")}
    published = from_files({name: one for held in files.values() for name, one in held.items()},
                           weights)
    values = to_files({key: _stood_for(one, setting.quantize_base) if key in quantized else one
                       for key, one in published.items()}, weights)
    for file, held in files.items():
        save_file({name: values[name] for name in held}, file, metadata={"format": "pt"})
    return directory


def _stood_for(weight: torch.Tensor, form: str) -> torch.Tensor:
    made = QuantizedTensor.empty_like(weight, form)
    made.store_(weight)
    return made.dequantize()
