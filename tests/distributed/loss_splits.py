"""Run by torchrun: the same 32 samples through several splits; writes loss and gradients of each.

    loss_splits.py HF_DIR WEIGHTS OUT
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch

from megatron_vl.data.encode.rows import make_batch, make_row
from megatron_vl.models.common.transformer_config import ModelOptions
from megatron_vl.models.registry import family, load_spec
from megatron_vl.parallel import Layout
from megatron_vl.parity.cases import CASES, Case, make_samples
from megatron_vl.platform import initialize, leave_layout
from megatron_vl.training.checkpoint.weights import load_weights
from megatron_vl.training.setup import wrap_for_data_parallel
from megatron_vl.training.step import forward_step, mean_loss, run_batches
from megatron_vl.weights.mcore_io import inspect_checkpoint

CASE = Case(name="splits", images=CASES[1].images * 2)
ROW_LENGTH = 256
SPLITS = {  # ranks -> name -> (layout, samples a row, rows a microbatch, cross-entropy's chunks)
    1: {
        "packed": (Layout(), 4, 1, 1),
        "two rows a microbatch": (Layout(), 4, 2, 1),
        "one sample a row": (Layout(), 1, 4, 1),
        "packed, in chunks": (Layout(), 4, 1, 50),
    },
    2: {
        "DP2": (Layout(dp=2), 4, 1, 1), "CP2": (Layout(cp=2), 4, 1, 1),
        "CP2, in chunks": (Layout(cp=2), 4, 1, 50),
    },
}


def main(hf_dir: Path, weights: Path, out: Path) -> None:
    spec = load_spec(hf_dir)
    samples = make_samples(spec, CASE)
    for name, (layout, per_row, rows, in_chunks) in SPLITS[int(os.environ["WORLD_SIZE"])].items():
        platform = initialize(layout)
        split = spec.split()
        chunks = family(spec.model_type).build_model(
            spec, layout, split,
            ModelOptions(initialize_weights=False, cross_entropy_chunks=in_chunks),
        )
        model = wrap_for_data_parallel(chunks, platform.device(0), overlap_grad_reduce=False)
        load_weights(inspect_checkpoint(weights), model, spec, layout, split)
        groups = [make_row(samples[i : i + per_row]) for i in range(0, len(samples), per_row)]
        batches = [
            make_batch(groups[i : i + rows], row_length=ROW_LENGTH, pad_token=0,
                       positions=family(spec.model_type).positions(spec))
            for i in range(0, len(groups), rows)
        ]
        mine = layout.coordinates(torch.distributed.get_rank()).dp
        batches = batches[mine :: layout.dp]
        for per_sample in (False, True):
            for chunk in model:
                chunk.train()
                chunk.zero_grad_buffer()
            losses = run_batches(
                model, batches, "cpu", step=partial(forward_step, per_sample=per_sample)
            )
            loss, trained = mean_loss(losses, torch.device("cpu"))
            if torch.distributed.get_rank() == 0:
                gradients = {key: parameter.main_grad.clone()
                             for key, parameter in model[0].module.named_parameters()}
                torch.save({"loss": loss, "trained": trained, "gradients": gradients},
                           out / f"{name}-{per_sample}.pt")
        leave_layout()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
