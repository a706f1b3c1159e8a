"""Tokens, masks, positions and pixels against transformers' own processors, bit for bit."""

import io
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from qwen2_vl_reference import labels_of, load_processor, published_text, spelled
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from megatron_vl.data.conversation import Part, Turn
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.encode.samples import IGNORE, ConversationSample
from megatron_vl.data.load.task_encoder import RowRules, SampleEncoder
from megatron_vl.data.options import TrainedText
from megatron_vl.data.raw.formats.llava import question_and_answer
from megatron_vl.models import family, load_spec
from megatron_vl.models.media import MediaLimits, StoredMedia

IMAGE, VIDEO = Part(media="image"), Part(media="video")


def _turn(role, *parts):
    return Turn(role=role, parts=tuple(Part(text=p) if isinstance(p, str) else p for p in parts))


CONVERSATIONS = {
    "one image": question_and_answer("<image>\nWhat is this?", "a red circle"),
    "image last": question_and_answer("What is this?\n<image>", "a red circle"),
    "several images": (
        _turn("user", "First ", IMAGE, "then", IMAGE, IMAGE, "?"),
        _turn("assistant", "yes"),
    ),
    "video": (
        _turn("user", VIDEO, "What happens?"),
        _turn("assistant", "a ball rolls"),
    ),
    "images and videos": (
        _turn("system", "Look."),
        _turn("user", IMAGE, "then", VIDEO, "then ", IMAGE, "?"),
        _turn("assistant", "a ball"),
        _turn("user", "And here?\n", VIDEO, VIDEO, IMAGE),
        _turn("assistant", "two"),
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
CLIPS = [(17, 3.0, 64, 84), (60, 30.0, 40, 90), (5, 2.0, 90, 60)]  # frames, fps, rows, columns
MASKS = {
    "the answers": TrainedText(),
    "all text": TrainedText(train_on_prompt=True),
    "the last answer": TrainedText(mask_history=True),
}


def _noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Sides:
    """transformers' processor and model of a family, and our encoder."""

    processor: object
    model: torch.nn.Module  # on the meta device
    ours: ModelEncoder


JUDGES = {  # the tiny model's fixture, and transformers' classes
    "qwen2_vl": ("hf_dir", Qwen2VLProcessor, Qwen2VLModel),
    "qwen2_5_vl": ("window_model_dir", Qwen2_5_VLProcessor, Qwen2_5_VLModel),
    "qwen3_vl": ("deepstack_model_dir", Qwen3VLProcessor, Qwen3VLModel),
}
ROWS = [*product(["qwen2_vl"], CONVERSATIONS, MASKS),
        *product(["qwen2_5_vl"], CONVERSATIONS, ["the answers"]),
        *product(["qwen3_vl"], CONVERSATIONS, ["the answers"])]


@pytest.fixture(scope="module")
def sides(request):
    """Of a family, by its name; made once."""
    made = {}

    def of(name: str) -> Sides:
        if name not in made:
            fixture, processor, model = JUDGES[name]
            hf_dir = request.getfixturevalue(fixture)
            with torch.device("meta"):
                judge = model(AutoConfig.from_pretrained(hf_dir))
            ours = ModelEncoder.from_hf_dir(
                hf_dir, load_spec(hf_dir), family(name),
                limits=MediaLimits(video_positions="transformers5"),  # it is the judge
            )
            made[name] = Sides(load_processor(hf_dir, processor), judge, ours)
        return made[name]

    return of


@pytest.fixture(scope="module")
def chat(hf_dir, spec):
    return ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens, family=family(spec.model_type))


def _material(turns):
    """Media of a conversation: as prepared, their files, and transformers' arguments for them.

    Frames of videos are files of their own here; video files are decoded in test_data_pixels.py.
    """
    stored, files = [], {}
    asked = {"image": [], "video": [], "metadata": []}
    for number, kind in enumerate(kind for turn in turns for kind in turn.media):
        if kind == "image":
            height, width = SIZES[len(asked["image"])]
            pixels = _noise(1, height, width, 3)
            told = {}
            asked["image"].append(Image.fromarray(pixels[0]))
        else:
            frames, fps, height, width = CLIPS[len(asked["video"])]
            pixels = _noise(frames, height, width, 3)
            told = dict(num_frames=frames, fps=fps, separate=True)
            asked["video"].append(pixels.transpose(0, 3, 1, 2))
            asked["metadata"].append(dict(total_num_frames=frames, fps=fps))
        names = tuple(f"{number}.{frame}.png" for frame in range(len(pixels)))
        stored.append(StoredMedia(kind=kind, files=names, height=height, width=width, **told))
        files |= {name: _png(frame) for name, frame in zip(names, pixels, strict=True)}
    images = dict(images=asked["image"]) if asked["image"] else {}
    videos = dict(
        videos=asked["video"], video_metadata=asked["metadata"], do_sample_frames=True, fps=2.0,
        max_frames=128,
    ) if asked["video"] else {}  # fmt: skip
    return tuple(stored), files, images | videos


def _times(frames, fps):
    """When each pair of the frames that are taken is shown: two a second, and four at least."""
    count = min(max(int(frames / fps * 2), 4), frames)
    taken = [round(at * (frames - 1) / (count - 1)) for at in range(count)]
    taken += taken[-1:] * (count % 2)
    return [(one + other) / 2 / fps for one, other in zip(taken[::2], taken[1::2], strict=True)]


@pytest.mark.parametrize(("model", "name", "mask"), ROWS)
def test_a_row_equals_what_transformers_makes(model, name, mask, sides):
    turns, there = CONVERSATIONS[name], sides(model)
    stored, files, asked = _material(turns)
    reference, chat = there.processor, there.ours.chat
    tokenizer = reference.tokenizer
    text = tokenizer.apply_chat_template([t.message() for t in turns], tokenize=False)
    spelling = {}
    if model == "qwen3_vl":
        text = published_text(text)
        spelling = {"system": "", "times": [
            _times(len(frames), metadata["fps"])
            for frames, metadata in zip(asked.get("videos", ()), asked.get("video_metadata", ()),
                                        strict=True)]}
    want = reference(text=[text], return_tensors="pt", **asked)
    grids = {kind: want.get(f"{kind}_grid_thw", torch.empty(0, 3, dtype=torch.int64))
             for kind in ("image", "video")}

    encoder = SampleEncoder(
        model=replace(there.ours, chat=ChatTokenizer(
            chat.tokenizer, tokens=chat.tokens, family=family(model), trained=MASKS[mask],
        )),
        rules=RowRules(length=want["input_ids"].shape[1], packs=False, length_option=""),
    )
    sample = ConversationSample(__key__="a", __restore_key__=(), turns=turns, media=stored,
                                read=files.__getitem__)
    for _ in range(2):  # the second time from the remembered form of the template
        encoded = encoder.preencode_sample(sample)
        batch = encoder.make_batch([encoder.make_row([encoded])])

        assert torch.equal(batch.tokens, want["input_ids"])
        given = {"second_per_grid_ts": want["second_per_grid_ts"]} if (
            "second_per_grid_ts" in want) else {}
        positions, _ = there.model.get_rope_index(
            want["input_ids"], want["mm_token_type_ids"], want.get("image_grid_thw"),
            want.get("video_grid_thw"), **given,
        )
        assert torch.equal(batch.position_ids, positions)

        expanded, answers = spelled(
            turns, {kind: (grid.prod(-1) // 4).tolist() for kind, grid in grids.items()},
            **spelling,
        )
        ids, labels = labels_of(expanded, answers, tokenizer, mask)
        assert ids == want["input_ids"][0].tolist(), "the test spells what the template writes"
        assert batch.labels[0].tolist() == labels
        assert batch.loss_mask[0].tolist() == [float(label != IGNORE) for label in labels]

        kinds = [one.kind for one in stored]
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            mine = [i for i, k in enumerate(kinds) if k == kind]
            assert torch.equal(batch.grid_thw[mine], grids[kind])
            if mine:
                parts = batch.pixel_patches.split(batch.grid_thw.prod(-1).tolist())
                assert torch.equal(torch.cat([parts[i] for i in mine]), want[key])
        if not kinds:
            assert batch.pixel_patches is None


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_trained_are_the_answers_and_their_end_token(name, chat):
    turns = CONVERSATIONS[name]
    tokens, labels = chat.encode(turns, [4] * sum(len(turn.media) for turn in turns))
    trained = labels != IGNORE
    assert torch.equal(labels[trained], tokens[1:][trained[:-1]]), "labels are the next token"
    assert labels[-1] == IGNORE
    said = chat.tokenizer.decode(labels[trained])
    answers = [t.parts[0].text for t in turns if t.role == "assistant"]
    # A newline that opens an answer is one token with the template's own and belongs to the prompt.
    assert said == "".join(f"{answer.removeprefix(chr(10))}<|im_end|>" for answer in answers)
