"""From a file of every raw format to a row, by the user's command: as transformers makes it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from qwen2_vl_reference import load_processor
from transformers import AutoConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from megatron_vl.cli.main import run
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.models import family

SIZES = {"0.png": (64, 90), "1.png": (120, 61)}  # rows, columns
RULE, ASKED, ANSWER = "请用中文回答。", "What, 哪个?", "红色的圆形 🔴。"
AGAIN, LAST = "Sure?", "yes"
BOX = "<|box_start|>(10,20),(300,999)<|box_end|>"


def _chat(*texts, keys=("from", "value"), roles=("human", "gpt")):
    return [dict(zip(keys, (roles[i % 2], text), strict=True)) for i, text in enumerate(texts)]


def _openai(*texts):
    return _chat(*texts, keys=("role", "content"), roles=("user", "assistant"))


def _content(text, *images):
    return [*({"type": "image", "image": name} for name in images), {"type": "text", "text": text}]


# format, and what is tried of it -> its entry, and the conversation that transformers is given
FORMATS = {
    "llava": (
        {"image": ["0.png", "1.png"], "conversations": [
            {"from": "system", "value": RULE},
            *_chat(f"<image>\n<image>\n{ASKED}", ANSWER, AGAIN, LAST)]},
        [RULE, _content(ASKED, "0.png", "1.png"), ANSWER, AGAIN, LAST],
    ),
    "sharegpt": (
        {"images": ["0.png", "1.png"], "system": RULE,
         "conversations": _chat(f"<image>{ASKED}", ANSWER, f"<image>{AGAIN}", LAST)},
        [RULE, _content(ASKED, "0.png"), ANSWER, _content(AGAIN, "1.png"), LAST],
    ),
    "chatml": (
        {"images": ["1.png"], "conversations": _chat(f"<image>\n{ASKED} ", ANSWER)},
        [None, _content(ASKED, "1.png"), ANSWER],
    ),
    "messages": (
        {"messages": [{"role": "system", "content": RULE}, *_openai(
            [{"type": "image_url", "image_url": {"url": "0.png"}}, {"type": "text", "text": ASKED}],
            ANSWER, AGAIN, [{"type": "text", "text": LAST}])]},
        [RULE, _content(ASKED, "0.png"), ANSWER, AGAIN, LAST],
    ),
    "qwen_vl": (
        {"conversations": _chat(f"Picture 1: <img>0.png</img>\n{ASKED}",
                                "<box>(10,20),(300,999)</box>", roles=("user", "assistant"))},
        [None, _content(ASKED, "0.png"), BOX],
    ),
    "sharegpt, with objects": (
        {"images": ["0.png"], "messages": _openai(f"<image>{ASKED}", "<bbox>"),
         "objects": {"ref": [], "bbox": [[27, 63.99, 0.9, 1.28]]}},
        [None, _content(ASKED, "0.png"), BOX],
    ),
    "alpaca": (
        {"instruction": ASKED, "input": AGAIN, "output": ANSWER, "system": RULE,
         "history": [["1 + 1?", "2"]]},
        [RULE, "1 + 1?", "2", f"{ASKED}\n{AGAIN}", ANSWER],
    ),
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_a_raw_file_equals_what_transformers_makes(format, hf_dir, spec, tmp_path):
    entry, said = FORMATS[format]
    source = tmp_path / "in"
    source.mkdir()
    for name, shape in SIZES.items():
        pixels = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / name)
    (source / "data.json").write_text(json.dumps([entry], ensure_ascii=False), encoding="utf-8")
    assert run(["prepare", str(source), str(tmp_path / "wds"), "--format", format.partition(",")[0],
                "--quiet", "--split", "1,0,0"]) == 0

    (rule, *turns), processor = said, load_processor(hf_dir)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text}
                for i, text in enumerate(turns)]
    if rule is not None:
        messages.insert(0, {"role": "system", "content": rule})
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    images = [Image.open(source / part["image"]) for turn in turns if isinstance(turn, list)
              for part in turn if "image" in part]
    want = processor(text=[text], images=images or None, return_tensors="pt")

    config = DataConfig(train=Mixture.parse(str(tmp_path / "wds")), num_workers=0,
                        seq_length=want["input_ids"].shape[1], packing_buffer_size=None)
    batch = next(iter(build_train_loader(
        config, hf_dir=hf_dir, spec=spec, family=family(spec.model_type)
    )))
    assert torch.equal(batch.tokens, want["input_ids"])
    with torch.device("meta"):
        model = Qwen2VLModel(AutoConfig.from_pretrained(hf_dir))
    positions, _ = model.get_rope_index(
        want["input_ids"], want["mm_token_type_ids"], want.get("image_grid_thw"), None
    )
    assert torch.equal(batch.position_ids, positions)
    if images:
        assert torch.equal(batch.grid_thw, want["image_grid_thw"])
        assert torch.equal(batch.pixel_patches, want["pixel_values"])
    else:
        assert batch.pixel_patches is None
    trained = processor.tokenizer.decode(batch.labels[batch.labels != IGNORE])
    assert trained == "".join(f"{answer}<|im_end|>" for answer in turns[1::2])
