"""How well a model in evaluation predicts each sample: its right tokens, and whole answers.

A sample's answer is exact where each of its tokens is the likeliest behind the true tokens before
it. Greedy decoding then answers to the letter, and only then. What is trained beside answers, such
as prompts, counts in the loss and among the right tokens alone.

Letters: n trained positions of this rank, k samples of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from megatron.core import parallel_state

from megatron_vl.data.encode.previews import Preview, chosen
from megatron_vl.data.encode.samples import RowBatch
from megatron_vl.models.common.context_parallel import RowShare
from megatron_vl.models.common.language_model import Scores
from megatron_vl.ops.segments import segment_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """The answers of one sample that is shown, or those of their tokens that a rank has."""

    preview: Preview
    places: list[int]  # in its microbatch; an answer's are neighbours
    expected: list[int]
    likeliest: torch.Tensor  # int64, on the device


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleScores:
    """The samples of a microbatch, in order; tensors are on the device, and of this rank's tokens.
    """

    right_k: torch.Tensor  # int64, trained tokens that are the likeliest
    wrong_k: torch.Tensor  # int64, tokens of its answers that are not
    loss_k: torch.Tensor  # float64, summed
    trained: list[int]  # tokens of the whole sample
    answers: list[bool]  # whether the sample has any: cut, it may have prompts alone
    datasets: list[str]
    predicted: list[Predicted]


@dataclass(kw_only=True, slots=True)
class Tally:
    """Samples added up."""

    loss: float = 0.0
    right: int = 0  # tokens
    trained: int = 0  # tokens
    exact: int = 0  # samples
    answered: int = 0  # samples that have answers
    samples: int = 0

    def add(self, other: Tally) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def sum_of(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for one in tallies:
        total.add(one)
    return total


def sum_scores(scores: Scores, *, batch: RowBatch, share: RowShare, sum_loss: Callable):
    """What `sum_loss` returns of a microbatch, with the scores of its samples for the log.

    What is where is told on the host, so that nothing waits for the device.
    """
    total, divisor, found = sum_loss(scores.loss_n)
    device, mask_bs = scores.loss_n.device, batch.loss_mask
    segment_bs = segment_numbers(batch.cu_seqlens).view_as(batch.labels)
    trained = torch.bincount(segment_bs[mask_bs > 0], minlength=len(batch.cu_seqlens) - 1)
    is_sample = trained > 0  # padding trains nothing, every sample something
    assert int(is_sample.sum()) == batch.num_samples, batch.sample_keys
    sample_bs = (is_sample.cumsum(0) - 1)[segment_bs]
    answers_bs = mask_bs > 0 if batch.answers is None else batch.answers
    answered = torch.bincount(segment_bs[answers_bs], minlength=len(batch.cu_seqlens) - 1)
    sample_n, label_n, answers_n, place_n = (
        share.trained(one, mask_bs)
        for one in (sample_bs, batch.labels, answers_bs,
                    torch.arange(mask_bs.numel()).view_as(mask_bs))
    )

    def on_device(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=True)

    at_n = on_device(sample_n)
    right_n = (scores.likeliest_n == on_device(label_n)).long()
    empty = torch.zeros(batch.num_samples, dtype=torch.int64, device=device)
    predicted = []
    for number, preview in batch.previews.items():
        (mine,) = ((sample_n == number) & answers_n).nonzero(as_tuple=True)
        predicted.append(Predicted(
            preview=preview, places=place_n[mine].tolist(), expected=label_n[mine].tolist(),
            likeliest=scores.likeliest_n.index_select(0, on_device(mine)),
        ))
    return total, divisor, found | {"samples": SampleScores(
        right_k=empty.index_add(0, at_n, right_n),
        wrong_k=empty.index_add(0, at_n, (1 - right_n) * on_device(answers_n)),
        loss_k=empty.double().index_add(0, at_n, scores.loss_n.double()),
        trained=trained[is_sample].tolist(), answers=(answered[is_sample] > 0).tolist(),
        datasets=batch.datasets, predicted=predicted,
    )}


def tally_up(found: list[SampleScores], device: torch.device) -> dict[str, Tally]:
    """The samples of each dataset over all ranks, by its name; all ranks call it.

    Args:
        found: of this rank's microbatches; on ranks of the last stage.
    """
    tallies: dict[str, Tally] = {}
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        sums = torch.zeros(3, sum(len(one.trained) for one in found), dtype=torch.float64,
                           device=device)
        if found:
            sums[0] = torch.cat([one.right_k for one in found])
            sums[1] = torch.cat([one.wrong_k for one in found])
            sums[2] = torch.cat([one.loss_k for one in found])
        # A sample's tokens are on several context-parallel ranks.
        torch.distributed.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        if _speaks():
            known = (zip(one.datasets, one.trained, one.answers, strict=True) for one in found)
            each = zip(chain.from_iterable(known), *sums.tolist(), strict=True)
            for (name, count, answered), right, wrong, loss in each:
                tallies.setdefault(name, Tally()).add(Tally(
                    loss=loss, right=int(right), trained=count, samples=1, answered=int(answered),
                    exact=int(answered and wrong == 0),
                ))
    total: dict[str, Tally] = {}
    for one in _everyone(tallies):
        for name, tally in one.items():
            total.setdefault(name, Tally()).add(tally)
    return dict(sorted(total.items()))


def shown_samples(found: list[SampleScores]) -> list[Predicted]:
    """The samples that are shown, whole, on rank 0; all ranks call it.

    They are the same in every layout and at every validation of the same samples: see `chosen`.
    Ranks tell their names first, and then send those of them that are chosen.
    """
    mine = {}
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True) and _first_of_tensor_parallel():
        mine = {one.preview.name: one for batch in found for one in batch.predicted}
    own = {name: mine[name] for name in chosen(_named(mine.values()), of_each=True)}
    names = chosen(chain.from_iterable(_everyone(_named(own.values()))))
    rank = torch.distributed.get_rank()
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(
        {name: _part(own[name]) for name in names if name in own},
        parts if rank == 0 else None, dst=0,
    )
    if rank != 0:
        return []
    return [_joined([one[name] for one in parts if name in one]) for name in names]


def _named(of: Iterable[Predicted]) -> list[tuple[str, str]]:
    return [(one.preview.dataset, one.preview.name) for one in of]


def _part(one: Predicted) -> tuple:
    """What this rank has of a sample, and its preview once."""
    rank = parallel_state.get_context_parallel_rank()
    preview = one.preview if rank == 0 else None
    return rank, preview, one.places, one.expected, one.likeliest.tolist()


def _joined(parts: list[tuple]) -> Predicted:
    """A sample of what context-parallel ranks have of it, in the order of its tokens."""
    _, (preview, *_), *columns = zip(*sorted(parts, key=lambda part: part[0]), strict=True)
    places, expected, likeliest = (list(chain.from_iterable(column)) for column in columns)
    return Predicted(preview=preview, places=places, expected=expected,
                     likeliest=torch.tensor(likeliest, dtype=torch.int64))


def _first_of_tensor_parallel() -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0


def _speaks() -> bool:
    """Whether this rank tells what several know: tensor and context parallel ones alike."""
    return _first_of_tensor_parallel() and parallel_state.get_context_parallel_rank() == 0


def _everyone(mine: object) -> list:
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
