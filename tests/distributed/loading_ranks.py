"""Loads weights of every kind into models of many layouts, and compares with files made for them.

    torchrun --nproc-per-node N loading_ranks.py JOBS

JOBS holds jobs.json: {name: {"hf", "layout", "split", "source", "made", "whole", ..}}; `source` is
what is loaded, `made` the checkpoint that was converted for just this layout, `whole` the same at
TP 1. Rank R leaves NAME.R.json:
the parameters that are not equal to it bit by bit, how many were compared, and how many process
groups it made for the model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch


def main(jobs: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, job in json.loads((jobs / "jobs.json").read_text()).items():
        if job["ranks"] == world:
            (jobs / f"{name}.{rank}.json").write_text(json.dumps(compared(job)))


def compared(job: dict) -> dict:
    import torch
    from megatron.core import parallel_state

    from megatron_vl.models.common.layer_spec import to_local_names
    from megatron_vl.models.common.transformer_config import ModelOptions
    from megatron_vl.models.registry import family, load_spec
    from megatron_vl.parallel import Layout, StageSplit
    from megatron_vl.platform import initialize, leave_layout
    from megatron_vl.training.checkpoint.weights import load_weights
    from megatron_vl.training.setup import wrap_for_data_parallel
    from megatron_vl.weights import load_rank
    from megatron_vl.weights.convert import inspect_weights

    spec, layout = load_spec(Path(job["hf"])), Layout(**job["layout"])
    split = StageSplit.from_dict(job["split"])
    platform = initialize(layout, embedding_stage=split.embedding_chunk[0])
    new_group = torch.distributed.new_group
    with patch.object(torch.distributed, "new_group", side_effect=new_group) as groups:
        chunks = family(spec.model_type).build_model(
            spec, layout, split, ModelOptions(initialize_weights=False,
                                              params_dtype=getattr(torch, job["dtype"]))
        )
    model = wrap_for_data_parallel(chunks, platform.device(0), overlap_grad_reduce=False)
    loaded = load_weights(inspect_weights(job["source"]), model, spec, layout, split)
    shard = layout.shard(torch.distributed.get_rank())
    pp = parallel_state.get_pipeline_model_parallel_rank()
    differ, seen = [], 0
    made = load_rank(job["made"], shard.tp, pp, shard.ep)
    whole = load_rank(job["whole"], 0, pp)["model"] if layout.vit_data_parallel else {}
    for number, chunk in enumerate(model):
        stored = made[f"model{number}" if len(model) > 1 else "model"]
        own = dict(chunk.module.named_parameters())
        assert own.keys() == {to_local_names(name, own) for name in stored}
        for name in stored:
            want = whole[name] if layout.vit_data_parallel and name in whole and (
                name.startswith("vision_model.")) else stored[name]
            seen += 1
            if not torch.equal(own[to_local_names(name, own)].detach(), want):
                differ.append(name)
    leave_layout()
    return {"differ": differ, "seen": seen, "not finite": dict(loaded.not_finite),
            "groups": groups.call_count}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
