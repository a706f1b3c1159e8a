"""Keys that a format does not read are named, and those that would change an entry are refused."""

import json

import pytest
from PIL import Image
from raw_entries import chat, openai, read, reason, sample, talk

from megatron_vl.cli.main import run
from megatron_vl.data.raw.formats import FORMATS

TALK = {"conversations": chat("?", "x")}


def _with(entry, where, **more):
    turn = (entry.get("conversations") or entry["messages"])[where]
    turn.update(more)
    return entry


@pytest.mark.parametrize(("format", "entry", "unread"), [
    ("llava", {"conversations": chat("?", "x"), "id": 7, "model": "gpt-4", "score": 0.5},
     ["entry key 'model'", "entry key 'score'"]),
    ("llava", _with({"conversations": chat("?", "x")}, 0, emotion="calm"), ["turn key 'emotion'"]),
    # Keys that hold nothing are those of a table's other rows.
    ("sharegpt", _with({"messages": openai("?", "x"), "meta": {}, "source": None, "tags": []}, 1,
                       name=None), []),
    ("sharegpt", {"messages": openai("?", "x"), "conversations": chat("a", "b")},
     ["entry key 'conversations'"]),
    ("sharegpt", {"messages": openai("<image>?", "x"), "images": [
        {"bytes": b"a", "path": "0.jpg", "caption": "c"}]}, ["`images` key 'caption'"]),
    ("sharegpt", {"messages": openai("<image><bbox>", "x"), "images": ["0.jpg"],
                  "objects": {"bbox": [[1, 2, 3, 4]], "width": [9]}}, ["`objects` key 'width'"]),
    ("messages", talk({"type": "image_url", "image_url": {"url": "file://a", "detail": "low"},
                       "alt": "a"}, {"type": "text", "text": "?", "cache_control": {"a": 1}}),
     ["`image_url` key 'detail'", "piece key 'alt'", "piece key 'cache_control'"]),
    ("messages", _with({"messages": openai("?", "x")}, 1, reasoning_content="hm", refusal=None),
     ["turn key 'reasoning_content'"]),
    ("chatml", sample(_with({"conversations": chat("?", "x")}, 0, emotion="calm")["conversations"],
                      rule=3), ["entry key 'rule'", "turn key 'emotion'"]),
    ("qwen_vl", {"conversations": chat("<img>0.jpg</img>?", "x"), "note": "n"},
     ["entry key 'note'"]),
    ("alpaca", {"instruction": "?", "output": "x", "text": "all"}, ["entry key 'text'"]),
    # What a video has, or an image shows, is often said beside the turns.
    ("llava", {"conversations": chat("?", "x"), "fps": 30, "label": 3, "width": 40},
     ["entry key 'fps'", "entry key 'label'", "entry key 'width'"]),
])  # fmt: skip
def test_keys_that_are_not_read_are_named(format, entry, unread):
    assert list(read(format, entry).unread) == unread


def test_an_entry_is_left_as_it_was():
    entry = talk({"type": "image_url", "image_url": {"url": "file://a", "detail": "low"}})
    before = json.dumps(entry)
    read("messages", entry)
    assert json.dumps(entry) == before and type(entry["messages"][0]) is dict


@pytest.mark.parametrize("format", sorted(FORMATS.keys() - {"alpaca"}))
@pytest.mark.parametrize(("more", "what"), [
    ({"rejected_response": "no"}, "it has `rejected_response`, but preferences are not trained on"),
    ({"rejected": [{"a": 1}]}, "it has `rejected`, but preferences"),
    ({"chosen": {"a": 1}}, "it has `chosen`, but preferences"),
    ({"label": False}, "its `label` is false, but preferences"),
    ({"kto_tag": True}, "its `kto_tag` is true, but preferences"),
    ({"negative_messages": [[]]}, "it has `negative_messages`, but positive and negative"),
    ({"loss": False}, "its `loss` beside the turns is false, as of what is not to be trained"),
    ({"train": False}, "its `train` beside the turns is false"),
    ({"weight": 0}, "its `weight` beside the turns is 0, as of what"),
    ({"audios": ["a.wav"]}, "it has `audios`, but audio is not trained on; remove it"),
    ({"audio": "a.wav"}, "it has `audio`, but audio"),
])  # fmt: skip
def test_what_would_change_an_entry_and_is_not_served_is_refused(format, more, what):
    turns = {"messages": openai("?", "x")} if format == "messages" else TALK
    assert reason(format, turns | more).startswith(f"not served: {what}")
    assert read(format, turns | dict.fromkeys(more)).unread == ()


def test_the_summary_counts_them_by_place(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    Image.new("RGB", (40, 30)).save(source / "0.png")
    entries = [{"image": "0.png", "conversations": chat("<image>?", "x"), "source": "web"}
               for _ in range(3)]
    entries[0]["conversations"][1]["emotion"] = "calm"
    entries.append({"conversations": chat("?", "x"), **{f"k{n:02d}": 1 for n in range(30)}})
    # Refused and listed, not counted: for its turns, or for an image that is found to be none.
    entries.append({"conversations": [], "lost": 1})
    (source / "none.png").write_bytes((source / "0.png").read_bytes()[:40])
    entries.append({"image": "none.png", "conversations": chat("?", "x"), "lost": 1})
    (source / "a.json").write_text(json.dumps(entries))
    assert run(["prepare", str(source), str(tmp_path / "out"), "--split", "1,0,0", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert ("keys that are not read: entry key 'source' in 3 entries, turn key 'emotion' in 1 entry"
            in shown)
    assert "and 12 other keys" in shown and "lost" not in shown
    assert "no mark" not in shown and "none.png is unusable" in shown
