"""One dataset, four families: each makes of the same shards what its own judge makes of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from PIL import Image
from qwen2_vl_reference import labels_of, load_processor, published_text, spelled
from qwen_vl_reference import as_finetune_does
from raw_entries import openai
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from megatron_vl.cli.main import run
from megatron_vl.data.conversation import Part, Turn
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.models import family, load_spec
from megatron_vl.models.qwen_vl.tokenizer import load_encoding

MODELS = {  # the tiny model's fixture, and transformers' processor
    "qwen2_vl": ("hf_dir", Qwen2VLProcessor),
    "qwen2_5_vl": ("window_model_dir", Qwen2_5_VLProcessor),
    "qwen3_vl": ("deepstack_model_dir", Qwen3VLProcessor),
    "qwen": ("resampler_model_dir", None),
}
SHEEP = {"ref": ["sheep"], "bbox": [[8, 22, 25, 45], [0, 0, 84, 112]]}
CORNERS = {"ref": [], "bbox": [[0, 0, 42, 0, 42, 56, 0, 56]]}
TOOLS = [{"type": "function", "function": {
    "name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}]


@dataclass(frozen=True)
class Row:
    """An entry of ShareGPT's form, and what it is to each family."""

    said: tuple[str, ...]  # a question and an answer in turn, with the marks of the raw format
    more: dict = field(default_factory=dict)  # the entry's keys beside the turns
    spelled: dict[str, tuple[str, ...]] = field(default_factory=dict)  # where objects have words
    left_out: dict[str, tuple[str, str]] = field(default_factory=dict)  # the reason, and why


IMAGES = {"images": ["shown/0.png"]}
ROWS = {
    "boxes": Row(
        ("<image>Find the <ref-object>.", "<bbox> and <bbox>"), IMAGES | {"objects": SHEEP},
        spelled={
            "qwen2_vl": (
                "<image>Find the <|object_ref_start|>sheep<|object_ref_end|>.",
                "<|box_start|>(95,196),(298,402)<|box_end|> and "
                "<|box_start|>(0,0),(999,999)<|box_end|>"),
            "qwen2_5_vl": (
                "<image>Find the sheep.",
                '{"bbox_2d": [8, 22, 25, 45], "label": "sheep"} and '
                '{"bbox_2d": [0, 0, 83, 111], "label": "sheep"}'),
            "qwen3_vl": (
                "<image>Find the sheep.",
                '{"bbox_2d": [95, 196, 298, 402], "label": "sheep"} and '
                '{"bbox_2d": [0, 0, 999, 999], "label": "sheep"}'),
            "qwen": ("<image>Find the <ref>sheep</ref>.",
                     "<box>(95,196),(298,402)</box> and <box>(0,0),(999,999)</box>"),
        },
    ),
    "four corners": Row(
        ("<image>Where?", "<bbox>"), IMAGES | {"objects": CORNERS},
        spelled={
            "qwen2_vl": ("<image>Where?",
                         "<|quad_start|>(0,0),(500,0),(500,500),(0,500)<|quad_end|>"),
            "qwen": ("<image>Where?", "<quad>(0,0),(500,0),(500,500),(0,500)</quad>"),
        },
        left_out=dict.fromkeys(("qwen2_5_vl", "qwen3_vl"),
                               ("not served", "it has a place with four corners")),
    ),
    "several turns": Row(
        ("<image>What is it?", "noise", "Sure?\n", " yes, 是的 🔴", "<image>And this?", "the same"),
        {"images": ["shown/0.png", "shown/1.png"]}),
    "text alone": Row(("1 + 1?", "2")),
    "a video": Row(
        ("<video>What happens?", "nothing"), {"videos": [["shown/0.png"] * 4]},
        left_out={"qwen": ("not served", "it has videos, but the model takes images alone")}),
    "tools": Row(("1 + 1?", "2, without them"), {"tools": TOOLS},
                 left_out=dict.fromkeys(MODELS.keys() - {"qwen3_vl"},
                                        ("chat template", "it has tools"))),
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """84 x 112 and 56 x 84 pixels of noise."""
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
            for width, height in ((84, 112), (56, 84))]


@pytest.fixture(scope="module")
def prepared(pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    (root / "shown").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(root / "shown" / f"{number}.png")
    entries = [{"messages": openai(*row.said)} | row.more for row in ROWS.values()]
    (root / "data.json").write_text(json.dumps(entries))
    assert run(["prepare", str(root / "data.json"), str(root / "wds"), "--format", "sharegpt",
                "--split", "1,0,0", "--no-shuffle", "--quiet"]) == 0
    return root / "wds"


@pytest.fixture(params=MODELS)
def model(request) -> dict:
    """What a loader is told of a model."""
    hf_dir = request.getfixturevalue(MODELS[request.param][0])
    spec = load_spec(hf_dir)
    if request.param == "qwen":  # places for an image's path
        spec = replace(spec, vision=replace(spec.vision, num_queries=16))
    return {"hf_dir": hf_dir, "spec": spec, "family": family(spec.model_type)}


def by_transformers(row: Row, pictures, model) -> tuple[list[int], list[int]]:
    """Of the family's processor and chat template."""
    name = model["family"].model_type
    turns = []
    for number, text in enumerate(row.spelled.get(name, row.said)):
        media = next((kind for kind in ("image", "video") if text.startswith(f"<{kind}>")), None)
        parts = [Part(media=media)] if media else []
        parts.append(Part(text=text.removeprefix(f"<{media}>")))
        turns.append(Turn(role=("user", "assistant")[number % 2], parts=tuple(parts)))
    kinds = [kind for turn in turns for kind in turn.media]
    asked = {}
    if "image" in kinds:
        asked["images"] = pictures[: len(kinds)]
    if "video" in kinds:
        frames = np.stack([np.asarray(pictures[0]).transpose(2, 0, 1)] * 4)
        asked |= {"videos": [frames], "do_sample_frames": False, "video_metadata": [
            {"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}]}
    processor = load_processor(model["hf_dir"], MODELS[name][1])
    text = processor.tokenizer.apply_chat_template(
        [t.message() for t in turns], tools=row.more.get("tools"), tokenize=False
    )
    spelling = {}
    if name == "qwen3_vl":
        text = published_text(text)
        spelling = {"system": "", "times": [[0.25, 1.25]] if "video" in kinds else []}
        if "tools" in row.more:
            spelling["system"] = text.partition("system\n")[2].partition("<|im_end|>")[0]
            assert '{"type": "function", "function": {"name": "add"' in spelling["system"]
    made = processor(text=[text], return_tensors="pt", **asked)
    counts = {kind: [int(grid.prod()) // 4 for grid in made.get(f"{kind}_grid_thw", ())]
              for kind in ("image", "video")}
    ids, labels = labels_of(
        *spelled(turns, counts, **spelling), processor.tokenizer, "the answers"
    )
    assert ids == made["input_ids"][0].tolist(), "the test spells what the template writes"
    return ids, labels


def by_the_recipe(row: Row, pictures, model) -> tuple[list[int], list[int]]:
    """Of Qwen-VL's own fine-tuning, whose texts hold the images' paths."""
    shown, turns = 0, []
    for number, text in enumerate(row.spelled.get("qwen", row.said)):
        if text.startswith("<image>"):
            text = text.removeprefix("<image>")
            text = f"Picture {shown + 1}: <img>shown/{shown}.png</img>\n{text}"
            shown += 1
        turns.append((("user", "assistant")[number % 2], text))
    tokenizer = load_encoding(model["hf_dir"], model["spec"])
    ids, labels = as_finetune_does(tokenizer, turns, model["spec"].vision.num_queries)
    return ids, [*labels[1:], -100]


def test_tokens_and_labels_are_the_judges_of_each_family(prepared, pictures, model):
    name = model["family"].model_type
    judge = by_the_recipe if name == "qwen" else by_transformers
    wanted = {kind: judge(row, pictures, model) for kind, row in ROWS.items()
              if name not in row.left_out}
    config = DataConfig(train=Mixture.parse(str(prepared)), seq_length=512, num_workers=0,
                        packing_buffer_size=None, shuffle_buffer_size=0, max_skipped_samples=10)
    found, skipped = {}, {}
    for batch, _ in zip(build_train_loader(config, **model), range(2 * len(ROWS)), strict=False):
        (key,), (length,) = batch.sample_keys, batch.sample_lengths
        found[_kind(key)] = batch.tokens[0, :length].tolist(), batch.labels[0, :length].tolist()
        skipped |= {_kind(one.sample): (one.reason, one.message) for one in batch.skipped}
    assert found == wanted
    assert_left_out(skipped, name)


def assert_left_out(found: dict[str, tuple[str, str]], name: str) -> None:
    """`found`: the reason and the message of each kind of sample."""
    wanted = {kind: row.left_out[name] for kind, row in ROWS.items() if name in row.left_out}
    assert {kind: (reason, message[: len(wanted.get(kind, ("", ""))[1])])
            for kind, (reason, message) in found.items()} == wanted, found


def _kind(sample: str) -> str:
    """The row that a sample's name ends in the number of."""
    return list(ROWS)[int(sample.rpartition("/")[2])]


def test_lint_counts_what_a_family_cannot_say(prepared, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_vl.data.lint.run.draw", lambda *_: {})
    assert run(["lint", str(prepared), "--model", str(model["hf_dir"]), "--seq-length", "512",
                "--out", str(tmp_path / "lint"), "--quiet"]) == 0
    refused = json.loads((tmp_path / "lint" / "lint.json").read_text())["refused"]
    found = {_kind(one["sample"]): (reason, one["message"]) for reason, of in refused.items()
             for one in of["samples"]}
    assert_left_out(found, model["family"].model_type)
    shown = capsys.readouterr().out
    assert all(message in shown for _, message in found.values())
