import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from megatron_vl.data.encode.media import decode_rgb, image_size
from megatron_vl.data.encode.model import load_media
from megatron_vl.data.encode.model_files import check_model_files
from megatron_vl.errors import InputError
from megatron_vl.models import family
from megatron_vl.models.common.patch_media import MediaProcessor
from megatron_vl.models.media import MAX_ASPECT_RATIO, BadMedia, MediaLimits, StoredMedia

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def _file(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _one_colour(colour, mode="RGB", size=(56, 56)):
    return _file(Image.new(mode, size, colour))


def _image(height, width):
    return StoredMedia(kind="image", files=("0.png",), height=height, width=width)


def _patches(media, data):
    """Those of an image file, as a shard holds it."""
    height, width = image_size(data)
    return load_media(media, _image(height, width), {"0.png": data}.get)


@pytest.fixture(scope="module")
def media(hf_dir, spec):
    return MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision)


def test_red_stays_in_the_first_channel(media):
    patch = _patches(media, _one_colour((255, 0, 0)))[0].view(3, 2, 14, 14)
    want = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert torch.allclose(patch.mean(dim=(1, 2, 3)), want, atol=1e-5)


def test_mean_and_std_are_those_of_the_preprocessor_config(hf_dir, spec, tmp_path):
    config = json.loads((hf_dir / "preprocessor_config.json").read_text())
    assert (config["image_mean"], config["image_std"]) == (CLIP_MEAN, CLIP_STD)
    config |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    media = MediaProcessor.from_hf_dir(tmp_path, vision=spec.vision)
    assert torch.equal(_patches(media, _one_colour((0, 0, 0))).unique(), torch.tensor([-2.0]))


def test_transparency_is_laid_on_white(media):
    clear = _one_colour((10, 20, 30, 0), mode="RGBA")
    assert torch.equal(_patches(media, clear), _patches(media, _one_colour((255, 255, 255))))


def test_sixteen_bit_gray_keeps_its_high_byte():
    deep = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    image = decode_rgb(_file(Image.fromarray(deep)))
    assert np.asarray(image)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


def test_the_size_comes_from_the_header_alone(media):
    data = _file(Image.fromarray(np.random.default_rng(0).integers(
        0, 256, (300, 200, 3), dtype=np.uint8)))
    assert image_size(data[:100]) == (300, 200)
    assert media.shape(_image(300, 200)) == (1, 22, 14)
    assert media.num_tokens((1, 22, 14)) == 77


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "not in a format"),
        (b"\x89PNG\r\n\x1a\n", "not in a format"),
        (b"<html>", "not in a format"),
        (_file(Image.effect_noise((64, 64), 50))[:-300], "cannot be decoded"),
        (_file(Image.effect_noise((64, 64), 50), "JPEG")[:-300], "cannot be decoded"),
        (_file(Image.new("RGB", (1, 300))), "too long and thin"),
    ],
)
def test_a_damaged_image_says_what_is_wrong(media, data, what):
    with pytest.raises(BadMedia, match=what):
        _patches(media, data)


def test_a_missing_preprocessor_config_is_named(spec, tmp_path):
    with pytest.raises(InputError, match=r"preprocessor_config.json is missing; copy it"):
        MediaProcessor.from_hf_dir(tmp_path, vision=spec.vision)


def test_a_damaged_preprocessor_config_is_named(spec, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config.json is not valid JSON"):
        MediaProcessor.from_hf_dir(tmp_path, vision=spec.vision)


def test_a_patch_size_unlike_config_json_s_is_refused(hf_dir, spec, tmp_path):
    config = json.loads((hf_dir / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {"patch_size": 16}))
    with pytest.raises(InputError, match="patch_size 16 but config.json has 14"):
        MediaProcessor.from_hf_dir(tmp_path, vision=spec.vision)


def test_a_budget_upside_down_is_refused(hf_dir, spec, tmp_path):
    config = json.loads((hf_dir / "preprocessor_config.json").read_text())
    config |= {"size": {"shortest_edge": 9000, "longest_edge": 800}, "min_pixels": 9000,
               "max_pixels": 800}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="9000 to 800 pixels; .* no larger than max_pixels"):
        MediaProcessor.from_hf_dir(tmp_path, vision=spec.vision)


def test_the_longest_shape_that_prepare_takes_is_the_longest_that_is_resized(media):
    media.shape(_image(3, 3 * MAX_ASPECT_RATIO))
    with pytest.raises(BadMedia, match="too long and thin"):
        media.shape(_image(3, 3 * MAX_ASPECT_RATIO + 1))


def test_pixels_unlike_the_prepared_size_are_refused(media):
    stored = StoredMedia(kind="image", files=("0.png",), height=28, width=56)
    with pytest.raises(BadMedia, match="it is 56 x 56 pixels but was prepared as 56 x 28"):
        load_media(media, stored, lambda _: _one_colour((0, 0, 0)))


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (dict(image_min_pixels=900, image_max_pixels=800), "image-min-pixels 900 is above image-m"),
        (dict(video_min_pixels=900, video_max_pixels=800), "video-min-pixels 900 is above video-m"),
        (dict(image_min_pixels=0), "image-min-pixels is 0; it must be at least 1"),
        (dict(video_max_pixels=-5), "video-max-pixels is -5; it must be at least 1"),
        (dict(video_fps=0.0), "video-fps is 0.0; it must be above 0"),
        (dict(video_fps=float("nan")), "video-fps is nan; it must be above 0"),
        (dict(video_fps=float("inf")), "video-fps is inf; it must be above 0"),
        (dict(video_maxlen=0), "video-maxlen is 0; it must be at least 1"),
        # With the model's own limits, 3136 to 1003520.
        (dict(image_max_pixels=3000), "images would have 3136 to 3000 pixels, with the model's"),
        (dict(video_min_pixels=2000000), "videos would have 2000000 to 1003520 pixels, with the"),
    ],
)
def test_limits_that_contradict_one_another_are_refused(hf_dir, spec, limits, what):
    with pytest.raises(InputError, match=what):
        MediaProcessor.from_hf_dir(hf_dir, vision=spec.vision, limits=MediaLimits(**limits))


# ---- what an image shows -------------------------------------------------------------------------


def _files():
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    colour, clear = Image.fromarray(noise[:, :, :3]), Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "rgb": _file(colour),
        "alpha": _file(clear),
        "gray with alpha": _file(clear.convert("LA")),
        "palette with transparency": _file(colour.quantize(16), transparency=3),
        "sixteen bit": _file(Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)),
        "turned": _file(colour, "JPEG", exif=exif),
        "turned and clear": _file(clear, exif=exif),
    }


def by_pil(path):
    """Upright, transparency on white, the high byte of 16-bit gray."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    elif "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@pytest.mark.parametrize("name", _files())
def test_pixels_are_those_that_pil_shows(tmp_path, name):
    data = _files()[name]
    (tmp_path / "image").write_bytes(data)
    have, want = decode_rgb(data), by_pil(tmp_path / "image")
    assert (have.mode, have.size) == (want.mode, want.size)
    assert np.array_equal(np.asarray(have), np.asarray(want))


IMAGES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"


@pytest.mark.parametrize(("file", "changes", "what"), [
    (IMAGES, {"max_pixels": "None"}, "max_pixels is 'None'"),
    (IMAGES, {"image_mean": [1, 2]}, "has 2 numbers as image_mean but config.json has 3 channels"),
    (IMAGES, {"image_std": [0, 0, 0]}, "image_std.0 is 0"),
    (IMAGES, {"merge_size": 4}, "has merge_size 4 but config.json has 2"),
    (IMAGES, {"patch_size": None}, None),  # transformers knows it
    (VIDEOS, {"min_pixels": "9"}, "min_pixels is '9'"),
    (VIDEOS, {"min_pixels": 9000, "max_pixels": 4000}, "asks for frames of 9000 to 4000 pixels"),
    (VIDEOS, {"cap_pixels_per_frame": True}, "sets cap_pixels_per_frame, which is not supported"),
    ("processor_config.json", {"video_processor": {"size": 7}}, "video_processor.size is 7"),
    ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
])
def test_a_model_s_files_are_looked_at_before_anything_is_loaded(
    hf_dir, spec, tmp_path, file, changes, what
):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", IMAGES):
        shutil.copy(hf_dir / name, tmp_path)
    there = tmp_path / file
    settings = json.loads(there.read_text()) if there.is_file() else {}
    there.write_text(json.dumps(settings | changes))
    if what is None:
        check_model_files(tmp_path, spec, family(spec.model_type))
        return
    with pytest.raises(InputError, match=re.escape(what)) as told:
        check_model_files(tmp_path, spec, family(spec.model_type))
    assert str(there) in str(told.value)
