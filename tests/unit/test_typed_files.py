"""Two hundred changes of each kind of file that others write: it is read, or refused by one short
sentence that names it. Nothing else is an outcome."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from megatron.energon import SkipSample
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta
from megatron.energon.source_info import SourceInfo
from mutations import mutated, mutated_bytes
from test_cluster import FOUND
from test_tools import TEMPLATE
from tiny_hf import make

from megatron_vl.data.contents import contents_of
from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.dataset_dir import check_dataset, split_shards
from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.loader_state import to_json
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.load.shard_files import PLACES
from megatron_vl.data.load.task_encoder import RowRules, SampleEncoder, TextDecoder
from megatron_vl.data.raw.dataset_info import dataset_names, read_dataset_info
from megatron_vl.errors import InputError
from megatron_vl.launch.cluster import check_one_launcher, cluster_env, hostfile_env
from megatron_vl.launch.hostfile import parse_hostfile, read_hostfile
from megatron_vl.models import family, load_spec
from megatron_vl.models.common.patch_media import MediaProcessor
from megatron_vl.models.media import StoredMedia
from megatron_vl.training.checkpoint.files import candidates
from megatron_vl.training.checkpoint.resume import read_loader_state
from megatron_vl.training.options.config_sources import load_config
from megatron_vl.typed import Name, Text, typed
from megatron_vl.weights.hf_io import open_hf
from megatron_vl.weights.mcore_io import inspect_checkpoint

TIMES = 200
LONGEST = 1000  # letters of a sentence, its paths aside
QUESTION = (Turn(role="user", parts=(Part(media="image"), Part(text="What?"))),
            Turn(role="assistant", parts=(Part(text="A dog."),)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of file."""

    file: Path  # one that is good
    read: Callable[[], object]  # all that reads it
    says: tuple[str, ...] = ()  # one of what a refusal names, else the file's name


def wrap_header(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def good(file: Path) -> tuple[object, Callable[[object], bytes]]:
    """A file's value, and how such a value is written; no value of a plain text."""
    data = file.read_bytes()
    if file.suffix == ".json":
        return json.loads(data), lambda value: json.dumps(value).encode()
    if file.suffix in (".yaml", ".yml"):
        return yaml.safe_load(data), lambda value: json.dumps(value).encode()
    if file.suffix == ".safetensors":
        length = struct.unpack("<Q", data[:8])[0]
        rest = data[8 + length :]
        return json.loads(data[8 : 8 + length]), lambda value: wrap_header(
            json.dumps(value).encode()) + rest
    if file.suffix == ".pt":
        return torch.load(file, weights_only=True), lambda value: b""
    return None, lambda value: b""


# ---- the kinds ---------------------------------------------------------------------------------


@pytest.fixture
def hf(hf_dir, tmp_path) -> Path:
    return shutil.copytree(hf_dir, tmp_path / "hf")


@pytest.fixture
def wds(wds_dir, tmp_path) -> Path:
    return shutil.copytree(wds_dir, tmp_path / "wds")


def loader_of(wds: Path, hf_dir: Path, spec):
    config = DataConfig(train=Mixture.parse(str(wds)), seq_length=512, num_workers=0,
                        packing_buffer_size=4, shuffle_buffer_size=4)
    return build_train_loader(config, hf_dir=hf_dir, spec=spec, family=family(spec.model_type))


def read_dataset(wds: Path) -> None:
    """What is taken, energon takes too."""
    count = check_dataset(wds, "train")
    contents_of(wds, split_shards(wds, "train"))
    found = WebdatasetMeta.from_config(EPath(wds), split_part="train")
    assert sum(shard.count for shard in found.shards) == count


def make_kind(name: str, tmp_path: Path, request) -> Kind:
    at = request.getfixturevalue
    if name in ("dataset.yaml", ".info.json", "split.yaml", "digests.json"):
        wds = at("wds")
        return Kind(file=wds / ".nv-meta" / name, says=(".nv-meta", "split"),
                    read=lambda: read_dataset(wds))
    if name == "config.json":
        hf = at("hf")
        return Kind(file=hf / name, read=lambda: load_spec(hf))
    if name in ("model.safetensors.index.json", "model.safetensors"):
        hf = make(tmp_path / "weights")
        if name.endswith("json"):
            names = json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}})
            (hf / name).write_text(names)
        return Kind(file=hf / name, read=lambda: open_hf(hf, str))
    if name in ("preprocessor_config.json", "video_preprocessor_config.json",
                "processor_config.json"):
        hf, spec = at("hf"), at("spec")
        settings = hf / "preprocessor_config.json"
        if name == "video_preprocessor_config.json":
            shutil.copy(settings, hf / name)
        elif name == "processor_config.json":
            value = json.loads(settings.read_text())
            (hf / name).write_text(json.dumps(
                {"image_processor": value, "video_processor": value,
                 "processor_class": "Qwen2VLProcessor"}))
            settings.unlink()
        return Kind(file=hf / name, says=("preprocessor_config.json",) if name[0] == "v" else (),
                    read=lambda: read_pixels(hf, spec))
    if name in ("tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
        hf, spec = at("hf"), at("spec")
        if name != "tokenizer_config.json":
            move_template(hf, name)
        return Kind(
            file=hf / name, says=(str(hf), "chat template"),
            read=lambda: ChatTokenizer.from_hf_dir(hf, tokens=spec.tokens).encode(QUESTION, [4]),
        )
    if name == "latest_checkpointed_iteration.txt":
        for number in (10, 20):
            (tmp_path / f"iter_{number:07d}").mkdir()
        (tmp_path / name).write_text("20\n")
        return Kind(file=tmp_path / name, read=lambda: (candidates(tmp_path), latest_of(tmp_path)))
    if name == "common.pt":
        release = tmp_path / "release"
        release.mkdir()
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
        (release / ".metadata").touch()
        torch.save({"args": {"tensor_model_parallel_size": 1}, "megatron_vl": {
            "model_type": "qwen2_vl", "dtype": "float32",
            "layout": {"tp": 1, "pp": 2, "vp": 1},
            "split": {"llm": [[1, 1]], "vit": [[1, 0]]},
        }}, release / name)
        return Kind(file=release / name, says=("release",),
                    read=lambda: inspect_checkpoint(tmp_path))
    if name == "loader_dp00000.json":
        wds, hf, spec = at("wds_dir"), at("hf_dir"), at("spec")
        loader = loader_of(wds, hf, spec)
        list(islice(loader, 2))
        (tmp_path / name).write_text(to_json(loader.save_state_rank()))
        loader = loader_of(wds, hf, spec)
        return Kind(file=tmp_path / name, says=("data",), read=lambda: loader.restore_state(
            [read_loader_state(tmp_path / name)]))
    if name == "dataset_info.json":
        (tmp_path / "a.json").write_text("[]")
        (tmp_path / name).write_text(json.dumps({"mine": {
            "file_name": "a.json", "formatting": "sharegpt",
            "columns": {"messages": "talk", "images": "pictures"},
            "tags": {"role_tag": "who", "user_tag": "u"}}}))
        return Kind(file=tmp_path / name, read=lambda: (
            dataset_names(tmp_path), read_dataset_info(tmp_path, "mine")))
    if name == "mix.yaml":
        leaf = {"path": str(at("wds_dir"))}
        (tmp_path / name).write_text(yaml.safe_dump({
            "__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {
                "train": {"blend": [{"weight": 1, **leaf}, {"weight": 2.5, **leaf}]},
                "val": leaf}}))
        return Kind(file=tmp_path / name, says=("dataset",),
                    read=lambda: Mixture.parse(str(tmp_path / name)).check("train"))
    if name in ("run.yaml", "train_options.yaml"):
        options = {"seed": 7, "lr": 1e-4, "train-data-path": "a", "bf16": True,
                   "hang-timeout": 60.0, "profile-ranks": [0, 1], "global-batch-size": 4}
        if name == "train_options.yaml":
            options = load_config({}, None, {}).to_dict()
        (tmp_path / name).write_text(yaml.safe_dump(options))
        return Kind(file=tmp_path / name, says=("",),  # an option by its name, or the file
                    read=lambda: load_config({}, str(tmp_path / name), {}))
    assert name == "hostfile"
    (tmp_path / name).write_text("10.0.0.1 slots=8\nuser@n2 slots=8\n# last\nn3 slots=8\n")
    return Kind(file=tmp_path / name, read=lambda: read_hosts(tmp_path / name))


FILES = (
    "dataset.yaml", ".info.json", "split.yaml", "digests.json", "config.json",
    "model.safetensors.index.json", "model.safetensors", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "chat_template.json", "chat_template.jinja", "latest_checkpointed_iteration.txt", "common.pt",
    "loader_dp00000.json", "dataset_info.json", "mix.yaml", "run.yaml", "train_options.yaml",
    "hostfile",
)  # fmt: skip


def read_pixels(hf: Path, spec) -> None:
    media = MediaProcessor.from_hf_dir(hf, vision=spec.vision)
    media.shape(StoredMedia(kind="image", files=("0.jpg",), height=56, width=84))
    media.frame_indices(30, 24.0)


def move_template(hf: Path, name: str) -> None:
    """The chat template into a file of its own."""
    path = hf / "tokenizer_config.json"
    config = json.loads(path.read_text())
    own = hf / "chat_template.jinja"
    template = config.pop("chat_template", None) or own.read_text()
    path.write_text(json.dumps(config))
    own.unlink(missing_ok=True)
    (hf / name).write_text(
        template if name.endswith("jinja") else json.dumps({"chat_template": template}))


def latest_of(root: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither mp_rank|says|cannot be read"):
        inspect_checkpoint(root)


def read_hosts(path: Path) -> None:
    hosts = read_hostfile(path)
    hostfile_env(hosts, {"NODE_RANK": "0"}, set())


# ---- the tests ---------------------------------------------------------------------------------


def outcome(read: Callable[[], object]) -> InputError | None:
    """None of what was read. Anything but an InputError is not caught."""
    try:
        read()
    except (InputError, BadEntry) as error:
        return error
    return None


def check_sentence(error: InputError, *paths: Path) -> None:
    said = str(error)
    for path in paths:
        said = said.replace(str(path), "")
    assert len(said) < LONGEST and "Traceback" not in said, said
    assert said.encode() and said.rstrip().endswith((".", "?")), said


@pytest.mark.parametrize("name", FILES)
def test_any_change_of_a_file_is_read_or_refused_by_its_name(name, tmp_path, request):
    kind = make_kind(name, tmp_path, request)
    kind.read()  # as it was
    whole = kind.file.read_bytes()
    value, written = good(kind.file)
    refused = 0
    for seed in range(TIMES):
        draw = Random(f"{name} {seed}")
        changed = None
        if value is not None and draw.random() < 0.75:
            changed = mutated(value, draw)
            data = written(changed)
        else:
            data = mutated_bytes(whole, draw)
        if kind.file.suffix == ".pt" and changed is not None:
            torch.save(changed, kind.file)
        else:
            kind.file.write_bytes(data)
        try:
            error = outcome(kind.read)
            if error is not None:
                refused += 1
                check_sentence(error, tmp_path)
                assert any(one in str(error) for one in kind.says or (kind.file.name,)), error
        except Exception as error:
            error.add_note(f"{name}, change {seed}: {data[:300]!r}")
            raise
    assert refused > TIMES // 8, "hardly a change did harm"
    kind.file.write_bytes(whole)
    kind.read()


def encoder_of(hf_dir: Path, spec, template: str | None) -> SampleEncoder:
    chat = ChatTokenizer.from_hf_dir(hf_dir, tokens=spec.tokens, family=family(spec.model_type))
    if template is not None:
        chat.tokenizer.chat_template = template
        chat = ChatTokenizer(chat.tokenizer, tokens=spec.tokens, family=family(spec.model_type))
    own = ModelEncoder.from_hf_dir(hf_dir, spec, family(spec.model_type))
    return SampleEncoder(
        model=replace(own, chat=chat),
        rules=RowRules(length=4096, packs=True, length_option="seq-length", max_skipped=10**9),
    )


STORED = {
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"},
                                     {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ],
    "media": [
        {"kind": "image", "files": ["0.jpg"], "height": 240, "width": 320, "path": "a/dog.jpg",
         "settings": {"min_pixels": 784, "max_pixels": 78400}},
        {"kind": "video", "files": ["1.0000.jpg", "1.0001.jpg"], "height": 56, "width": 56,
         "num_frames": 2, "fps": 2.0, "separate": True, "settings": {"fps": 1.0}},
    ],
}
FUNCTION = {"name": "zoom", "description": "closer", "parameters": {"type": "object"}}
ALL = {  # beside what STORED has
    "messages": [
        *STORED["messages"],
        {"role": "user", "content": [
            {"type": "text", "text": "Where is "}, {"type": "ref", "ref": "the dog"},
            {"type": "box", "points": [[1, 2.5], [30, 40]], "size": [320, 240]}]},
        {"role": "assistant", "content": "Look.", "trained": False, "tool_calls": [
            {"type": "function", "id": "c1",
             "function": {"name": "zoom", "arguments": {"times": 2}}}]},
        {"role": "tool", "content": "There.", "tool_call_id": "c1"},
        {"role": "assistant", "content": [{"type": "text", "text": "Here."}]},
    ],
    "media": STORED["media"],
    "tools": [{"type": "function", "function": FUNCTION}],
}


def encode(encoder: SampleEncoder, data: bytes) -> bool:
    """Whether a sample of this JSON is one; else it is counted with its reason."""
    source = SourceInfo(dataset_path=EPath("/data"), index=0, shard_name="a.tar",
                        file_names=("7.json",))
    before = len(encoder.skipped)
    try:
        value = TextDecoder().decode("json", data)
    except ValueError:
        return False  # `stop_on_error` names the sample: see test_hostile_data
    try:
        cooked = encoder.cook({"__key__": "7", "__restore_key__": (), "__subflavors__": {},
                               "__sources__": (source,), PLACES: (Path("a.tar"), {}),
                               "json": value})
        encoded = encoder.preencode_sample(cooked)
        assert encoded.num_tokens <= 4096 and encoded.num_patches > 0
        return True
    except SkipSample:
        assert len(encoder.skipped) <= before + 1
        return False


@pytest.mark.parametrize(("sample", "template"), [(STORED, None), (ALL, TEMPLATE)],
                         ids=["as always", "all that there is"])
def test_any_change_of_a_prepared_sample_is_encoded_or_counted(sample, template, hf_dir, spec):
    encoder = encoder_of(hf_dir, spec, template)
    whole = json.dumps(sample).encode()
    assert encode(encoder, whole), encoder.skipped
    bad = 0
    for seed in range(TIMES):
        draw = Random(f"sample {seed}")
        data = (json.dumps(mutated(sample, draw)).encode() if draw.random() < 0.75
                else mutated_bytes(whole, draw))
        encoder.known_bad.clear()
        encoder._in_vain.clear()
        try:
            bad += not encode(encoder, data)
        except Exception as error:
            error.add_note(f"change {seed}: {data[:2000]!r}")
            raise
    assert TIMES // 3 < bad < TIMES
    assert all(len(one.message) < LONGEST and one.sample.endswith("a.tar/7")
               for one in encoder.skipped)


ENVIRONMENTS = {name: environ for name, (environ, _) in FOUND.items() if environ}


def test_any_change_of_a_scheduler_s_variables_is_read_or_refused():
    refused = 0
    for seed in range(TIMES * 5):
        draw = Random(f"cluster {seed}")
        name = draw.choice(sorted(ENVIRONMENTS))
        changed = mutated(ENVIRONMENTS[name], draw)
        if not isinstance(changed, dict):
            continue
        environ = {key: str(value)[:120_000].replace("\0", "") for key, value in changed.items()}

        def read(environ=environ):
            env = cluster_env(environ)
            check_one_launcher(environ, env)
            assert env.node_rank < env.nnodes <= 2**16

        error = outcome(read)
        if error is not None:
            refused += 1
            check_sentence(error)
    assert refused > TIMES


SPELLINGS = {  # a variable, of a job of Slurm -> what is said
    "n[0001-10000000]": "more than 65,536 hosts",
    "a[1-300]b[1-300]": "more than 65,536 hosts",
    "n[1-" + "9" * 5000 + "]": "no range of hosts",
    "[" * 50_000: "no list of hosts",
    "n[" * 20_000 + "]" * 20_000: "no list of hosts",
    "n[\u00b2]": "no range of hosts",
}


@pytest.mark.parametrize(("text", "what"), SPELLINGS.items(), ids=range(len(SPELLINGS)))
def test_a_list_of_hosts_is_counted_before_it_is_written_out(text, what):
    with pytest.raises(InputError, match=what) as refused:
        cluster_env({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": text, "SLURM_NODEID": "0"})
    check_sentence(refused.value)


def test_a_long_hostfile_is_read_in_no_time():
    hosts = parse_hostfile("".join(f"n{number}\n" for number in range(50_000)), "hosts")
    assert len(hosts) == 50_000


def test_the_door_finds_what_utf_8_cannot_write_everywhere():
    for kind, value in ((Text, "\ud800"), (Name, "\ud800"), (dict[Text, Text], {"\ud800": "a"}),
                        (dict[Text, Text], {"a": "\ud800"}), (list[Text], ["\ud800"])):
        with pytest.raises(ValueError, match="UTF-8 cannot write it"):
            typed(kind, value)
