"""Files made to do harm: none runs code, leaves its directory, or takes the machine's memory.

Each ends in one sentence and code 2. Data made to do so is in test_hostile_data.py; that pickles
of checkpoints and of ChatML shards are read as data is tested beside their readers, and so is what
lint's page makes of text.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
from hostile import DEEP, Payload, refusal
from tiny_hf import make

from megatron_vl.cli.main import run
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.errors import InputError
from megatron_vl.inputs import json_value, yaml_value
from megatron_vl.models.qwen2_vl.media import MediaProcessor

pytestmark = pytest.mark.usefixtures("quick_and_small")


def test_the_payload_is_real(canary):
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()


# ---- JSON and YAML ----------------------------------------------------------------------------


BOMB = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
LAUGHS = {  # all but the last two would be gigabytes, or no end
    "aliases of aliases": BOMB,
    "merges of merges": "a0: &a0 {b: c}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)),
    "itself": "train-iters: &a [*a]",
    "nested": "train-iters: " + DEEP,
    "a number of a million digits": "train-iters: " + "9" * 1_000_000,
    "Python": "train-iters: !!python/object/apply:os.system ['touch {canary}']",
    "a key twice": "train-iters: 1\ntrain-iters: 2",
}


@pytest.mark.parametrize("text", LAUGHS.values(), ids=LAUGHS)
def test_a_configuration_file_is_read_in_little_memory_or_refused(text, tmp_path, canary, capsys):
    (tmp_path / "run.yaml").write_text(text.replace("{canary}", str(canary)))
    said = refusal_of_many_lines(capsys, "train", "--config", tmp_path / "run.yaml")
    assert "run.yaml is not valid YAML" in said and not canary.exists()


def refusal_of_many_lines(capsys, *words: object) -> str:
    """As `refusal`; a YAML error points at its place over several lines."""
    assert run([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err) < 2000
    return err


def test_anchors_that_people_write_are_read():
    assert yaml_value("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}") == {
        "a": [1, 2], "b": [1, 2], "c": {"d": 1}}
    assert yaml_value("") is None


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 200_000, "9" * 100_000])
def test_json_that_cannot_be_held_is_an_error_of_json(text):
    with pytest.raises(json.JSONDecodeError):
        json_value(text)


@pytest.mark.parametrize("text", [DEEP, '{"hidden_size": ' + "9" * 100_000 + "}"])
def test_a_config_json_that_cannot_be_held_is_refused(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert "is not valid JSON" in refusal(capsys, "convert", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_name_steers_the_terminal(tmp_path, capsys):
    """A key that would rename the window, clear the screen and turn the line around."""
    key = "\x1b]0;owned\x07\x1b[2Jtrain\u202eiters"
    (tmp_path / "run.yaml").write_text(json.dumps({key: 1}))
    said = refusal(capsys, "train", "--config", tmp_path / "run.yaml")
    assert "\\x1b]0;owned\\x07\\x1b[2J" in said or "\\x1b" in said
    assert not set("\x1b\x07\u202e") & set(said)
    assert str(InputError("a\x1b[31m\u202eb\n\tä 中")) == "a\\x1b[31m\\u202eb\n\tä 中"


# ---- weights ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture
def hf(tiny, tmp_path) -> Path:
    shutil.copytree(tiny, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("name", ["../secret.safetensors", "{root}/secret.safetensors", "a\0b",
                                  "sub/../../secret.safetensors", "..", ""])
def test_a_weight_index_names_files_beside_it_alone(name, hf, tmp_path, capsys):
    name = name.replace("{root}", str(tmp_path))
    (hf / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"model.norm.weight": name}}))
    said = refusal(capsys, "convert", hf, tmp_path / "out")
    assert "no file(s) of" in said or "lacks" in said or "at least 1 character" in said
    assert not (tmp_path / "out").exists()


def header(**changes) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}
                      ).encode()


HEADERS = {
    "larger than the file": struct.pack("<Q", 2**63 - 1),
    "larger than any": struct.pack("<Q", 2**64 - 1),
    "nested": DEEP.encode(),
    "a million twins": b"{" + b",".join([b'"a":0'] * 1_000_000) + b"}",
    "two of each": b"{" + b",".join(b'"%d":0' % (n // 2) for n in range(400_000)) + b"}",
    "places as text": header(data_offsets=["0", "8"]),
    "places as lists": header(data_offsets=[[], []]),
    "places before the file": header(data_offsets=[-8, 0]),
    "a dtype that is none": header(dtype=["F32"]),
    "a shape below zero": header(shape=[-2]),
    "a shape beyond count": header(shape=[2**62, 2**62]),
    "a shape as text": header(shape=["2"]),
    "no table": b"[]",
    "a table of numbers": b'{"a": 3}',
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_header_is_believed_in_nothing(text, hf, tmp_path, capsys):
    data = text if len(text) == 8 else struct.pack("<Q", len(text)) + text
    (hf / "model.safetensors").write_bytes(data + b"\0" * 8)
    said = refusal(capsys, "convert", hf, tmp_path / "out")
    assert "model.safetensors" in said and len(said) < 1000
    assert not (tmp_path / "out").exists()


def test_a_weight_file_that_is_a_pickle_runs_nothing(hf, tmp_path, canary, capsys):
    (hf / "model.safetensors").unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload(canary)}))
    refusal(capsys, "convert", hf, tmp_path / "out")
    assert not canary.exists() and not (tmp_path / "out").exists()


# ---- a model's directory ----------------------------------------------------------------------


EVIL = "import pathlib\npathlib.Path({canary!r}).touch()\nclass Evil: pass\nEvilFast = Evil\n"


def test_code_beside_a_tokenizer_and_an_image_processor_is_not_run(hf_dir, spec, tmp_path, canary):
    hf = shutil.copytree(hf_dir, tmp_path / "hf")
    (hf / "evil.py").write_text(EVIL.format(canary=str(canary)))
    for name, maps in {
        "config.json": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.EvilFast"]},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.EvilFast"]},
        "preprocessor_config.json": {"AutoImageProcessor": "evil.Evil",
                                     "AutoProcessor": "evil.Evil"},
    }.items():
        config = json.loads((hf / name).read_text())
        (hf / name).write_text(json.dumps(config | {"auto_map": maps}))
    ChatTokenizer.from_hf_dir(hf, tokens=spec.tokens)
    MediaProcessor.from_hf_dir(hf, vision=spec.vision)
    assert not canary.exists()


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{% for message in messages %}{{ message.pop('role') }}{% endfor %}",
])
def test_a_chat_template_has_no_way_out_of_its_text(template, hf_dir, spec, tmp_path):
    hf = shutil.copytree(hf_dir, tmp_path / "hf")
    (hf / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="chat template"):
        ChatTokenizer.from_hf_dir(hf, tokens=spec.tokens)
