"""A small source of every kind of sample: images of several sizes, videos, text, Chinese."""

import json
from fractions import Fraction

import numpy as np
from PIL import Image


def write_video(path, *, frames=20, fps=10, size=(96, 64), codec=None, bframes=0, options=None,
                times=None):
    """A real video whose frame i is filled with `gray_of(i)`.

    `times` are the milliseconds at which the frames are shown, if not evenly.
    """
    import av

    with av.open(str(path), "w") as container:
        codec = codec or {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(path.suffix, "libx264")
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"bf": str(bframes), "g": "8", "crf": "1"}
        stream.options = {**stream.options, **(options or {})}
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            level = gray_of(number)
            array = np.full((size[1], size[0], 3), level, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def gray_of(number):
    return 8 + 9 * number % 240


def write_image(path, size, seed=0):
    """Noise of `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def said(*turns):
    roles = ("human", "gpt")
    if turns and turns[0].startswith("system:"):
        return [{"from": "system", "value": turns[0][7:]}, *said(*turns[1:])]
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]


def write_source(root, *, copies=1):
    """ShareGPT JSON in `root`, its media in `root`/images; returns the entries."""
    data, root = root / "data.json", root / "images"
    root.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate([(64, 64), (200, 90), (30, 301), (40, 30)]):
        write_image(root / f"{number}.png", size, number)
    write_video(root / "clip.mp4")
    for number in range(6):
        write_image(root / "walk" / f"{number:03d}.png", (70, 56), number)
    (root / "walk.json").write_text(json.dumps({"fps": 2.0}))
    kinds = [
        {"conversations": said("<image>What is this?", "noise"), "images": ["0.png"]},
        {"conversations": said("First <image>then <image>\nand <image>?", "three"),
         "images": ["1.png", "2.png", "3.png"]},
        {"conversations": said("1 + 1?", "2")},
        {"conversations": said("system:Answer in one word.", "<image>What?", "noise", "Sure?",
                               "yes"), "images": ["3.png"]},
        {"conversations": said("<video>What happens?", "it brightens"), "videos": ["clip.mp4"]},
        {"conversations": said("<image>then <video>?", "both"), "images": ["1.png"],
         "videos": ["walk"]},
        {"conversations": said("system:请用中文回答。", "<image>这是什么颜色？", "没有颜色 🔴。"),
         "images": ["2.png"]},
    ]
    entries = [{"id": f"{copy}-{i}", **kind} for copy in range(copies)
               for i, kind in enumerate(kinds)]
    data.write_text(json.dumps(entries, ensure_ascii=False))
    return entries
