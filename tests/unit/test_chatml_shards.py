"""ChatML's tar samples: their pickles are read as data, and run nothing."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from raw_entries import PNG, chat, lines, media, read, reason, sample

from megatron_vl.data.raw.formats import pickled

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_media_of_every_protocol_are_read(protocol):
    turns = chat("<image>\n<image> <video>What? ", "x ", keys=("role", "content"))
    frames = [bytes([200 + i]) * 300 for i in range(3)]
    made = read("chatml", sample(turns, [PNG, PNG], [frames], protocol, second_per_grid_ts=[0.25]))
    assert lines(made) == ["user: [image]|[image]|[video]|What?", "assistant: x "]
    assert media(made) == [("i", (PNG,)), ("i", (PNG,)), ("v", tuple(frames))]
    assert made.media[2].fps == 4
    made = read("chatml", sample(turns, ["a.jpg", "图.jpg"], [("f/0.jpg", "f/1.jpg")], protocol))
    assert media(made)[1:] == [("i", "图.jpg"), ("v", ("f/0.jpg", "f/1.jpg"))]
    assert made.media[2].fps == 2


def test_a_chatml_sample_may_be_turns_alone():
    assert lines(read("chatml", {"json": json.dumps(chat(" a\n", "b")).encode()}))[0] == "user: a"


def test_the_json_of_chatml_names_a_video_s_file():
    made = read("chatml", {"conversations": chat("<video>\n?", "b"), "videos": ["a/b.mp4"]})
    assert media(made) == [("v", "a/b.mp4")]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class BuildBomb(Bomb):
    """The call is hidden behind a list, beside good bytes."""

    def __reduce__(self):
        return list, ([PNG, Bomb(self.path)],)


@pytest.mark.parametrize("bomb", [Bomb, BuildBomb])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(tmp_path, bomb, protocol):
    data = pickle.dumps([PNG, bomb(tmp_path / "made")], protocol)
    for part in ("jpgs", "videos"):
        entry = {"json": json.dumps(chat("<image><image>", "b")).encode(), part: data}
        found = reason("chatml", entry)
        assert found.startswith(f"unusable media: its `{part}` is no pickled list"), found
        assert "it names " in found
    assert not (tmp_path / "made").exists()
    pickle.loads(data)  # the bomb is real
    assert (tmp_path / "made").exists()


# A list that repeats one list: few bytes, many files.
MANY = pickle.dumps([["a.jpg"] * 300] * 300)
# Memory for a memo of four billion places, as pickle's own reader would make it.
HUGE_MEMO = b"\x80\x02]r\xff\xff\xff\xff."


@pytest.mark.parametrize(("data", "what"), [
    (b"", "is no pickled list of bytes or of paths"),
    (b"abc", "is no pickled list of bytes or of paths"),
    (PNG, "is no pickled list of bytes or of paths"),
    (pickle.dumps([PNG])[:-9], "is no pickled list of bytes or of paths"),
    (b"\x80\x04(.", "is no pickled list of bytes or of paths"),
    (b"\x80\x04e.", "is no pickled list of bytes or of paths"),
    (b"\x80\x04h\x00.", "is no pickled list of bytes or of paths"),
    (b"\x80\x04]\x8e" + b"\xff" * 8, "is no pickled list of bytes or of paths"),
    (b"\x80\x02]Ppersistent\n.", "is no pickled list of bytes or of paths"),
    (pickle.dumps({"a": PNG}), "is pickled, but no list"),
    (pickle.dumps([np.zeros(3, np.uint8)]), "numpy"),
    (pickle.dumps(PNG), "is pickled, but no list"),
    (MANY, "is a pickle of 90000 files"),
    (HUGE_MEMO, "it remembers a value in place 4294967295"),
])  # fmt: skip
def test_a_pickle_of_something_else_says_so(data, what):
    entry = {"json": json.dumps(chat("a", "b")).encode(), "videos": data}
    assert "unusable media: its `videos` " in reason("chatml", entry)
    assert what in reason("chatml", entry)


def test_a_pickle_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(pickled, "MAX_BYTES", 100)
    assert "is pickled in" in reason("chatml", sample(chat("<image>", "b"), [PNG * 100]))


@pytest.mark.parametrize(("said", "what"), [
    (b"\xff\xfe\xfd", "bad text"),
    (b"{", "wrong shape: its `json` is not valid JSON"),
    (b"[" * 100_000, "wrong shape: its `json` is not valid JSON"),
    (b"1" * 10_000, "wrong shape: its `json` is not valid JSON"),
    (b"7", "wrong shape: its `json` is no list of turns"),
    (b"{}", "wrong shape: it has no list `conversations`"),
])  # fmt: skip
def test_broken_json_in_a_sample_says_so(said, what):
    assert reason("chatml", {"json": said}).startswith(what)


@pytest.mark.parametrize("seconds", [[0.5, 0.5], [0], [-1], ["a"], [True], [1e-320], {"a": 1}, 7,
                                     [10**400], [None]])  # fmt: skip
def test_frame_times_that_are_none_are_refused(seconds):
    entry = sample(chat("<video>", "b"), [], [[PNG]], second_per_grid_ts=seconds)
    assert reason("chatml", entry).startswith("wrong shape: its second_per_grid_ts")


