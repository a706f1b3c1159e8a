"""Random samples that differ in what can go wrong, and the microbatches that they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_vl.data.encode.rows import least_length, make_batch, make_row
from megatron_vl.data.encode.samples import IGNORE, EncodedSample, RowBatch
from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec

ROW_MULTIPLE = 128  # of tokens, that a case's longest row is filled up to


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A batch to compare on."""

    name: str
    images: tuple[tuple[tuple[int, int, int], ...], ...]  # per sample the grids of its media
    samples_per_row: int = 1
    rows_per_microbatch: int = 1

    @property
    def num_microbatches(self) -> int:
        """As many for every case, so that a layout fits all of them or none."""
        return len(self.images) // (self.samples_per_row * self.rows_per_microbatch)

    def unpacked(self) -> Case:
        """The same microbatches with a row for every sample."""
        rows = self.samples_per_row * self.rows_per_microbatch
        return replace(self, samples_per_row=1, rows_per_microbatch=rows)


SMALL, WIDE, TALL, LARGE = (1, 4, 4), (1, 4, 8), (1, 10, 2), (1, 8, 8)
CLIP = (3, 4, 4)  # a video; longer than its sides, where rules for positions differ

CASES = (
    Case(name="one image", images=((SMALL,),) * 4),
    Case(
        name="images and videos",
        images=((SMALL, WIDE), (TALL,), (LARGE,), (CLIP, SMALL), (WIDE,), (TALL, TALL), (LARGE,),
                (SMALL, SMALL, SMALL)) * 2,
        samples_per_row=2, rows_per_microbatch=2,
    ),
    Case(name="text only", images=((),) * 8, samples_per_row=2),
    Case(
        name="a microbatch without images",
        images=((SMALL,), (WIDE, SMALL), (), (), (LARGE,), (), (), ()),
        rows_per_microbatch=2,
    ),
)


MICROBATCHES = 4
assert {case.num_microbatches for case in CASES} == {MICROBATCHES}


def cases(spec: ModelSpec, packed: bool) -> list[Case]:
    """Those that the model can see, with several samples a row where they have it, or with one."""
    seen = [_as_seen(case, spec) for case in CASES
            if spec.vision is not None or not any(case.images)]
    return seen if packed else [case.unpacked() for case in seen]


def _as_seen(case: Case, spec: ModelSpec) -> Case:
    """The case with the grid that every image has in this model, where all have the same."""
    only = None if spec.vision is None else spec.vision.only_grid
    if only is None:
        return case
    return replace(case, images=tuple((only,) * len(grids) for grids in case.images))


def make_samples(spec: ModelSpec, case: Case, seed: int = 0) -> list[EncodedSample]:
    """Random text and pixels around the grids of `case`; half of each sample's tail is trained."""
    generator = torch.Generator().manual_seed(seed)
    # No padding token either: transformers' embedding keeps its gradient at zero on purpose.
    tokens = spec.tokens
    reserved = {tokens.image, tokens.video, tokens.vision_start, tokens.vision_end, tokens.pad}
    end = min({spec.decoder.vocab_size, *reserved} - {None, 0})  # reserved ones come last, or first

    def text(count: int) -> list[int]:
        return torch.randint(int(0 in reserved), end, (count,), generator=generator).tolist()

    samples = []
    for number, grids in enumerate(case.images):
        tokens = text(3 + number % 3)
        for grid in grids:
            runs = grid[0] if spec.tokens.timestamp else 1  # each frame of a video by itself
            places = [_placeholder(spec, grid)] * (spec.vision.num_tokens(grid) // runs)
            for _ in range(runs):
                tokens += [spec.tokens.vision_start, *places, spec.tokens.vision_end, *text(2)]
        prompt = len(tokens)
        tokens = torch.tensor(tokens + text(5 + number))
        labels = torch.full_like(tokens, IGNORE)
        labels[prompt - 1 : -1] = tokens[prompt:]
        labels[-2] = IGNORE  # a hole, as a turn's newline leaves one
        patches = sum(map(math.prod, grids))
        samples.append(EncodedSample(
            __key__=str(number), __restore_key__=(), name=str(number), tokens=tokens,
            labels=labels, grids=tuple(grids), media=(), read=None,
            seconds=tuple(0.75 if grid[0] > 1 else 0.0 for grid in grids),
            patches=torch.randn(patches, spec.vision.patch_dim, generator=generator)
            if grids else None,
        ))
    return samples


def _placeholder(spec: ModelSpec, grid: Sequence[int]) -> int:
    return spec.tokens.video if grid[0] > 1 else spec.tokens.image


def make_batches(
    spec: ModelSpec, case: Case, samples: Sequence[EncodedSample], *, parts: int = 1,
    vary: bool = False,
) -> list[RowBatch]:
    """The samples of `case` as microbatches of packed rows.

    Args:
        parts: that rows are cut into, of as many tokens each.
        vary: a microbatch's rows are no longer than that needs; else those of all have one length.
    """
    positions = family(spec.model_type).positions(spec)
    rows = [make_row(samples[i : i + case.samples_per_row])
            for i in range(0, len(samples), case.samples_per_row)]
    unit = math.lcm(ROW_MULTIPLE, parts)
    most = -(-max(row.num_tokens for row in rows) // unit) * unit
    batches = []
    for start in range(0, len(rows), case.rows_per_microbatch):
        group = rows[start : start + case.rows_per_microbatch]
        length = least_length(group, multiple=parts if vary else most, most=most)
        batches.append(make_batch(group, row_length=length, pad_token=0, positions=positions))
    return batches


def least_chunks(spec: ModelSpec, case: Case) -> int:
    """The fewest cross-entropy-chunks that cut the logits of a microbatch: a part in so many of its
    positions are fewer than are trained."""
    return min(-(-batch.tokens.numel() // (int((batch.loss_mask > 0).sum()) - 1))
               for batch in make_batches(spec, case, make_samples(spec, case)))
