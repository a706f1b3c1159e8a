import io
import random
import sys
from itertools import product

import av
import numpy as np
import pytest
from mixed_data import gray_of, write_video
from qwen2_vl_reference import load_processor
from transformers.video_utils import VideoMetadata

from megatron_vl.data.encode import media
from megatron_vl.data.encode.media import FRAMES_AT_ONCE, video_frames, video_info
from megatron_vl.data.encode.model import load_media
from megatron_vl.errors import InputError
from megatron_vl.models.media import BadMedia, MediaLimits, StoredMedia
from megatron_vl.models.qwen2_vl.media import MediaProcessor

FRAMES = 60
FINE = {"qmin": "1", "qmax": "1"}  # of mpeg4 and its kin: levels as they were written
UNEVEN = [0, *np.random.default_rng(0).choice([20, 33, 34, 90], FRAMES - 1).cumsum().tolist()]
EVEN = {
    "mp4": ("a.mp4", dict(fps=10)),
    "mp4 with B-frames": ("a.mp4", dict(fps="30000/1001", bframes=3)),
    "webm": ("a.webm", dict(fps=24)),
    "webm at 29.97": ("a.webm", dict(fps="30000/1001", options={"g": "16"})),
    "mkv": ("a.mkv", dict(fps=30)),
    "mkv with B-frames": ("a.mkv", dict(fps=30, bframes=2)),
    "avi": ("a.avi", dict(fps=25, options=FINE)),
}
# Of these energon's decoder gives a frame beside the one that is asked for, or none.
COUNTED = {
    "avi with B-frames": ("a.avi", dict(fps=25, options=FINE | {"bf": "2"})),
    "mp4 with open groups": ("a.mp4", dict(fps=25, bframes=3, options={
        "x264-params": "open-gop=1:keyint=16:scenecut=0"})),
    "wmv": ("a.wmv", dict(fps=25, codec="wmv2", options=FINE)),
    "flv": ("a.flv", dict(fps=25)),
    "ts": ("a.ts", dict(fps=25, bframes=2)),
    "mpg": ("a.mpg", dict(fps=25, codec="mpeg2video", options=FINE | {"bf": "2"})),
    "uneven webm": ("a.webm", dict(times=UNEVEN, options={"g": "16"})),
    "uneven mkv": ("a.mkv", dict(times=UNEVEN)),
    "mkv that begins late": ("a.mkv", dict(fps=25, times=[5000 + 40 * i for i in range(FRAMES)])),
}
UNEVEN_MP4 = {"uneven mp4": ("a.mp4", dict(times=UNEVEN, bframes=2))}
ALL = EVEN | COUNTED | UNEVEN_MP4
# The same packets in another file: what a muxer's options are, and how many frames it hides.
REMUXED = {
    "mp4 with the index first": (dict(movflags="faststart"), 0),
    "mp4 in fragments": (dict(movflags="frag_keyframe+empty_moov"), 0),
    "mp4 in fragments with an index": (
        dict(movflags="frag_keyframe+empty_moov+default_base_moof+global_sidx"), 0
    ),
    "mp4 that was cut between key frames": ({}, 3),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Bytes of each of `ALL` and `REMUXED`."""
    written = {}
    for name, (file, options) in ALL.items():
        path = tmp_path_factory.mktemp("video") / file
        written[name] = write_video(path, frames=FRAMES, **options).read_bytes()
    for name, (options, hidden) in REMUXED.items():
        path = tmp_path_factory.mktemp("video") / "a.mp4"
        _remux(written["mp4 with B-frames"], path, options, hidden)
        written[name] = path.read_bytes()
    return written


def _remux(data, path, options, hidden):
    """An mp4 of the same packets. The first `hidden` frames stand before its time begins."""
    with av.open(io.BytesIO(data)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.pts -= hidden * packet.duration
                packet.dts -= hidden * packet.duration
                packet.stream = stream
                new.mux(packet)


def _decoded(data):
    """Every frame of a file, decoded one after the other."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _scattered():
    return sorted(random.Random(0).sample(range(FRAMES), 2 * FRAMES_AT_ONCE + 5))


@pytest.mark.parametrize("name", EVEN | COUNTED)
def test_a_file_says_its_frames_rate_and_size(files, name):
    info = video_info(files[name])
    assert (info.num_frames, info.height, info.width) == (FRAMES, 64, 96)
    if "uneven" not in name:
        fps = str(ALL[name][1]["fps"]).split("/")
        assert info.fps == pytest.approx(int(fps[0]) / int(fps[-1] if fps[1:] else 1))


@pytest.mark.parametrize("name", ALL)
def test_frames_are_those_that_are_asked_for(files, name):
    decoded = _decoded(files[name])
    levels = [frame.mean() for frame in decoded]
    # So that neither the writer nor a wrong frame of the same level can deceive.
    assert len(decoded) == len({round(level, 2) for level in levels}) == FRAMES
    assert all(abs(level - gray_of(i)) <= 3 for i, level in enumerate(levels))
    indices = _scattered()
    frames = list(video_frames(files[name], indices))
    assert len(frames) == len(indices)
    for index, (_, frame) in zip(indices, frames, strict=True):
        assert np.array_equal(np.asarray(frame), decoded[index]), f"frame {index}"


@pytest.mark.parametrize("name", ALL)
def test_frames_come_with_the_seconds_at_which_they_are_shown(files, name):
    indices = _scattered()
    times = [time for time, _ in video_frames(files[name], indices)]
    if "uneven" in name:
        want = [UNEVEN[index] / 1000 for index in indices]
    else:
        want = [index / video_info(files[name]).fps for index in indices]
    assert times == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize("name", REMUXED)
def test_hidden_frames_have_no_number(files, name):
    data, hidden = files[name], REMUXED[name][1]
    decoded = _decoded(data)
    assert video_info(data).num_frames == len(decoded) == FRAMES - hidden
    assert all(abs(frame.mean() - gray_of(i)) <= 3 for i, frame in enumerate(decoded, hidden))
    for index, (time, frame) in enumerate(video_frames(data, range(len(decoded)))):
        assert np.array_equal(np.asarray(frame), decoded[index]), f"frame {index}"
        assert time == pytest.approx(index * 1001 / 30000, abs=2e-3)


@pytest.mark.parametrize("name", EVEN | UNEVEN_MP4)
def test_a_usual_file_is_not_decoded_from_its_start(files, name, monkeypatch):
    monkeypatch.setattr(media, "_counted", None)
    assert len(list(video_frames(files[name], range(FRAMES)))) == FRAMES


def _audio():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "it cannot be decoded"),
        (b"<html>no such video</html>", "it cannot be decoded"),
        (bytes(range(256)) * 40, "it cannot be decoded"),
        (_audio(), "it has no video frames"),
    ],
    ids=["nothing", "a page", "garbage", "sound"],
)
def test_a_file_that_is_no_video_says_so(data, what):
    for use in (video_info, lambda data: list(video_frames(data, [0]))):
        with pytest.raises(BadMedia, match=what):
            use(data)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mp4", "it cannot be decoded"),  # its index is at its end
        ("mp4 with the index first", "it ends after .* of its 60 frames; the file is cut off"),
        ("webm", "it ends after .* of its 2.5 seconds; the file is cut off"),
        ("mkv", "it ends after .* of its 2.0 seconds; the file is cut off"),
        ("flv", "it ends after .* of its 2.4 seconds; the file is cut off"),
        ("avi", "it ends after .* of its 60 frames; the file is cut off"),
    ],
)
def test_a_file_that_is_cut_off_says_so(files, name, what):
    data = files[name]
    with pytest.raises(BadMedia, match=what):
        video_info(data[: len(data) * 6 // 10])


def test_a_frame_past_the_end_is_named(files):
    with pytest.raises(BadMedia, match="it ends before its frame 60 .from 0.; the file is cut off"):
        list(video_frames(files["mp4"], [3, 60]))


def test_a_video_without_pyav_says_what_to_install(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="pip install av"):
        video_info(files["mp4"])


# ---- which frames are taken ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(hf_dir):
    return load_processor(hf_dir)


def _media(reference, spec, **limits):
    return MediaProcessor(reference.image_processor, vision=spec.vision,
                          limits=MediaLimits(**limits))


@pytest.mark.parametrize(
    ("video_fps", "video_maxlen"), product([0.3, 1.0, 2.0, 3.7, 30.0], [2, 3, 4, 7, 16, 128, 768])
)
def test_the_frames_taken_are_those_of_transformers(reference, spec, video_fps, video_maxlen):
    processor = _media(reference, spec, video_fps=video_fps, video_maxlen=video_maxlen)
    for num_frames, fps in product([*range(2, 40), *range(41, 3000, 157)],
                                   [0.5, 1.0, 7.3, 24000 / 1001, 25.0, 29.97, 30.0, 60.0]):
        have = processor.frame_indices(num_frames, fps)
        want = reference.video_processor.sample_frames(
            VideoMetadata(total_num_frames=num_frames, fps=fps), temporal_patch_size=2,
            min_frames=4, max_frames=video_maxlen, fps=video_fps,
        ).tolist()
        if want[-1] == num_frames:  # a rounded step may give transformers one past the end
            del want[-1]
        assert have == want
        assert len(have) % 2 == 0 and len(have) <= video_maxlen and have[-1] < num_frames


@pytest.mark.parametrize(
    ("num_frames", "fps", "video_maxlen", "want"),
    [
        (1, 30.0, 128, [0]),  # transformers refuses this, and the next
        (9, 30.0, 1, [0]),
        (6, None, 128, [0, 1, 2, 3, 4, 5]),  # frames of no known rate were taken at the right one
        (6, None, 4, [0, 1, 3, 4]),
    ],
)
def test_a_short_video_gives_the_frames_it_has(reference, spec, num_frames, fps, video_maxlen,
                                               want):
    processor = _media(reference, spec, video_maxlen=video_maxlen)
    assert processor.frame_indices(num_frames, fps) == want


@pytest.mark.parametrize(
    ("told", "what"),
    [
        (dict(width=64, height=96), "it is 96 x 64 pixels but was prepared as 64 x 96"),
        (dict(width=96, height=64, num_frames=200), "it ends before its frame 60"),
    ],
)
def test_a_video_unlike_the_prepared_one_is_refused(reference, spec, files, told, what):
    stored = StoredMedia(**dict(kind="video", files=("0.mp4",), num_frames=60, fps=10.0) | told)
    with pytest.raises(BadMedia, match=what):
        load_media(_media(reference, spec), stored, lambda _: files["mp4"])
