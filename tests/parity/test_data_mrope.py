"""Positions against transformers' `get_rope_index`, bit for bit.

transformers 5 alone is here; where transformers 4, vLLM and the published training differ from it,
after a video, the rule is spelled out again.
"""

import random
from functools import partial
from itertools import product

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from megatron_vl.models.common.media_positions import rope_index

SMALL, WIDE, TALL, CLIP, LONG = (1, 4, 4), (1, 2, 10), (1, 12, 2), (3, 4, 6), (8, 2, 2)


@pytest.fixture(scope="module")
def reference(hf_dir):
    with torch.device("meta"):
        return Qwen2VLModel(AutoConfig.from_pretrained(hf_dir))


CASES = {
    "text only": [],
    "one image": [("image", SMALL)],
    "several sizes": [("image", SMALL), ("image", WIDE), ("image", TALL)],
    "video": [("video", CLIP)],
    "long video and images": [("image", TALL), ("video", LONG), ("image", SMALL), ("video", CLIP)],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("starts_with_text", [True, False])
def test_positions_equal_transformers(reference, spec, name, starts_with_text):
    draw = random.Random(name)
    ids = spec.tokens
    tokens, grids = [], {"image": [], "video": []}
    for number, (kind, grid) in enumerate(CASES[name]):
        if starts_with_text or number:
            tokens += [1] * draw.randint(1, 5)
        tokens += [getattr(ids, kind)] * (grid[0] * grid[1] * grid[2] // 4)
        grids[kind].append(grid)
    tokens = torch.tensor(tokens + [1] * 3)
    kinds = (tokens == ids.image).int() + 2 * (tokens == ids.video).int()
    want, _ = reference.get_rope_index(
        tokens[None],
        kinds[None],
        image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
    )
    rope = partial(
        rope_index, tokens, [grid for _, grid in CASES[name]], image_token=ids.image,
        video_token=ids.video, merge_size=spec.vision.spatial_merge_size,
    )
    have = rope(video_positions="transformers5")
    assert have.dtype == want.dtype
    assert torch.equal(have, want[:, 0])
    assert rope().tolist() == as_published(tokens.tolist(), CASES[name], ids)


def as_published(tokens: list[int], media: list, ids) -> list[list[int]]:
    """Token by token, as transformers 4.57 counts: from the largest position there is, and one."""
    positions: list[list[int]] = [[], [], []]
    grids = iter(media)
    at = 0
    while at < len(tokens):
        start = max(map(max, positions)) + 1 if at else 0
        if tokens[at] not in (ids.image, ids.video):
            cells = [(0, 0, 0)]
        else:
            _, (frames, rows, columns) = next(grids)
            cells = list(product(range(frames), range(rows // 2), range(columns // 2)))
        for cell in cells:
            for axis, place in zip(positions, cell, strict=True):
                axis.append(start + place)
        at += len(cells)
    return positions
