"""How a microbatch's images are dealt out to the ranks that share its rows, and what they cost."""

import random

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from megatron_vl.models import load_spec
from megatron_vl.models.common.context_parallel import RowShare
from megatron_vl.models.common.fusion import fuse
from megatron_vl.models.common.media_share import deal, loads


@pytest.mark.parametrize(
    ("costs", "parts", "dealt"),
    [
        ([], 2, [[], []]),
        ([5], 2, [[0], []]),
        ([1, 1, 1, 1], 2, [[0, 2], [1, 3]]),
        ([3, 1, 1, 1], 2, [[0], [1, 2, 3]]),
        ([1, 9, 1, 1, 8], 2, [[1, 2], [0, 3, 4]]),
        ([2, 2], 4, [[0], [1], [], []]),
    ],
)
def test_the_largest_goes_first_to_who_has_least(costs, parts, dealt):
    assert deal(costs, parts) == dealt


def test_every_image_is_one_rank_s_and_costs_come_out_even():
    draw = random.Random(0)
    for _ in range(500):
        costs = [draw.randint(1, 100) for _ in range(draw.randint(0, 20))]
        parts = draw.randint(1, 8)
        dealt = deal(costs, parts)
        assert sorted(i for one in dealt for i in one) == list(range(len(costs)))
        assert all(one == sorted(one) for one in dealt)
        assert loads(costs, parts) == [sum(costs[i] for i in one) for one in dealt]
        # No order of the images can give the busiest less than the mean, or than the largest.
        bound = max(sum(costs) / parts, max(costs, default=0))
        assert max(loads(costs, parts)) <= 4 / 3 * bound + max(costs, default=0) / 3


@pytest.mark.parametrize("model", ["model_dir", "window_model_dir", "deepstack_model_dir"])
@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 16, 10), (3, 8, 6)])
def test_flops_are_those_that_torch_counts_in_transformers_vision_tower(grid, model, request):
    model_dir = request.getfixturevalue(model)
    spec = load_spec(model_dir)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    t, h, w = grid
    pixels = torch.zeros(t * h * w, spec.vision.patch_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.visual(pixels, grid_thw=torch.tensor([grid]))
    assert spec.vision.forward_flops(grid) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_embeddings_in_their_places_are_not_kept_for_backward_beside_the_row(monkeypatch):
    monkeypatch.setattr(RowShare, "__init__", lambda self: self.__dict__.update(size=1, rank=0))
    words, media = torch.randn(6, 1, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    is_media, kept = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda x: x):
        row = fuse(words, media, is_media, RowShare())
    assert torch.equal(row[is_media[0], 0], media) and torch.equal(row[0], words[0])
    assert not any(one.is_floating_point() for one in kept)
