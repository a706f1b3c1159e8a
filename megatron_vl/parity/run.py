"""Weights of a Hugging Face directory for every layout, and the judge's word on what came of them.

Between the two the ranks run; see `ranks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import Layout, StageSplit
from megatron_vl.parity.adapters import ADAPTER, read_gradients
from megatron_vl.parity.cases import cases, make_samples
from megatron_vl.parity.compare import Difference, Outcome, compare
from megatron_vl.parity.judge import run_transformers
from megatron_vl.parity.ranks import Setting, read_ours
from megatron_vl.peft.files import read_adapter
from megatron_vl.weights.convert import (
    inspect_weights,
    open_weights,
    plan_conversion,
    run_conversion,
)
from megatron_vl.weights.recut import from_files
from megatron_vl.weights.targets import HFTarget, McoreTarget, Target

SHARD_BYTES = 5 * 10**9  # of a file of safetensors at most


def write_weights(
    work_dir: Path, hf_dir: Path, spec: ModelSpec, layouts: Sequence[tuple[Layout, StageSplit]],
    setting: Setting,
) -> None:
    """WORK_DIR/k/weights for layout k, as `run_ranks` reads them."""
    for number, (layout, split) in enumerate(layouts):
        model = Layout(**layout.cut)
        target = McoreTarget(
            layout=model, split=split,
            args=lambda dtype, of=(model, split): spec.megatron_args(*of, dtype),
        )
        convert(hf_dir, work_dir / str(number) / "weights", hf_dir, spec, target, setting.dtype)


def differences(
    work_dir: Path, hf_dir: Path, spec: ModelSpec, layouts: Sequence[tuple[Layout, StageSplit]],
    setting: Setting,
) -> tuple[list[list[Difference]], list[Difference]]:
    """Of what `run_ranks` left, to transformers in fp32.

    Returns:
        every layout's of every case, and transformers' own in the dtype of `setting`, a case each;
        none in fp32.
    """
    found, own, weights = [[] for _ in layouts], [], family(spec.model_type).weight_map(spec)
    adapter = None
    if setting.lora_rank is not None:
        adapter = replace(read_adapter(work_dir / ADAPTER, weights).adapter,
                          fused=setting.lora_fused)
    judged = {"adapter": None if adapter is None else work_dir / ADAPTER,
              "fused": setting.lora_fused, "balance": setting.balance}
    # Other losses alone are the same in every layout.
    joined = setting.balance.loss == "global_aux_loss"
    replicas = [layout.dp if joined else 1 for layout, _ in layouts]
    for index, case in enumerate(cases(spec, setting.packed)):
        @cache
        def theirs(dp: int, dtype: str = "float32", case=case) -> Outcome:
            return run_transformers(hf_dir, spec, case, dtype, dp=dp, **judged)

        if setting.dtype != "float32":
            dp = replicas[0]
            own.append(compare(case.name, theirs(dp, setting.dtype), theirs(dp)))
        samples = make_samples(spec, case)
        for number, (layout, split) in enumerate(layouts):
            folder = work_dir / str(number)
            if adapter is not None:
                gradients = read_gradients(folder / f"{index}.gradients", weights, adapter, layout,
                                           split)
            else:
                gradients = folder / f"{index}.hf"
                convert(
                    folder / f"{index}.gradients", gradients, hf_dir, spec,
                    HFTarget(max_shard_bytes=SHARD_BYTES),
                )
                gradients = from_files(_read_tensors(gradients), weights)
            ours = read_ours(folder, index, case, spec, samples, layout, gradients)
            found[number].append(compare(case.name, ours, theirs(replicas[number])))
    return found, own


def convert(
    source: Path, directory: Path, hf_dir: Path, spec: ModelSpec, target: Target,
    dtype: str | None = None,
) -> None:
    """The weights of `source` as `target` in `directory`, beside the other files of `hf_dir`."""
    weights = family(spec.model_type).weight_map(spec)
    opened = open_weights(inspect_weights(source), weights)
    conversion = plan_conversion(opened, weights, target, dtype)
    run_conversion(conversion, directory, side_files=hf_dir)


def _read_tensors(hf_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted(hf_dir.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
