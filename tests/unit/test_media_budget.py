"""Sizes and frames that an entry asks for one of its images or videos.

The numbers wanted are those of qwen-vl-utils 0.0.14: of `fetch_image`, `calculate_video_frame_range`,
`smart_nframes` and the size that `fetch_video` chooses, run on the same keys.
"""  # noqa: E501

import io
import json
import tarfile
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from raw_entries import PNG, TEXT, media, openai, read, reason, talk

from megatron_vl.cli.main import run
from megatron_vl.data.conversation import BadEntry, from_json, to_json
from megatron_vl.data.encode.model import load_media
from megatron_vl.data.raw.formats.media_columns import media_source, with_settings
from megatron_vl.data.raw.lengths import LengthCounter
from megatron_vl.models import family
from megatron_vl.models.media import BadMedia, MediaLimits, MediaSettings, StoredMedia
from megatron_vl.models.qwen2_vl.media import MediaProcessor

NAMES = {"image": "0.jpg", "video": "a.mp4"}


@pytest.fixture(scope="module")
def processor(hf_dir, spec):
    """With qwen-vl-utils' own limits, as far as they are ours."""
    limits = MediaLimits(image_min_pixels=4 * 784, image_max_pixels=16384 * 784,
                         video_min_pixels=128 * 784, video_max_pixels=768 * 784, video_maxlen=768)
    return MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision, limits=limits)


def _image(height, width, **settings):
    return StoredMedia(kind="image", files=("0.png",), height=height, width=width,
                       settings=MediaSettings(**settings))


def _video(num_frames, rate, height=64, width=64, **settings):
    return StoredMedia(kind="video", files=("0.mp4",), height=height, width=width,
                       num_frames=num_frames, fps=rate, settings=MediaSettings(**settings))


@pytest.mark.parametrize(("height", "width", "asked", "want"), [
    (480, 640, {"max_pixels": 100000}, (252, 364)),
    (480, 640, {"min_pixels": 400000}, (560, 756)),
    (480, 640, {"resized_height": 280, "resized_width": 420}, (280, 420)),
    (100, 80, {"min_pixels": 50000, "max_pixels": 60000}, (252, 224)),
    # qwen-vl-utils refuses this one; the limit that nobody asked for gives way.
    (480, 640, {"max_pixels": 784}, (28, 28)),
])  # fmt: skip
def test_an_image_has_the_size_that_is_asked_for(processor, height, width, asked, want):
    assert processor.shape(_image(height, width, **asked)) == (1, want[0] // 14, want[1] // 14)


@pytest.mark.parametrize(("height", "width", "asked", "want"), [
    (480, 640, {"min_pixels": 400000}, (560, 756)),
    (2000, 3000, {"max_pixels": 10**7}, (616, 924)),
    (480, 640, {"total_pixels": 10**6}, (420, 560)),
    (480, 640, {"total_pixels": 10**5}, (280, 364)),
    (480, 640, {"resized_height": 100, "resized_width": 333}, (112, 336)),
    (480, 640, {"min_pixels": 700000}, (728, 980)),
])  # fmt: skip
def test_a_frame_has_the_size_that_is_asked_for(processor, height, width, asked, want):
    video = _video(8, 2.0, height, width, nframes=8, **asked)
    assert processor.shape(video) == (4, want[0] // 14, want[1] // 14)


@pytest.mark.parametrize(("num_frames", "fps", "asked", "want"), [
    (30, 10.0, {"nframes": 4}, [0, 10, 19, 29]),
    (30, 10.0, {"nframes": 5}, [0, 10, 19, 29]),  # whole patches, to the nearer
    (30, 10.0, {"nframes": 3}, [0, 10, 19, 29]),
    (100, 10.0, {"fps": 1.0}, [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]),
    (100, 10.0, {"fps": 1.0, "max_frames": 6}, [0, 20, 40, 59, 79, 99]),
    (100, 10.0, {"fps": 0.1, "min_frames": 8}, [0, 14, 28, 42, 57, 71, 85, 99]),
    (100, 10.0, {"video_start": 2.0, "video_end": 5.0}, [20, 26, 32, 38, 44, 50]),
    (100, 10.0, {"video_start": 2.25}, [23, 29, 35, 41, 46, 52, 58, 64, 70, 76, 81, 87, 93, 99]),
    (100, 29.97, {"video_end": 3.07, "nframes": 6}, [0, 18, 37, 55, 74, 92]),
    (100, 10.0, {"video_start": 1.0, "video_end": 2.0, "fps": 30.0},
     [10, 11, 12, 13, 14, 16, 17, 18, 19, 20]),
    (40, 10.0, {"video_end": 99.0, "fps": 1}, [0, 13, 26, 39]),
    (1, 10.0, {"fps": 1}, [0]),  # qwen-vl-utils takes no such video; here all of it is taken
])  # fmt: skip
def test_frames_are_those_that_are_asked_for(processor, num_frames, fps, asked, want):
    assert processor.frames(_video(num_frames, fps, **asked)) == want


@pytest.mark.parametrize(("num_frames", "asked", "what"), [
    (30, {"nframes": 40}, "it asks for 40 frames of a video that has 30 there"),
    (30, {"nframes": 1}, "it asks for 1 frames"),
    (100, {"video_start": 3.0, "video_end": 3.05}, "it asks for 3 to 3.05 seconds of a vide"),
    (100, {"video_start": 50.0}, "it asks for 50 to 10 seconds of a video of 10, which is les"),
    (10, {"max_frames": 1}, "it asks for at most 1 frames, less than a patch has"),
])  # fmt: skip
def test_frames_that_are_not_there_are_refused(processor, num_frames, asked, what):
    with pytest.raises(BadMedia, match=what):
        processor.shape(_video(num_frames, 10.0, **asked))


def test_the_run_s_options_hold_where_nothing_is_asked(hf_dir, spec):
    limits = MediaLimits(video_fps=1.0, video_maxlen=4, image_max_pixels=784 * 9)
    run_s = MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision, limits=limits)
    assert len(run_s.frames(_video(100, 10.0, video_end=9.0))) == 4
    assert len(run_s.frames(_video(100, 10.0, max_frames=8))) == 8  # who asks stands above them
    assert run_s.shape(_image(300, 300, min_pixels=784)) == (1, 6, 6)
    assert run_s.shape(_image(300, 300, max_pixels=784 * 17)) == (1, 8, 8)


def test_patches_are_those_of_the_image_at_that_size(processor):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)

    def png(image):
        image.save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    image = Image.fromarray(pixels)
    asked = load_media(processor, _image(96, 80, resized_height=56, resized_width=112),
                              {"0.png": png(image)}.get)
    small = image.resize((112, 56), Image.Resampling.BICUBIC)
    plain = replace(_image(56, 112, max_pixels=1), settings=None)
    assert torch.equal(asked, load_media(processor, plain, {"0.png": png(small)}.get))


# ---- in entries ---------------------------------------------------------------------------------


def _piece(kind, **keys):
    return talk({"type": kind, kind: NAMES[kind], **keys}, TEXT)


def _column(kind, **keys):
    return {"messages": openai(f"<{kind}>?", "x"), f"{kind}s": [{"path": NAMES[kind], **keys}]}


def _beside_a_place(kind, **keys):
    return talk({"type": kind, **keys}, TEXT) | {f"{kind}s": [NAMES[kind]]}


ANY = [("image", {"min_pixels": 3136, "max_pixels": 50176.0}),
       ("image", {"resized_height": 280, "resized_width": 420}),
       ("video", {"nframes": 8, "total_pixels": 10**6}),
       ("video", {"fps": 0.5, "min_frames": 4, "max_frames": 16}),
       ("video", {"video_start": 0, "video_end": 2.5, "max_pixels": 1000})]


@pytest.mark.parametrize(("kind", "keys"), ANY)
@pytest.mark.parametrize(("format", "make"), [
    ("messages", _piece), ("messages", _beside_a_place), ("messages", _column),
    ("sharegpt", _column), ("llava", _column), ("chatml", _column),
])  # fmt: skip
def test_keys_beside_an_image_or_video_are_read(format, make, kind, keys):
    made = read(format, make(kind, **keys))
    assert media(made) == [(kind[0], NAMES[kind])] and made.unread == ()
    assert made.media[0].settings == MediaSettings(**keys)
    assert read(format, make(kind)).media[0].settings is None


@pytest.mark.parametrize(("kind", "keys", "what"), [
    ("image", {"resized_height": 280}, "it has one of resized_height and resized_width; give both"),
    ("image", {"max_pixels": "50176"}, "its max_pixels is no number"),
    ("image", {"max_pixels": True}, "its max_pixels is no number"),
    ("image", {"max_pixels": 0}, "its max_pixels is not above 0"),
    ("image", {"min_pixels": 2.5}, "its min_pixels is no whole number up to 2147483648"),
    ("image", {"min_pixels": 10, "max_pixels": 9}, "its min_pixels 10 is above its max_pixels 9"),
    ("video", {"nframes": 8, "fps": 2}, "it has both nframes and fps; give one"),
    ("video", {"nframes": 10**400}, "its nframes is not above 0"),
    ("video", {"fps": float("nan")}, "its fps is not above 0"),
    ("video", {"fps": float("inf")}, "its fps is not above 0"),
    ("video", {"fps": 2e6}, "its fps is above 1,000,000"),
    ("image", {"resized_height": 28, "resized_width": 28 * 201},
     "its resized_height 28 and resized_width 5628 are too long and thin"),
    ("video", {"video_start": -1}, "its video_start is not above 0"),
    ("video", {"video_start": 5, "video_end": 4}, "its video_start 5 is above its video_end 4"),
])  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(kind, keys, what):
    assert reason("messages", _piece(kind, **keys)) == (
        f"wrong shape: one of its {kind}s cannot be as it asks: {what}")


@pytest.mark.parametrize("key", ["nframes", "min_pixels", "video_start", "resized_width"])
def test_a_key_that_does_not_say_of_which_image_is_refused(key):
    entry = _column("video") | {key: 5}
    assert reason("sharegpt", entry).startswith(f"not served: it has `{key}` beside its turns")


def test_of_a_list_of_frames_fps_is_the_rate_they_have():
    made = read("messages", talk({"type": "video", "video": ["0.jpg", "1.jpg"], "fps": 5,
                                  "max_frames": 8}))
    assert made.media[0].fps == 5 and made.media[0].settings == MediaSettings(max_frames=8)
    made = read("messages", talk({"type": "video", "video": ["0.jpg", "1.jpg"], "sample_fps": 5}))
    assert made.media[0].fps == 5 and made.media[0].settings is None
    assert PNG not in made.media[0].frames


# ---- in shards ----------------------------------------------------------------------------------


def test_a_sample_without_them_is_stored_as_before():
    turns = read("llava", {"conversations": [{"from": "human", "value": "?"},
                                             {"from": "gpt", "value": "x"}]}).turns
    plain = StoredMedia(kind="image", files=("0.png",), height=3, width=4)
    assert json.loads(to_json(turns, (plain,))) == {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]},
                     {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
        "media": [{"kind": "image", "files": ["0.png"], "height": 3, "width": 4}],
    }
    for stored in (plain, _image(3, 4, max_pixels=9), _video(9, 2.0, nframes=4, video_start=0.5)):
        assert from_json(json.loads(to_json(turns, (stored,))))[1] == (stored,)


def test_one_image_and_video_may_be_asked_for_in_several_ways(tmp_path, hf_dir, spec, capsys):
    source = tmp_path / "in"
    source.mkdir()
    with av.open(str(source / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for number in range(40):
            frame = np.full((64, 64, 3), 6 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    asked = [{}, {"nframes": 4}, {"video_start": 1.0, "video_end": 3.0, "fps": 1.0},
             {"video_start": 9.0}, {"nframes": 4, "resized_height": 28, "resized_width": 56}]
    entries = [_piece("video", **keys) for keys in asked]
    (source / "a.json").write_text(json.dumps(entries))
    assert run(["prepare", str(source), str(tmp_path / "out"), "--format", "messages", "--split",
                "1,0,0", "--no-shuffle", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "4 samples" in shown and "1 video" in shown
    assert "it asks for 9 to 4 seconds of a video of 4, which is less than two frames" in shown
    counter = LengthCounter.from_hf_dir(hf_dir, spec, family(spec.model_type))
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    frames, lengths = [], []
    for name, text in files.items():
        if not name.endswith("json"):
            continue
        turns, stored, _ = from_json(json.loads(text))
        processor = counter.model.processor
        patches = load_media(processor, stored[0], lambda end, n=name: files[f"{n[:-5]}.{end}"])
        grid = processor.shape(stored[0])
        assert len(patches) == np.prod(grid)  # the forecast is of what is decoded
        frames.append(grid[0])
        lengths.append(counter.num_tokens(turns, stored) - processor.num_tokens(grid))
    assert frames == [4, 2, 2, 2] and len(set(lengths)) == 1


def test_what_stands_beside_a_medium_and_beside_its_path_is_asked_together():
    inner = media_source({"path": "a.jpg", "max_pixels": 3136, "min_pixels": 5}, "image")
    both = with_settings(inner, {"min_pixels": 784})
    assert both.settings.to_dict() == {"min_pixels": 784, "max_pixels": 3136}
    with pytest.raises(BadEntry, match="write them beside the list, for the video"):
        media_source([{"path": "a.jpg", "max_pixels": 3136}, "b.jpg"], "video")


def test_a_run_of_few_frames_bounds_a_video_with_a_rate_of_its_own():
    asked = MediaSettings(fps=1.0)
    assert asked.frames(100, 30.0, MediaLimits(video_maxlen=1), 2) == (0, 99, 1)


def test_no_name_in_an_entry_steers_the_terminal():
    said = str(BadEntry("missing media", "there is no \x1b[31mx.jpg"))
    assert said == r"there is no \x1b[31mx.jpg"
