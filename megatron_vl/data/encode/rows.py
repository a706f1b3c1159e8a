"""Encoded samples to rows, and rows of one length to a `RowBatch`.

S tokens a row, B rows, P patches, D numbers a patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from megatron.energon import Sample
from megatron.energon.edataclass import edataclass

from megatron_vl.data.encode.samples import IGNORE, EncodedSample, RowBatch
from megatron_vl.models.family import Positions


@edataclass
class Row(Sample):
    """Samples that share one row."""

    samples: list[EncodedSample]
    patches: torch.Tensor | None = None  # float32 [P, D] of the samples' media, in order

    @property
    def num_tokens(self) -> int:
        return sum(sample.tokens.numel() for sample in self.samples)


def make_row(samples: Sequence[EncodedSample], patches: torch.Tensor | None = None) -> Row:
    """The row of `samples`; its patches are theirs, where they are not given."""
    own = [sample.patches for sample in samples if sample.patches is not None]
    return Row(
        __key__=",".join(sample.__key__ for sample in samples),
        __restore_key__=(),
        samples=list(samples),
        patches=torch.cat(own) if own else patches,
    )


def empty_row() -> Row:
    """A row of padding: evens out batches, trains and counts nothing."""
    return Row(__key__="", __restore_key__=(), samples=[])


def least_length(rows: Sequence[Row], *, multiple: int, most: int) -> int:
    """Tokens of the shortest rows that hold `rows`: a multiple of `multiple`, but `most` at most.
    """
    longest = max(row.num_tokens for row in rows)
    return min(most, max(1, -(-longest // multiple)) * multiple)


def make_batch(
    rows: Sequence[Row], *, row_length: int, pad_token: int, positions: Positions,
    pixel_dtype: torch.dtype = torch.float32,
) -> RowBatch:
    """Lay rows out as the tensors of a `RowBatch`.

    Args:
        row_length: S; no row's samples hold more tokens.
        pad_token: the token that fills a row's tail.
        positions: those of a sample, of its tokens and grids.
        pixel_dtype: of the patches, which are decoded to float32.
    """
    shape = (len(rows), row_length)
    tokens = np.full(shape, pad_token, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    answers = np.zeros(shape, dtype=bool)
    position_ids = np.empty((positions.axes, *shape), dtype=np.int64)
    bounds = [0]
    for number, row in enumerate(rows):
        at = 0
        for sample in row.samples:
            end = at + sample.tokens.numel()
            assert end <= row_length, f"{sample.name} ends at {end} of a row of {row_length}"
            tokens[number, at:end] = sample.tokens.numpy()
            labels[number, at:end] = sample.labels.numpy()
            if sample.answers is not None:
                answers[number, at:end] = sample.answers.numpy()
            where = sample.tokens, sample.grids, sample.seconds
            position_ids[:, number, at:end] = positions(*where)
            bounds.append(number * row_length + end)
            at = end
        if at < row_length:
            # The tail counts from 0 like any sample: its positions stay within the model's range.
            position_ids[:, number, at:] = np.arange(row_length - at)
            bounds.append((number + 1) * row_length)
    samples = [sample for row in rows for sample in row.samples]
    grids = [grid for sample in samples for grid in sample.grids]
    patches = [row.patches for row in rows if row.patches is not None]
    scored = all(sample.answers is not None for sample in samples)
    return RowBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy((labels != IGNORE).astype(np.float32)),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        pixel_patches=_joined(patches, pixel_dtype),
        grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        sample_keys=[sample.name for sample in samples],
        sample_lengths=[sample.num_tokens for sample in samples],
        row_tokens=[row.num_tokens for row in rows],
        tokens_cut=[sample.tokens_cut for sample in samples],
        datasets=[sample.dataset for sample in samples],
        answers=torch.from_numpy(answers) if scored else None,
        previews={number: sample.preview for number, sample in enumerate(samples)
                  if sample.preview is not None},
    )


def _joined(patches: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """One row's float32 patches as they are: they may be a hundred megabytes."""
    patches = [one.to(dtype) for one in patches]
    return torch.cat(patches) if len(patches) > 1 else patches[0] if patches else None
