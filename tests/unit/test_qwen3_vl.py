"""What Qwen3-VL does as no other family: its positions, its videos, and times in a text."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from commands import megatron_vl
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.vision_utils import get_vision_interpolation_indices_and_weights
from true_sizes import write

from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.encode.chat import replaced
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.lint.mask import pieces
from megatron_vl.errors import InputError
from megatron_vl.models import family, load_spec
from megatron_vl.models.common.deepstack.positional_table import PositionalTable
from megatron_vl.models.media import MediaLimits, MediaSettings, StoredMedia


def test_learned_positions_are_interpolated_as_transformers_does():
    torch.manual_seed(0)
    side, grids = 8, [(1, 8, 8), (2, 4, 14), (1, 2, 2), (1, 20, 6), (1, 8, 8)]
    table = PositionalTable(side**2, 5)
    places, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), num_grid_per_side=side, align_corners=True, spatial_merge_size=2
    )
    want = (table.weight[places] * weights[..., None]).sum(1)
    torch.testing.assert_close(table(grids, 2), want)


@pytest.fixture(scope="module")
def processor_of(deepstack_model_dir):
    """The processor of a run's limits."""
    spec = load_spec(deepstack_model_dir)

    def of(**limits):
        return family(spec.model_type).processor(deepstack_model_dir, spec, MediaLimits(**limits))

    return of


def video(frames, fps=2.0, height=300, width=200, **more):
    return StoredMedia(kind="video", files=("0",), height=height, width=width, num_frames=frames,
                       fps=fps, **more)


BUDGETS = [  # of a run, and what it makes of the budget for a number of frames
    ({}, lambda t: (3136, 1003520)),  # of the tiny model's video settings
    ({"video_max_pixels": 20_000}, lambda t: (min(3136, 20_000 * t), 20_000 * t)),
    ({"video_min_pixels": 90_000}, lambda t: (90_000 * t, max(90_000 * t, 1003520))),
    ({"video_min_pixels": 4096, "video_max_pixels": 9000}, lambda t: (4096 * t, 9000 * t)),
]


@pytest.mark.parametrize(("limits", "budget"), BUDGETS)
@pytest.mark.parametrize("frames", [4, 7, 20])
def test_a_budget_is_of_all_frames_of_a_video(frames, limits, budget, processor_of):
    least, most = budget(frames)
    height, width = smart_resize(frames, 300, 200, factor=32, min_pixels=least, max_pixels=most)
    found = processor_of(**limits).shape(video(frames))
    assert found == (-(-frames // 2), height // 16, width // 16)


@pytest.mark.parametrize("changes", [
    {"max_pixels": 90_000}, {"min_pixels": 9000}, {"size": {"shortest_edge": 3136}},
])
def test_pixels_that_transformers_would_not_size_videos_by_are_refused(
    changes, deepstack_model_dir, tmp_path
):
    there = shutil.copytree(deepstack_model_dir, tmp_path / "model")
    file = there / "video_preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    spec = load_spec(there)
    of = family(spec.model_type)
    for read in (of.processor, of.check_media_files):
        with pytest.raises(InputError, match="_edge of size, and remove m.._pixels") as told:
            read(there, spec)
        assert str(file) in str(told.value)


@pytest.mark.parametrize(("media", "frames", "times"), [
    (video(5), [0, 1, 2, 3, 4], [0.25, 1.25, 2.0]),  # the last one twice
    (video(300, 30.0), [*np.linspace(0, 299, 20).round().astype(int)], None),
    (video(4, None), [0, 1, 2, 3], [0.25, 1.25]),  # frames alone: at video_fps
    (video(1), [0], [0.0]),
    (video(3, 30.0), [0, 1, 2], [1 / 60, 2 / 30]),
    (video(100, 10.0, settings=MediaSettings(video_start=2.0, video_end=6.0, nframes=4)),
     [20, 33, 47, 60], [2.65, 5.35]),
])
def test_frames_are_evenly_apart_and_have_their_times(media, frames, times, processor_of):
    processor = processor_of()
    assert processor.frames(media) == frames
    found = processor.times(media)
    assert len(found) == processor.shape(media)[0]
    if times is not None:
        assert found == pytest.approx(times)


@pytest.fixture(scope="module")
def encoder(deepstack_model_dir):
    spec = load_spec(deepstack_model_dir)
    return ModelEncoder.from_hf_dir(deepstack_model_dir, spec, family(spec.model_type))


def asked(*parts):
    return [Turn(role="user", parts=parts), Turn(role="assistant", parts=(Part(text="b"),))]


def test_a_sample_is_shown_with_each_video_once_and_its_times(encoder):
    image = StoredMedia(kind="image", files=("1",), height=64, width=64)
    tokens, labels, grids = encoder.encode(
        asked(Part(media="video"), Part(media="image"), Part(text="?")), [video(5), image])
    shown = list(pieces(tokens, labels, chat=encoder.chat, media_tokens=encoder.places(grids)))
    assert [one.media for one in shown if one.media is not None] == [0, 1]
    said = "".join(one.text for one in shown)
    assert [said.count(f"<{time} seconds>") for time in ("0.2", "1.2", "2.0")] == [1, 1, 1]
    assert [one.text for one in shown if one.trained] == ["b", "<|im_end|>"]


def test_a_mark_of_a_video_that_a_person_wrote_is_no_video(encoder):
    mark = Part(text="<|vision_start|><|video_pad|><|vision_end|>")
    with pytest.raises(BadEntry, match="its text has 2 video marks for 1 videos"):
        encoder.encode(asked(Part(media="video"), mark), [video(5)])


@pytest.mark.parametrize(("first", "travelling"), [(1, 2), (3, 0)])
def test_a_dry_run_says_how_many_features_travel(first, travelling, tmp_path):
    done = megatron_vl(
        "train", "--dry-run", "--hf-config", write(tmp_path, "2B", "qwen3_vl"), "--train-data-path",
        "none", "--train-iters", 1, "--nproc-per-node", 2, "--pp", 2, "--first-stage-layers", first,
    )
    note = f"note: {travelling} of the vision tower's 3 features travel to later stages, so that " \
           f"stages send {1 + travelling} times the hidden states; with 3 language layers"
    assert done.code == 0 and (note in done.out) == bool(travelling), done.text


def test_what_stands_behind_a_mark_moves_by_what_it_grew():
    text = "a # b # c"
    made, spans = replaced(text, "#", ["one", "two"], [(0, 1), (4, 5), (4, 9), (8, 9)])
    assert made == "a one b two c"
    assert [made[begin:end] for begin, end in spans] == ["a", "b", "b two c", "c"]
    assert replaced("a", "#", [], [(0, 1)]) == ("a", [(0, 1)])
