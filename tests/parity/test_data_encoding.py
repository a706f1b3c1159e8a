"""Tokens, masks and pixels against transformers' Qwen2-VL processor, bit for bit."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from megatron_vl.data.chat import ChatTokenizer
from megatron_vl.data.formats.llava import question_and_answer
from megatron_vl.data.media import ImageProcessor
from megatron_vl.data.samples import IGNORE, Part, Turn

IMAGE = Part()


def _turn(role, *parts):
    return Turn(role=role, parts=tuple(Part(text=p) if isinstance(p, str) else p for p in parts))


CONVERSATIONS = {
    "one image": question_and_answer("<image>\nWhat is this?", "a red circle"),
    "image last": question_and_answer("What is this?\n<image>", "a red circle"),
    "several images": (
        _turn("user", "First ", IMAGE, "then", IMAGE, IMAGE, "?"),
        _turn("assistant", "yes"),
    ),
    "text only": (_turn("user", "1 + 1?"), _turn("assistant", "2")),
    "several turns": (
        _turn("user", IMAGE, "What?"),
        _turn("assistant", "a circle"),
        _turn("user", "Which colour?\n"),
        _turn("assistant", "\n red, I think \n"),
        _turn("user", "Sure?"),
        _turn("assistant", "yes"),
    ),
    "own system prompt": (
        _turn("system", "Answer in one word.\nassistant\n"),
        _turn("user", IMAGE, "What?"),
        _turn("assistant", "circle"),
    ),
    "Chinese": (
        _turn("system", "请用中文回答。"),
        _turn("user", IMAGE, "这是什么颜色？"),
        _turn("assistant", "红色的圆形 🔴。"),
    ),
    "quotes the template": (
        _turn("user", IMAGE, "<|im_start|>assistant\nred<|im_end|>\n what is that?"),
        _turn("assistant", "a chat template"),
    ),
}
SIZES = [(64, 64), (90, 200), (28, 301)]  # rows, columns of the images, in order


def _png(height, width, mode="RGB", **options):
    draw = np.random.default_rng(height * width)
    bands = Image.new(mode, (1, 1)).getbands()
    pixels = draw.integers(0, 256, (height, width, len(bands)), dtype=np.uint8)
    image = Image.fromarray(pixels if len(bands) > 1 else pixels[:, :, 0], mode)
    return _file(image, "PNG", **options)


def _file(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class ImageAndTextProcessor(Qwen2VLProcessor):
    """transformers' processor where torchvision, which its video half needs, is not installed."""

    def check_argument_for_proper_class(self, name, argument):
        pass


@pytest.fixture(scope="module")
def processor(hf_dir):
    return AutoImageProcessor.from_pretrained(hf_dir, backend="pil")


@pytest.fixture(scope="module")
def images(hf_dir, spec):
    return ImageProcessor.from_hf_dir(hf_dir, vision=spec.vision)


@pytest.fixture(scope="module")
def chat(hf_dir, spec):
    return ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_and_pixels_equal_transformers(name, hf_dir, processor, images, chat):
    turns = CONVERSATIONS[name]
    files = [_png(*size) for size in SIZES[: sum(turn.num_images for turn in turns)]]
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    reference = ImageAndTextProcessor(processor, tokenizer)
    text = tokenizer.apply_chat_template([t.message() for t in turns], tokenize=False)
    want = reference(
        text=[text],
        images=[Image.open(io.BytesIO(data)) for data in files] or None,
        return_tensors="pt",
    )
    for _ in range(2):  # the second time from the remembered form of the template
        tokens, labels = chat.encode(turns, [images.num_tokens(images.grid(f)) for f in files])
        assert torch.equal(tokens, want["input_ids"][0])
        assert labels.shape == tokens.shape
    if files:
        patches = torch.cat([images.patches(data) for data in files])
        assert torch.equal(patches, want["pixel_values"])
        assert [list(images.grid(f)) for f in files] == want["image_grid_thw"].tolist()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_trained_are_the_answers_and_their_end_token(name, chat):
    turns = CONVERSATIONS[name]
    tokens, labels = chat.encode(turns, [4] * sum(turn.num_images for turn in turns))
    trained = labels != IGNORE
    assert torch.equal(labels[trained], tokens[1:][trained[:-1]]), "labels are the next token"
    assert labels[-1] == IGNORE
    said = chat.tokenizer.decode(labels[trained])
    answers = [t.parts[0].text for t in turns if t.role == "assistant"]
    # A newline that opens an answer is one token with the template's own and belongs to the prompt.
    assert said == "".join(f"{answer.removeprefix(chr(10))}<|im_end|>" for answer in answers)


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
def test_every_kind_of_file_gives_the_processor_s_patches(name, processor, images):
    want = processor(images=[Image.open(io.BytesIO(FILES[name]))], return_tensors="pt")
    have = images.patches(FILES[name])
    assert have.dtype == want["pixel_values"].dtype
    assert torch.equal(have, want["pixel_values"])
    assert list(images.grid(FILES[name])) == want["image_grid_thw"][0].tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_stands_upright_as_transformers_loads_it(orientation, processor, images,
                                                                tmp_path):
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        data = _file(Image.open(io.BytesIO(_png(120, 60))), kind, exif=exif)
        (tmp_path / "image").write_bytes(data)
        want = processor(images=[load_image(str(tmp_path / "image"))], return_tensors="pt")
        assert torch.equal(images.patches(data), want["pixel_values"])
        assert list(images.grid(data)) == want["image_grid_thw"][0].tolist()


def test_the_pixel_budget_of_the_preprocessor_config_holds(hf_dir, spec, processor, tmp_path):
    data = _png(300, 400)
    config = json.loads((hf_dir / "preprocessor_config.json").read_text())
    config["max_pixels"] = 28 * 28 * 16
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    images = ImageProcessor.from_hf_dir(tmp_path, vision=spec.vision)
    size = {"shortest_edge": images.min_pixels, "longest_edge": 28 * 28 * 16}
    want = processor(images=[Image.open(io.BytesIO(data))], size=size, return_tensors="pt")
    assert torch.equal(images.patches(data), want["pixel_values"])
