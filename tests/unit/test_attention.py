"""Variable-length attention against the plain formula, and the segments it works on."""

from __future__ import annotations

import pytest
import torch

from megatron_vl.errors import InputError
from megatron_vl.ops.attention import BACKENDS, choose_backend
from megatron_vl.ops.segments import Segments


def plain(q, k, v, lengths, causal, scale):
    """softmax(q k^T) v, one segment and one head at a time."""
    repeat = q.shape[1] // k.shape[1]
    out, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        heads = []
        for n in range(q.shape[1]):
            scores = q[rows, n] @ k[rows, n // repeat].T * scale
            if causal:
                scores = scores.masked_fill(
                    torch.ones(length, length).triu(1).bool(), float("-inf")
                )
            heads.append(scores.softmax(-1) @ v[rows, n // repeat])
        out.append(torch.stack(heads, 1))
        start += length
    return torch.cat(out)


LENGTHS = {
    "one segment": [7],
    "equal segments": [4, 4, 4],
    "long and short": [1, 30, 2, 17, 16, 1, 30],
    "descending by one": [9, 8, 7, 6, 5],
}


@pytest.mark.parametrize("name", [n for n, b in BACKENDS.items() if b.why_not() is None])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_output_and_gradients_equal_the_plain_formula(name, causal, groups, lengths):
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, heads, 8, dtype=torch.float64, requires_grad=True)
               for heads in (4, groups, groups))
    want = plain(q, k, v, lengths, causal, 0.3)
    weights = torch.randn_like(want)
    expected = torch.autograd.grad((want * weights).sum(), (q, k, v))
    got = choose_backend(name)(q, k, v, Segments(lengths), causal=causal, scale=0.3)
    assert torch.allclose(got, want, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), (q, k, v)), expected, strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_a_change_in_one_segment_leaves_the_others_untouched():
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, 2, 4) for _ in range(3))
    attend = choose_backend("sdpa")
    before = attend(q, k, v, Segments([5, 3, 4]), causal=True, scale=0.5)
    v[5:8] += 1
    after = attend(q, k, v, Segments([5, 3, 4]), causal=True, scale=0.5)
    changed = (before != after).flatten(1).any(1)
    assert changed[5:8].all() and not changed[:5].any() and not changed[8:].any()


def test_segments_round_trip_with_cumulative_lengths():
    segments = Segments([3, 1, 2])
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert segments.cu_seqlens.dtype == torch.int32
    assert Segments.from_cu_seqlens(segments.cu_seqlens).lengths == [3, 1, 2]
    assert (segments.num_tokens, segments.max_length) == (6, 3)


def test_an_empty_segment_and_an_unknown_backend_are_refused():
    with pytest.raises(InputError, match="positive"):
        Segments([3, 0])
    with pytest.raises(InputError, match="unknown; use auto or one of"):
        choose_backend("fast")
