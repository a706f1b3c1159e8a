"""Grids and patches of images and videos against transformers' Qwen2-VL processor, bit for bit."""

import io
import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from qwen2_vl_reference import load_processor
from transformers import AutoImageProcessor

from megatron_vl.data.encode.media import image_size
from megatron_vl.data.encode.model import load_media
from megatron_vl.errors import InputError
from megatron_vl.models.media import MediaLimits, StoredMedia
from megatron_vl.models.qwen2_vl.media import MediaProcessor


def _noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def _png(height, width, mode="RGB", **options):
    pixels = _noise(height, width, len(Image.new(mode, (1, 1)).getbands()))
    image = Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[:, :, 0], mode)
    return _file(image, "PNG", **options)


def _file(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _stored_image(data):
    height, width = image_size(data)
    return StoredMedia(kind="image", files=("0.png",), height=height, width=width)


@pytest.fixture(scope="module")
def reference(hf_dir):
    return load_processor(hf_dir)


@pytest.fixture(scope="module")
def processor(reference):
    return reference.image_processor


@pytest.fixture(scope="module")
def media(hf_dir, spec):
    return MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision)


# ---- images --------------------------------------------------------------------------------------

FILES = {
    "rgb": _png(70, 61),
    "rgba": _png(70, 61, "RGBA"),
    "gray": _png(70, 61, "L"),
    "gray with alpha": _png(70, 61, "LA"),
    "palette": _file(Image.open(io.BytesIO(_png(70, 61))).quantize(16), "PNG"),
    "palette with transparency": _file(
        Image.open(io.BytesIO(_png(70, 61))).quantize(16), "PNG", transparency=3
    ),
    "one bit": _file(Image.open(io.BytesIO(_png(70, 61, "L"))).convert("1"), "PNG"),
    "jpeg": _file(Image.open(io.BytesIO(_png(90, 61))), "JPEG"),
    "cmyk jpeg": _file(Image.open(io.BytesIO(_png(90, 61))).convert("CMYK"), "JPEG"),
    "webp": _file(Image.open(io.BytesIO(_png(90, 61, "RGBA"))), "WEBP", lossless=True),
    "gif": _file(Image.open(io.BytesIO(_png(90, 61))).quantize(64), "GIF"),
    "tiny": _png(3, 5),
    "large": _png(1500, 900),
    "long": _png(20, 900),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_processor_s_patches(name, processor, media):
    want = processor(images=[Image.open(io.BytesIO(FILES[name]))], return_tensors="pt")
    stored = _stored_image(FILES[name])
    have = load_media(media, stored, lambda _: FILES[name])
    assert have.dtype == want["pixel_values"].dtype
    assert torch.equal(have, want["pixel_values"])
    assert list(media.shape(stored)) == want["image_grid_thw"][0].tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_stands_upright_as_transformers_loads_it(orientation, processor, media,
                                                                tmp_path):
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        data = _file(Image.open(io.BytesIO(_png(120, 60))), kind, exif=exif)
        (tmp_path / "image").write_bytes(data)
        want = processor(images=[load_image(str(tmp_path / "image"))], return_tensors="pt")
        stored = _stored_image(data)
        have = load_media(media, stored, lambda _, data=data: data)
        assert torch.equal(have, want["pixel_values"])
        assert list(media.shape(stored)) == want["image_grid_thw"][0].tolist()


def test_the_pixel_budget_of_the_preprocessor_config_holds(hf_dir, spec, processor, tmp_path):
    data = _png(300, 400)
    config = json.loads((hf_dir / "preprocessor_config.json").read_text())
    config["max_pixels"] = 28 * 28 * 16
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    media = MediaProcessor.from_hf_dir(tmp_path, vision=spec.vision)
    size = {"shortest_edge": media.image_size[0], "longest_edge": 28 * 28 * 16}
    want = processor(images=[Image.open(io.BytesIO(data))], size=size, return_tensors="pt")
    assert torch.equal(load_media(media, _stored_image(data), lambda _: data), want["pixel_values"])


# ---- videos --------------------------------------------------------------------------------------

# Frames, frames a second, rows, columns, and what a person asks for.
CLIPS = {
    "two frames a second": (20, 10.0, 70, 56, {}),
    "at least four frames": (9, 9.0, 64, 84, {}),
    "an odd number": (5, 1.0, 56, 56, {}),
    "fewer than four": (3, 30.0, 56, 56, {}),
    "as many as one patch": (2, 30.0, 30, 90, {}),
    "every frame": (14, 1.5, 28, 60, {}),
    "more than may be": (200, 24000 / 1001, 30, 41, dict(video_maxlen=16)),
    "at most an odd number": (40, 5.0, 56, 70, dict(video_maxlen=7)),
    "at most three": (40, 5.0, 56, 70, dict(video_maxlen=3)),
    "more of a second": (31, 10.0, 61, 57, dict(video_fps=5.0)),
    "less of a second": (100, 10.0, 40, 50, dict(video_fps=0.5)),
    "small frames": (12, 4.0, 300, 200, dict(video_max_pixels=28 * 28 * 6)),
    "large frames": (8, 4.0, 20, 30, dict(video_min_pixels=28 * 28 * 30)),
    "small images": (8, 4.0, 90, 90, dict(image_max_pixels=4000)),
}


def _frames_as_files(pixels, fps):
    """A video of separate frames, and what reads them."""
    frames, height, width, _ = pixels.shape
    names = tuple(f"0.{frame:04d}.png" for frame in range(frames))
    files = {name: _file(Image.fromarray(frame), "PNG")
             for name, frame in zip(names, pixels, strict=True)}
    return StoredMedia(kind="video", files=names, height=height, width=width, num_frames=frames,
                       fps=fps, separate=True), files.__getitem__


def _frames_in_a_file(pixels, fps, codec, pix_fmt, **options):
    """A video file, and what reads it."""
    file, (frames, height, width, _) = io.BytesIO(), pixels.shape
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return StoredMedia(kind="video", files=("0.mkv",), height=height, width=width,
                       num_frames=frames, fps=fps), {"0.mkv": file.getvalue()}.__getitem__


def _wanted(processor, pixels, fps, limits=None, **asked):
    limits = limits or MediaLimits()
    return processor(
        videos=[pixels.transpose(0, 3, 1, 2)], return_tensors="pt",
        **dict(video_metadata=[dict(total_num_frames=len(pixels), fps=fps)], do_sample_frames=True,
               fps=limits.video_fps, max_frames=limits.video_maxlen) | asked,
    )  # fmt: skip


@pytest.mark.parametrize("name", CLIPS)
def test_frames_give_the_video_processor_s_patches(name, hf_dir, spec, reference):
    frames, fps, height, width, asked = CLIPS[name]
    limits = MediaLimits(**asked)
    media = MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision, limits=limits)
    least, most = 3136, 1003520  # of preprocessor_config.json
    size = {"shortest_edge": limits.video_min_pixels or least,
            "longest_edge": limits.video_max_pixels or most}
    pixels = _noise(frames, height, width, 3)
    want = _wanted(reference.video_processor, pixels, fps, limits, size=size)
    stored, read = _frames_as_files(pixels, fps)
    have = load_media(media, stored, read)
    assert have.dtype == want["pixel_values_videos"].dtype
    assert torch.equal(have, want["pixel_values_videos"])
    assert list(media.shape(stored)) == want["video_grid_thw"][0].tolist()


@pytest.mark.parametrize(("frames", "maxlen"), [(1, 128), (40, 1)])
def test_one_frame_fills_the_time_of_its_patches(frames, maxlen, hf_dir, spec, reference):
    """transformers cannot sample it, but pads it when it is given just that frame."""
    pixels = _noise(frames, 61, 90, 3)
    want = _wanted(reference.video_processor, pixels[:1], 5.0, do_sample_frames=False)
    limits = MediaLimits(video_maxlen=maxlen)
    media = MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision, limits=limits)
    stored, read = _frames_as_files(pixels, 5.0)
    assert torch.equal(load_media(media, stored, read), want["pixel_values_videos"])
    assert list(media.shape(stored)) == want["video_grid_thw"][0].tolist()


def test_a_lossless_file_gives_the_patches_of_its_frames(media):
    pixels = _noise(50, 70, 84, 3)
    stored, read = _frames_in_a_file(pixels, 5, "ffv1", "bgr0")
    want = load_media(media, *_frames_as_files(pixels, 5.0))
    assert torch.equal(load_media(media, stored, read), want)


def test_a_lossy_file_gives_the_patches_of_what_it_decodes_to(media, reference):
    stored, read = _frames_in_a_file(_noise(50, 70, 84, 3), 5, "libx264", "yuv420p", g="12")
    with av.open(io.BytesIO(read("0.mkv"))) as container:
        pixels = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    want = _wanted(reference.video_processor, pixels, 5.0)
    assert torch.equal(load_media(media, stored, read), want["pixel_values_videos"])


# ---- budgets -------------------------------------------------------------------------------------

BUDGETS = [
    {},
    dict(image_max_pixels=28 * 28 * 20),
    dict(image_min_pixels=28 * 28 * 50, video_max_pixels=28 * 28 * 10),
    dict(image_min_pixels=100_000, image_max_pixels=100_000),
    dict(video_min_pixels=28 * 28 * 30, video_max_pixels=28 * 28 * 40, image_max_pixels=5000),
]
SHAPES = [(1, 1), (28, 28), (31, 200), (100, 100), (333, 251), (20, 600), (720, 1280)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_gives_the_grids_that_transformers_resizes_to(budget, hf_dir, spec, reference):
    limits = MediaLimits(**budget)
    media = MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision, limits=limits)
    sizes = {
        kind: {"shortest_edge": getattr(limits, f"{kind}_min_pixels") or 3136,
               "longest_edge": getattr(limits, f"{kind}_max_pixels") or 1003520}
        for kind in ("image", "video")
    }
    changed = set()
    for height, width in SHAPES:
        blank = np.zeros((2, height, width, 3), dtype=np.uint8)
        images = reference.image_processor(
            images=[Image.fromarray(blank[0])], size=sizes["image"], return_tensors="pt"
        )
        videos = _wanted(reference.video_processor, blank, 2.0, size=sizes["video"])
        image = StoredMedia(kind="image", files=("0.png",), height=height, width=width)
        video = StoredMedia(kind="video", files=("0.mp4",), height=height, width=width,
                            num_frames=2, fps=2.0)
        assert list(media.shape(image)) == images["image_grid_thw"][0].tolist()
        assert list(media.shape(video)) == videos["video_grid_thw"][0].tolist()
        if media.shape(image) != media.shape(video):
            changed.add((height, width))
    assert bool(changed) == bool(budget), "a budget is of images or of videos"


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 8}},
        {"min_pixels": 28 * 28 * 20, "max_pixels": 28 * 28 * 40},
        {"size": {"shortest_edge": 3136, "longest_edge": 9000}, "max_pixels": 28 * 28 * 40},
        {"patch_size": 14},  # transformers' own sizes of videos, not those of images
    ],
)
def test_videos_have_the_sizes_of_their_own_config_where_there_is_one(hf_dir, spec, tmp_path,
                                                                      config):
    for name in ("preprocessor_config.json", "config.json", "tokenizer.json",
                 "tokenizer_config.json"):
        (tmp_path / name).symlink_to(hf_dir / name)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(config))
    media = MediaProcessor.from_hf_dir(tmp_path, vision=spec.vision)
    pixels = _noise(4, 300, 200, 3)
    want = _wanted(load_processor(tmp_path).video_processor, pixels, 2.0)
    stored, read = _frames_as_files(pixels, 2.0)
    assert list(media.shape(stored)) == want["video_grid_thw"][0].tolist()
    assert media.shape(stored)[1:] != media.shape(replace(stored, kind="image"))[1:]
    assert torch.equal(load_media(media, stored, read), want["pixel_values_videos"])


def test_the_one_file_that_transformers_5_saves_is_read(hf_dir, spec, tmp_path):
    """processor_config.json instead of preprocessor_config.json, images and videos in it."""
    (tmp_path / "config.json").symlink_to(hf_dir / "config.json")
    images = json.loads((hf_dir / "preprocessor_config.json").read_text())
    sizes = {"min_pixels": 3136, "max_pixels": 28 * 28 * 16}
    joint = {
        "processor_class": "Qwen2VLProcessor",
        "image_processor": {**images, **sizes, "size": {
            "shortest_edge": 3136, "longest_edge": 28 * 28 * 16,
        }},
        "video_processor": {"size": {"shortest_edge": 3136, "longest_edge": 28 * 28 * 8}},
    }  # fmt: skip
    (tmp_path / "processor_config.json").write_text(json.dumps(joint))
    media = MediaProcessor.from_hf_dir(tmp_path, vision=spec.vision)
    assert media.image_size == (3136, 28 * 28 * 16) and media.video_size == (3136, 28 * 28 * 8)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = Image.fromarray(_noise(1, 300, 200, 3)[0])
    want = processor(images=[image], return_tensors="pt")
    data = _file(image, "PNG")
    assert torch.equal(load_media(media, _stored_image(data), lambda _: data), want["pixel_values"])
    (tmp_path / "processor_config.json").write_text(json.dumps(joint | {"video_processor": 5}))
    with pytest.raises(InputError, match="processor_config.json cannot be used"):
        MediaProcessor.from_hf_dir(tmp_path, vision=spec.vision)
