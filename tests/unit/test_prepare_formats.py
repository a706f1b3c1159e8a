"""`prepare` reads every format of every file, and of each the same shards come out."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from raw_entries import chat, openai
from raw_sources import entry_about, members_of, write_source

from megatron_vl.cli.main import run
from megatron_vl.data.raw.prepare import PrepareConfig, prepare

ROOT = Path(__file__).resolve().parents[2]


def _png():
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(file, "PNG")
    return file.getvalue()


FORMATS = {  # format -> an entry about the image 0.png
    "llava": entry_about(),
    "sharegpt": {"conversations": chat("<image>What?", "red"), "images": ["0.png"]},
    "chatml": {"conversations": chat("<image>What?", "red"), "images": ["0.png"]},
    "messages": {"messages": openai(
        [{"type": "image_url", "image_url": {"url": "0.png"}}, {"type": "text", "text": "What?"}],
        [{"type": "text", "text": "red"}],
    )},
    "qwen_vl": {"conversations": chat("Picture 1: <img>0.png</img>\nWhat?", "red")},
    "alpaca": {"instruction": "<image>What?", "output": "red", "images": ["0.png"]},
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [
    *((name, "json") for name in FORMATS), ("sharegpt", "jsonl"), ("messages", "parquet"),
])
def test_every_format_of_every_file_gives_the_same_shards(tmp_path, name, kind):
    source = write_source(tmp_path / "in", [])
    entries = [FORMATS[name]] * 10
    (source / "data.json").unlink()
    if kind == "json":
        (source / "data.json").write_text(json.dumps(entries))
    elif kind == "jsonl":
        (source / "data.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), source / "data.parquet")
    prepare(PrepareConfig(source=source, output=tmp_path / "out", format=name, progress=False))
    members = members_of(tmp_path / "out")
    stored = [json.loads(data) for file, data in members.items() if file.endswith(".json")]
    assert len(stored) == 10
    for sample in stored:
        assert sample["messages"] == [
            {"role": "user",
             "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]  # fmt: skip
        assert sample["media"] == [
            {"kind": "image", "files": ["0.png"], "height": 30, "width": 40, "path": "0.png"}
        ]
    assert {data for file, data in members.items() if file.endswith(".png")} == {_png()}


def test_images_inside_a_parquet_are_written_with_their_own_bytes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    entry = {"messages": openai("<image>What?", "red"),
             "images": [{"bytes": _png(), "path": None}]}
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([entry] * 10), tmp_path / "in/train-00000-of-00001.parquet"
    )
    prepare(PrepareConfig(source=tmp_path / "in", output=tmp_path / "out", format="sharegpt",
                          progress=False))
    members = members_of(tmp_path / "out")
    assert {data for file, data in members.items() if file.endswith(".0.png")} == {_png()}
    assert not (tmp_path / "out/.media").exists()


def test_a_chatml_shard_with_pickled_media_becomes_one_without(tmp_path):
    import pickle

    source = tmp_path / "in"
    source.mkdir()
    with tarfile.open(source / "pretrain-0.tar", "w") as tar:
        for number in range(10):
            parts = {
                "jpgs": pickle.dumps([_png()]), "videos": pickle.dumps([[_png()] * 4]),
                "json": json.dumps(chat("<image><video>What?", "red")).encode(),
            }
            for kind, data in parts.items():
                info = tarfile.TarInfo(f"{number}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    prepare(PrepareConfig(source=source, output=tmp_path / "out", format="chatml", progress=False))
    members = members_of(tmp_path / "out")
    assert not [name for name in members if not name.endswith((".json", ".png"))]
    first = json.loads(next(data for name, data in members.items() if name.endswith(".json")))
    assert first["media"][1] == {
        "kind": "video", "files": [f"1.{n:05d}.png" for n in range(4)], "height": 30, "width": 40,
        "num_frames": 4, "fps": 2.0, "separate": True,
    }


def test_a_dataset_info_names_files_and_columns(tmp_path, capsys):
    source = write_source(tmp_path / "in", [])
    entries = [{"talk": openai("<image>What?", "red"), "pictures": ["0.png"]}] * 10
    (source / "mine.json").write_text(json.dumps(entries))
    (source / "dataset_info.json").write_text(json.dumps({"mine": {
        "file_name": "mine.json", "formatting": "sharegpt",
        "columns": {"messages": "talk", "images": "pictures"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                 "assistant_tag": "assistant"},
    }}))  # fmt: skip
    assert run(["prepare", str(source), str(tmp_path / "a"), "--dataset", "mine", "--quiet"]) == 0
    given = ["--format", "sharegpt", "--json", "mine.json", "--quiet"]
    columns = ["--columns", "messages=talk,images=pictures"]
    assert run(["prepare", str(source), str(tmp_path / "b"), *given, *columns]) == 0
    assert members_of(tmp_path / "a") == members_of(tmp_path / "b")
    assert run(["prepare", str(source), str(tmp_path / "c"), "--columns", "image=x"]) == 2
    assert "did you mean images?" in capsys.readouterr().err


def test_the_known_chatml_command_reads_folders_of_frames(tmp_path):
    source = write_source(tmp_path / "in", [], [f"clips/walk/{n:05d}.png" for n in range(5)])
    (source / "clips/walk.json").write_text('{"fps": 4}')
    entries = [{"conversations": chat("<video>What?", "red"), "film": ["clips/walk.mp4"]}] * 10
    (source / "dataset.json").write_text(json.dumps(entries))
    script = ROOT / "toolkits/pretrain_data_preprocessing/convert_custom_dataset_to_wds_chatml.py"
    command = [sys.executable, script, "--dataset-root", "in", "--videos-key", "film",
               "--train-split", "8", "--val-split", "2", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "kept 10 samples in 5 shards (8 train, 2 val); 1 video\n" in done.stdout
    first = next(d for n, d in members_of(source / "wds").items() if n.endswith(".json"))
    assert json.loads(first)["media"][0]["num_frames"] == 5
    assert json.loads(first)["media"][0]["fps"] == 4


@pytest.mark.parametrize("image", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_media_outside_their_root_are_refused(tmp_path, image):
    source = write_source(tmp_path / "in", [*[entry_about()] * 10, entry_about(image)], ["0.png"])
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.png")
    done = prepare(PrepareConfig(source=source, output=tmp_path / "out", progress=False))
    (refused,) = done.refused
    assert refused.reason == "missing media" and "lies outside" in refused.message


def test_samples_above_a_length_are_refused_as_the_model_counts(tmp_path, hf_dir):
    source = write_source(tmp_path / "in", [*[entry_about()] * 10, entry_about(answer="red " * 50)])
    assert run(["prepare", str(source), str(tmp_path / "out"), "--quiet", "--tokenizer",
                str(hf_dir), "--max-length", "60"]) == 0
    (refused,) = map(json.loads, (tmp_path / "out/refused.jsonl").read_text().splitlines())
    assert refused["entry"] == 10 and refused["reason"] == "too long"
    assert "tokens, above 60" in refused["message"]
