"""Ours: samples packed into rows, rows into microbatches, spread over the ranks of a layout.

Letters: s row length, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_vl.models.common.balance import NO_BALANCE, Balance
from megatron_vl.models.common.recompute import Recompute, recompute_of
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.experts import AUTO
from megatron_vl.parallel import Layout, Shard, StageSplit
from megatron_vl.parity.cases import Case, cases, make_batches, make_samples
from megatron_vl.parity.compare import Outcome
from megatron_vl.platform import barrier
from megatron_vl.weights.map import rank_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How ours runs, beside the layout; transformers judges in fp32 whatever it is."""

    dtype: str = "float32"
    packed: bool = True
    recompute: str = "none"
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1
    cross_entropy_chunks: int = 1
    overlap_grad_reduce: bool = False
    lora_rank: int | None = None  # of an adapter whose gradients are compared; None: all weights'
    lora_target: tuple[str, ...] = ()
    lora_fused: bool = False
    quantize_base: str | None = None  # form of the language layers' linear weights
    balance: Balance = NO_BALANCE  # of the experts
    moe_grouped_gemm: str = AUTO  # of megatron_vl.ops.experts.CHOICES

    def recompute_of(self, split: StageSplit) -> tuple[Recompute, Recompute]:
        """The language model's and the vision tower's. Raises InputError: see `recompute_of`."""
        return recompute_of(
            split, granularity=None if self.recompute == "none" else self.recompute,
            method=self.recompute_method, num_layers=self.recompute_num_layers,
        )

    def __str__(self) -> str:
        words = [{"float32": "fp32", "bfloat16": "bf16"}[self.dtype]]
        words += [] if self.packed else ["one sample a row"]
        if self.recompute == "full":
            words += [f"full recompute ({self.recompute_method} {self.recompute_num_layers})"]
        elif self.recompute != "none":
            words += [f"{self.recompute} recompute"]
        if self.cross_entropy_chunks > 1:
            words += [f"cross-entropy in {self.cross_entropy_chunks} chunks"]
        if self.lora_rank is not None:
            kind = "fused LoRA" if self.lora_fused else "LoRA"
            words += [f"{kind} of rank {self.lora_rank} on {', '.join(self.lora_target)}"]
        words += [] if self.quantize_base is None else [f"beside weights in {self.quantize_base}"]
        words += [str(self.balance)] if self.balance.has_loss else []
        words += [] if self.moe_grouped_gemm == AUTO else [
            f"moe-grouped-gemm {self.moe_grouped_gemm}"]
        return ", ".join(words)


def run_ranks(
    work_dir: Path,
    hf_dir: Path,
    layouts: Sequence[tuple[Layout, StageSplit]],
    setting: Setting,
) -> None:
    """One rank's part of every case in every layout; writes what the parent compares.

    Layout k has WORK_DIR/k: there it reads the converted weights, `weights/`, and writes for case
    i `i.logits.D.pt` (samples' logits, from the last stage of data rank D), `i.loss.pt`, and the
    gradients as a checkpoint, `i.gradients/`, which converts back to Hugging Face names like
    weights do.
    """
    from megatron_vl.platform import initialize, leave_layout

    for number, (layout, split) in enumerate(layouts):
        started = time.monotonic()
        platform = initialize(layout, embedding_stage=split.embedding_chunk[0])
        _run_layout(work_dir / str(number), hf_dir, layout, split, platform, setting)
        barrier()
        if torch.distributed.get_rank() == 0:
            print(f"  {number + 1}/{len(layouts)}  {layout}, {split}: "
                  f"{time.monotonic() - started:.1f} s", flush=True)
        leave_layout()


def _run_layout(
    work_dir: Path, hf_dir: Path, layout: Layout, split: StageSplit, platform, setting: Setting
) -> None:
    from megatron.core import parallel_state

    from megatron_vl.models.common.parts import PARTS
    from megatron_vl.models.common.transformer_config import ModelOptions
    from megatron_vl.models.registry import family, load_spec
    from megatron_vl.parity.adapters import ADAPTER, save_gradients
    from megatron_vl.peft.adapter_map import AdapterMap
    from megatron_vl.peft.files import read_adapter
    from megatron_vl.peft.lora import attach, factors
    from megatron_vl.training.checkpoint.weights import fill, load_weights
    from megatron_vl.training.setup import wrap_for_data_parallel
    from megatron_vl.training.step import mean_loss, run_batches
    from megatron_vl.weights.mcore_io import inspect_checkpoint

    spec = load_spec(hf_dir)
    device = platform.device(int(os.environ.get("LOCAL_RANK", 0)))
    recompute, vit_recompute = setting.recompute_of(split)
    adapter, frozen = None, {}
    if setting.lora_rank is not None:
        weights = family(spec.model_type).weight_map(spec)
        adapter = read_adapter(work_dir.parent / ADAPTER, weights)
        of = AdapterMap(weights=weights,
                        adapter=replace(adapter.adapter, fused=setting.lora_fused))
        frozen = {"frozen": tuple(PARTS), "adapted": of.parts}
    options = ModelOptions(
        params_dtype=getattr(torch, setting.dtype), recompute=recompute,
        vit_recompute=vit_recompute, cross_entropy_chunks=setting.cross_entropy_chunks,
        initialize_weights=False, fused_ops=platform.fuses_ops,
        row_lengths_vary=layout.lengths_vary and not setting.packed,
        quantize_base=setting.quantize_base, balance=setting.balance,
        moe_grouped_gemm=setting.moe_grouped_gemm, **frozen,
    )
    chunks = family(spec.model_type).build_model(spec, layout, split, options)
    if adapter is not None:
        attach(chunks, of, layout, split, seed=0)
    model = wrap_for_data_parallel(
        chunks, device, overlap_grad_reduce=setting.overlap_grad_reduce
    )
    source = inspect_checkpoint(work_dir / "weights")
    load_weights(source, model, spec, layout, split)
    if adapter is not None:
        held = list(factors(chunks, of, split))
        fill(held, adapter.source, work_dir.parent / ADAPTER)
    dp_rank = parallel_state.get_data_parallel_rank()

    for index, case in enumerate(cases(spec, setting.packed)):
        # As in training, where rows of one sample are no longer than a microbatch needs.
        batches = make_batches(
            spec, case, make_samples(spec, case), parts=layout.row_parts,
            vary=options.row_lengths_vary,
        )[dp_rank :: layout.dp]
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        loss, _ = mean_loss(run_batches(model, batches, device), device)
        gradients = work_dir / f"{index}.gradients"
        if adapter is not None:
            save_gradients(gradients, held)
        else:
            _save_gradients(gradients, source, model, spec, layout)
        for chunk in model:
            chunk.eval()
        with torch.no_grad():
            logits = run_batches(
                model, batches, device, forward_only=True, step=_logits_step,
                collect_non_loss_data=True,
            )
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True) and (
            parallel_state.get_tensor_model_parallel_rank() == 0
        ):
            file = f"{index}.logits.{dp_rank}.{parallel_state.get_context_parallel_rank()}.pt"
            torch.save([one.float().cpu() for one in logits], work_dir / file)
        if torch.distributed.get_rank() == 0:
            torch.save(torch.tensor(loss, dtype=torch.float64), work_dir / f"{index}.loss.pt")


def _logits_step(stream, model):
    from megatron.core import tensor_parallel

    from megatron_vl.ops.segments import Segments

    batch = next(stream)
    output = model(
        batch.tokens, batch.position_ids,
        Segments.from_cu_seqlens(batch.cu_seqlens, stream.device),
        pixel_patches=batch.pixel_patches, grid_thw=batch.grid_thw,
    )

    def gather(logits, non_loss_data=True):
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits.contiguous())

    return output, gather


def _gradient(weight: torch.nn.Parameter) -> torch.Tensor:
    """Summed over microbatches; zero of a constant."""
    return weight.main_grad if weight.requires_grad else torch.zeros_like(weight)


def _save_gradients(directory: Path, source, model, spec: ModelSpec, layout: Layout) -> None:
    """This rank's summed gradients in the place of the weights of its checkpoint file."""
    from megatron.core import parallel_state

    from megatron_vl.models.common.layer_spec import to_local_names

    rank = torch.distributed.get_rank()
    if layout.first_with_its_shard(rank):
        shard, pp = layout.shard(rank), parallel_state.get_pipeline_model_parallel_rank()
        file = Path("release") / rank_file(layout, shard, pp)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of its `args`
            content = torch.load(source.root / file, weights_only=True)
        for number, chunk in enumerate(model):
            part = content[f"model{number}" if len(model) > 1 else "model"]
            own = dict(chunk.module.named_parameters())
            gradients = {name: _gradient(own.pop(to_local_names(name, own))) for name in part}
            assert not own, own.keys()
            if layout.vit_data_parallel:
                gradients |= _cut_vision(gradients, spec, source.split, layout, shard, pp, number)
            part.update({key: value.detach().cpu().clone() for key, value in gradients.items()})
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, directory / file)
        (directory / "latest_checkpointed_iteration.txt").write_text("release")
    barrier()


def _cut_vision(gradients, spec: ModelSpec, split: StageSplit, layout: Layout, shard: Shard,
                stage: int, chunk: int) -> dict[str, torch.Tensor]:
    """A whole tower's gradients as the checkpoint of a rank with this shard has its part."""
    from megatron_vl.models.registry import family
    from megatron_vl.training.checkpoint.weights import vision_inventory
    from megatron_vl.weights.recut import recut

    weights = family(spec.model_type).weight_map(spec)
    at = {"split": split, "stage": stage, "chunk": chunk}
    have = vision_inventory(weights, **at, layout=Layout(), shard=Shard())
    want = vision_inventory(weights, **at, layout=layout, shard=shard)
    made = recut({one.id: gradients[one.name] for one in have}, have, want)
    return {one.name: made[one.id] for one in want}


def read_ours(
    work_dir: Path, index: int, case: Case, spec: ModelSpec, samples, layout: Layout, gradients
) -> Outcome:
    """What the ranks left for case `index`; rows are taken apart into samples again."""
    per_batch = [None] * case.num_microbatches
    for rank in range(layout.dp):
        parts = [
            torch.load(work_dir / f"{index}.logits.{rank}.{part}.pt", weights_only=True)
            for part in range(layout.cp)
        ]
        per_batch[rank :: layout.dp] = [torch.cat(one, dim=1) for one in zip(*parts, strict=True)]
    # Rows of [s, V], without what pads the vocabulary for tensor parallelism.
    rows = [row for batch in per_batch for row in batch[..., : spec.decoder.vocab_size]]
    logits, at = [], 0
    for number, sample in enumerate(samples):
        row, place = divmod(number, case.samples_per_row)
        at = at if place else 0
        length = sample.tokens.numel()
        logits.append(rows[row][at : at + length])
        at += length
    loss = float(torch.load(work_dir / f"{index}.loss.pt", weights_only=True))
    return Outcome(logits=logits, loss=loss, gradients=gradients)
