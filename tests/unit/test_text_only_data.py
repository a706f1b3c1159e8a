"""Data of a model that takes text alone: no file of images is read, no image is trained on."""

import json
import shutil
from dataclasses import replace

import pytest

from megatron_vl.data.conversation import Part, Turn
from megatron_vl.data.encode.model_files import check_model_files, missing_files
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader, build_valid_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.raw.lengths import LengthCounter
from megatron_vl.data.raw.prepare import PrepareConfig, prepare
from megatron_vl.errors import InputError
from megatron_vl.models import family

# As those of Qwen's text models: a content is a string.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(hf_dir, spec, tmp_path_factory):
    """What a loader is told of a text model: its tokenizer and template, and nothing else."""
    out = tmp_path_factory.mktemp("text_model")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf_dir / name, out)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    text = replace(spec, vision=None, tokens=replace(spec.tokens, image=None, video=None),
                   decoder=replace(spec.decoder, rope_sections=(spec.decoder.head_dim // 2,)))
    return {"hf_dir": out, "spec": text, "family": family("qwen2")}


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    source = tmp_path_factory.mktemp("dialogues")
    entries = [
        {"conversations": [{"from": "human", "value": f"What is {number}?"},
                           {"from": "gpt", "value": f"It is {number}."}]}
        for number in range(20)
    ]
    (source / "a.json").write_text(json.dumps(entries))
    prepare(PrepareConfig(source=source, output=source / "wds", split="1,1,0", progress=False))
    return source / "wds"


def _config(data, **options):
    data = Mixture.parse(str(data))
    return DataConfig(train=data, valid=data, seq_length=64, num_workers=0, micro_batch_size=2,
                      **options)


@pytest.mark.parametrize("build", [build_train_loader, build_valid_loader])
def test_rows_of_text_have_no_media_and_the_positions_of_their_family(build, model, dialogues):
    batch = next(iter(build(_config(dialogues), **model)))
    assert batch.pixel_patches is None and batch.grid_thw.shape == (0, 3)
    assert batch.position_ids.shape == (1, 2, 64)
    bounds = batch.cu_seqlens.tolist()
    positions = batch.position_ids.flatten()
    assert all(positions[begin] == 0 for begin in bounds[:-1])
    trained = batch.labels[batch.labels != IGNORE]
    from transformers import AutoTokenizer

    said = AutoTokenizer.from_pretrained(model["hf_dir"]).decode(trained)
    assert said.count("It is ") == batch.num_samples and "What" not in said


def test_a_sample_with_an_image_is_refused_by_name(model, wds_dir):
    with pytest.raises(InputError, match=r"sample shard-.* it has images, but the model takes text "
                                         r"alone; train a model that takes them, or remove"):
        next(iter(build_train_loader(_config(wds_dir), **model)))


def test_where_images_may_be_skipped_they_are_counted_as_not_served(model, wds_dir, dialogues):
    mixed = f"0.5,{wds_dir},0.5,{dialogues}"
    config = _config(mixed, max_skipped_samples=10**6)
    batch = next(iter(build_train_loader(config, **model)))
    assert batch.num_samples and {one.reason for one in batch.skipped} == {"not served"}


def test_its_lengths_are_counted_without_media(model):
    turns = tuple(Turn(role=role, parts=(Part(text=text),))
                  for role, text in (("user", "What is 1?"), ("assistant", "It is 1.")))
    counter = LengthCounter.from_hf_dir(**model)
    text = ("<|im_start|>user\nWhat is 1?<|im_end|>\n"
            "<|im_start|>assistant\nIt is 1.<|im_end|>\n")
    want = counter.model.chat.tokenizer(text)["input_ids"]
    assert counter.num_tokens(turns, ()) == len(want)


def test_of_a_model_without_vision_no_file_of_images_is_asked(model, spec, hf_dir):
    check_model_files(model["hf_dir"], model["spec"], model["family"])
    assert missing_files(model["hf_dir"], model["spec"], model["family"]) == []
    own = family(spec.model_type)
    assert missing_files(model["hf_dir"], spec, own) == ["preprocessor_config.json"]
    assert own.processor(hf_dir, spec).patch_dim == spec.vision.patch_dim
