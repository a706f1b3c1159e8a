"""Qwen2.5-VL's windows and positions in time, against transformers'."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.vision_utils import get_vision_window_index

from megatron_vl.models import family, load_spec
from megatron_vl.models.media import MediaSettings, StoredMedia
from megatron_vl.models.qwen2_5_vl.tower import window_order

GRIDS = {  # cells a side, over images of one and of several windows, exact multiples and not
    4: [[(1, 10, 12)], [(2, 4, 6)], [(1, 8, 8), (1, 16, 24)], [(1, 2, 2)], [(3, 18, 6), (1, 4, 4)]],
    2: [[(1, 8, 8)], [(1, 10, 2), (2, 4, 6)]],
    1: [[(1, 4, 6)]],
}


@pytest.mark.parametrize(("side", "grids"), [
    (side, grids) for side, several in GRIDS.items() for grids in several
])
def test_windows_are_those_of_transformers(side, grids):
    order, bounds = get_vision_window_index(
        torch.tensor(grids), spatial_merge_size=2, window_size=side * 28, patch_size=14
    )
    bounds = torch.unique_consecutive(bounds)  # it has empty windows
    cells, sizes, start = [], [], 0
    for grid in grids:
        here, windows = window_order(grid, 2, side)
        cells += (here + start).tolist()
        sizes += windows
        start += len(here)
    assert cells == order.tolist()
    assert [4 * size for size in sizes] == bounds.diff().tolist()


def test_the_published_example():
    order, sizes = window_order((1, 10, 12), 2, 4)
    assert order.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, *range(12, 16), *range(18, 22), 4, 5, 10, 11,
                              16, 17, 22, 23, *range(24, 30)]
    assert sizes == [16, 8, 4, 2]


@pytest.fixture(scope="module")
def reference(window_model_dir):
    with torch.device("meta"):
        return Qwen2_5_VLModel(AutoConfig.from_pretrained(window_model_dir))


@pytest.mark.parametrize("seconds", [0.25, 0.5, 0.75, 1.0, 2.0, 4 / 3])
def test_time_is_counted_in_seconds_as_transformers_counts_it(seconds, reference, window_model_dir):
    spec, draw = load_spec(window_model_dir), random.Random(seconds)
    media = [("image", (1, 4, 4)), ("video", (5, 4, 6)), ("video", (3, 2, 2)), ("image", (1, 2, 8))]
    tokens = []
    for kind, (t, h, w) in media:
        tokens += [1] * draw.randint(1, 4) + [getattr(spec.tokens, kind)] * (t * h * w // 4)
    tokens = torch.tensor([*tokens, 1, 1])
    is_image, is_video = tokens == spec.tokens.image, tokens == spec.tokens.video
    want, _ = reference.get_rope_index(
        tokens[None], (is_image.int() + 2 * is_video.int())[None],
        image_grid_thw=torch.tensor([grid for kind, grid in media if kind == "image"]),
        video_grid_thw=torch.tensor([grid for kind, grid in media if kind == "video"]),
        second_per_grid_ts=torch.tensor([seconds, 2 * seconds]),
    )
    given = (tokens, [grid for _, grid in media], [0.0, seconds, 2 * seconds, 0.0])
    of = family(spec.model_type)
    assert torch.equal(of.positions(spec, "transformers5")(*given), want[:, 0])
    # As published, text goes on after the last frame.
    published = of.positions(spec)(*given)
    after = int(is_video.nonzero()[-1]) + 1
    video = published[:, : after][:, is_video[:after]]
    assert (published[:, after] > video.max()).all()


@pytest.mark.parametrize(("kind", "fps", "frames", "settings", "seconds"), [
    ("image", None, 1, None, 0.0),
    ("video", 30.0, 300, None, 1.0),  # taken at 2 a second, two frames a patch
    ("video", 30.0, 300, MediaSettings(fps=4.0), 0.5),
    ("video", 25.0, 100, MediaSettings(nframes=4), 2.0),  # four frames of four seconds
    ("video", 10.0, 100, MediaSettings(video_start=2.0, video_end=6.0, nframes=4), 2.05),
    ("video", None, 8, None, 1.0),  # frames alone: at video_fps
])
def test_seconds_are_those_between_frames_that_are_taken(
    kind, fps, frames, settings, seconds, window_model_dir
):
    spec = load_spec(window_model_dir)
    processor = family(spec.model_type).processor(window_model_dir, spec)
    media = StoredMedia(kind=kind, files=("0",), height=56, width=56, num_frames=frames, fps=fps,
                        settings=settings)
    assert processor.seconds(media) == pytest.approx(seconds)
