"""Media are what their bytes are, wherever they lie under the directories that were given."""

import base64
import io
import json
import tarfile

import pytest
from mixed_data import write_video
from PIL import Image

from megatron_vl.data.raw.prepare import PrepareConfig, prepare


def picture(format="PNG", mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (40, 30)).save(file, format)
    return file.getvalue()


def entry(kind="image", medium="0.png"):
    turns = [{"from": "human", "value": f"<{kind}>\nWhat?"}, {"from": "gpt", "value": "red"}]
    return {kind: medium, "conversations": turns}


def prepared(source, out, **more):
    more = {"split": "1,0,0"} | more
    return prepare(PrepareConfig(source=source, output=out, progress=False, **more))


def names(wds):
    (shard,) = wds.glob("*.tar")
    with tarfile.open(shard) as tar:
        return sorted(name.partition(".")[2] for name in tar.getnames())


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("name", "data", "stored"), [
    ("3f2a9c", picture(), "0.png"),
    ("photo.jpg!small", picture("JPEG"), "0.jpg"),
    ("x.jpg?x-oss-process=style", picture("WEBP"), "0.webp"),
    ("a.jpg", picture("PNG"), "0.png"),
    ("b.JPEG", picture("JPEG"), "0.jpg"),
    ("0.d41d8cd98f00b204e9800998ecf8427e", picture("GIF"), "0.gif"),
    ("no. 1 (of 2)", picture("TIFF"), "0.tif"),
    ("图", picture("PPM"), "0.ppm"),
    (".hidden", picture("BMP"), "0.bmp"),
    ("a.mp4", picture(), "0.png"),
])  # fmt: skip
def test_an_image_is_its_bytes(tmp_path, name, data, stored):
    write(tmp_path / "in" / name, data)
    write(tmp_path / "in" / "data.json", json.dumps([entry(medium=name)]).encode())
    done = prepared(tmp_path / "in", tmp_path / "out")
    assert done.refused == () and names(tmp_path / "out") == [stored, "json"]


@pytest.mark.parametrize(("name", "stored"), [("clip", "0.mp4"), ("v.mp4!p", "0.mp4"),
                                              ("w.jpg", "0.mp4")])
def test_a_video_is_its_bytes(tmp_path, name, stored):
    data = write_video(tmp_path / "v.mp4").read_bytes()
    write(tmp_path / "in" / name, data)
    write(tmp_path / "in" / "data.json", json.dumps([entry("video", name)]).encode())
    assert prepared(tmp_path / "in", tmp_path / "out").refused == ()
    assert names(tmp_path / "out") == [stored, "json"]


def test_frames_are_their_bytes(tmp_path):
    for number, format in enumerate(("PNG", "JPEG", "PNG")):
        write(tmp_path / "in" / "walk" / f"frame-{number}", picture(format))
    write(tmp_path / "in" / "data.json", json.dumps([entry("video", "walk")]).encode())
    assert prepared(tmp_path / "in", tmp_path / "out").refused == ()
    assert names(tmp_path / "out") == ["0.00000.png", "0.00001.jpg", "0.00002.png", "json"]


def test_what_an_entry_carries_is_its_bytes(tmp_path):
    url = "data:application/octet-stream;base64," + base64.b64encode(picture("PPM")).decode()
    write(tmp_path / "in" / "data.json", json.dumps([entry(medium=url)]).encode())
    assert prepared(tmp_path / "in", tmp_path / "out").refused == ()
    assert names(tmp_path / "out") == ["0.ppm", "json"]


def test_what_several_entries_carry_is_one_image(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    write(tmp_path / "in" / "data.json", json.dumps([entry(medium=url)] * 6).encode())
    made = prepared(tmp_path / "in", tmp_path / "out", split="1,1,0")
    assert made.media == {"image": 1} and made.shared_media == 1


@pytest.mark.parametrize(("kind", "medium", "what"), [
    ("image", "video.png", "by its bytes it is video/mp4, no image"),
    ("image", "text.png", "it is not in a format PIL can read"),
    ("image", "archive.jpg", "by its bytes it is application/gzip, no image"),
    ("video", "frames", "its frame 1.txt: it is not in a format PIL can read"),
    ("image", "data:image/png;base64,AAAA",
     "its image, whose bytes the entry itself has, is unusable: it is not in a format PIL"),
])  # fmt: skip
def test_other_bytes_are_named(tmp_path, kind, medium, what):
    source = tmp_path / "in"
    write(source / "video.png", write_video(tmp_path / "v.mp4").read_bytes())
    write(source / "text.png", b"text")
    write(source / "archive.jpg", b"\x1f\x8b\x08" + bytes(400))
    write(source / "frames" / "0", picture())
    write(source / "frames" / "1.txt", b"text")
    write(source / "0.png", picture())
    write(source / "data.json", json.dumps([entry(), entry(kind, medium)]).encode())
    (refused,) = prepared(source, tmp_path / "out").refused
    assert refused.reason == "unusable media" and what in refused.message


# ---- where they lie ---------------------------------------------------------------------------


@pytest.mark.parametrize("linked", [False, True])
def test_absolute_and_relative_paths_live_together(tmp_path, linked):
    """Relative to the JSON or the root, in `images` of either, or absolute, behind a link too."""
    data = tmp_path / "data"
    places = ["set/0.png", "set/images/1.png", "2.png", "images/3.png", "other/4.png", "5.png",
              "set/../other/6.png"]
    for place in places:
        write(data / place, picture())
    media = ["0.png", "1.png", "2.png", "3.png", str(data / "other" / "4.png"),
             f"file://{data}/5.png", "../other/6.png"]
    write(data / "set" / "data.json", json.dumps([entry(medium=m) for m in media]).encode())
    root = data
    if linked:
        root = tmp_path / "link"
        root.symlink_to(data)
    done = prepared(data / "set", tmp_path / "out", media_root=root)
    assert done.refused == () and done.media == {"image": len(media)}


@pytest.mark.parametrize("medium", ["/etc/hosts", "../../secret.png", "{}/secret.png", "../../x"])
def test_what_lies_outside_both_is_refused(tmp_path, medium):
    write(tmp_path / "secret.png", picture())
    write(tmp_path / "data" / "set" / "0.png", picture())
    entries = [entry(), entry(medium=medium.format(tmp_path))]
    write(tmp_path / "data" / "set" / "data.json", json.dumps(entries).encode())
    done = prepared(tmp_path / "data" / "set", tmp_path / "out", media_root=tmp_path / "data")
    (refused,) = done.refused
    assert "lies outside" in refused.message and "--media-root" in refused.message
