"""transformers' processors of Qwen2-VL and those after it, with PIL in place of torchvision; and
what their chat templates are to write, spelled out."""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_processing_backends import PilBackend
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from megatron_vl.data.encode.samples import IGNORE

_MODULE = "transformers.models.{0}.video_processing_{0}"
_STUBS = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2",
          "torchvision.transforms.v2.functional")


def load_processor(hf_dir, kind=Qwen2VLProcessor, **video_settings):
    """transformers' processor of a Hugging Face directory; `kind` is the family's class."""

    class ImageAndVideoProcessor(kind):
        """Its check of classes would ask for torchvision's video processor."""

        def check_argument_for_proper_class(self, name, argument):
            pass

    images = AutoImageProcessor.from_pretrained(hf_dir, backend="pil")
    videos = video_processor_class(*_VIDEOS.get(kind.__name__, _VIDEOS[None])).from_pretrained(
        hf_dir, do_convert_rgb=False, cap_pixels_per_frame=False, **video_settings
    )
    videos.pil = images
    return ImageAndVideoProcessor(images, AutoTokenizer.from_pretrained(hf_dir), videos)


_VIDEOS = {  # of a processor, by its name, the folder and the class of its videos'
    None: ("qwen2_vl", "Qwen2VLVideoProcessor"),
    "Qwen3VLProcessor": ("qwen3_vl", "Qwen3VLVideoProcessor"),
}


@cache
def video_processor_class(folder: str, name: str):
    """transformers' class, whose pixels are PIL's.

    Sampling, sizes, grids and the layout of patches are transformers' own code. Its resizing,
    rescaling and normalising are torchvision's, which differ in the last bits from PIL's, frame by
    frame: there it calls transformers' PIL image processor.
    """
    reference = getattr(_module(folder), name)

    class PilPixels(reference.__mro__[1]):
        """Stands where the class looks for `super()`."""

        pil: PilBackend  # the image processor

        def resize(self, image, size, resample):
            frames = [PilBackend.resize(self.pil, frame.numpy(), size, resample)
                      for frame in image.flatten(0, 1)]
            return torch.from_numpy(np.stack(frames)).unflatten(0, image.shape[:2])

        def rescale_and_normalize(self, videos, do_rescale, factor, do_normalize, mean, std):
            frames = [frame.numpy() for frame in videos.flatten(0, 1)]
            if do_rescale:
                frames = [self.pil.rescale(frame, factor) for frame in frames]
            if do_normalize:
                frames = [self.pil.normalize(frame, mean, std) for frame in frames]
            pixels = np.stack(frames).astype(np.float32)
            return torch.from_numpy(pixels).unflatten(0, videos.shape[:2])

    class PilVideoProcessor(reference, PilPixels):
        pass

    return PilVideoProcessor


def _module(folder: str):
    """transformers' module of the video processor, executed for this test alone.

    It imports torchvision, of which it needs only functions that `PilPixels` replaces. An empty
    stand-in is there while it is executed, and neither is left behind for other tests to find.
    """
    name = _MODULE.format(folder)
    path = Path(transformers.__file__).parents[1] / f"{name.replace('.', '/')}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    meanwhile = {name: module}  # transformers' decorators look for the class' module
    if importlib.util.find_spec("torchvision") is None:
        meanwhile |= {name: types.ModuleType(name) for name in _STUBS}
        for name in _STUBS[1:]:
            parent, _, child = name.rpartition(".")
            setattr(meanwhile[parent], child, meanwhile[name])
    before = {name: sys.modules[name] for name in meanwhile if name in sys.modules}
    sys.modules.update(meanwhile)
    try:
        spec.loader.exec_module(module)
    finally:
        for name in meanwhile:
            del sys.modules[name]
        sys.modules.update(before)
    return module


def published_text(text):
    """A template's text as transformers' Qwen3VLProcessor is to read it.

    Its version 4 puts the frames in the place of a video's three marks, as the model was trained;
    version 5 in that of the middle one.
    """
    return text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")


def spelled(turns, counts, *, system="You are a helpful assistant.", times=None):
    """The text as the published template is to write it, and the characters of each answer.

    An answer goes from its own first character to the end of its end token.

    Args:
        system: where no turn is the system's; empty: nothing is said then.
        times: of every video, the seconds of its frames, where they are written.
    """
    counts = {kind: iter(numbers) for kind, numbers in counts.items()}
    times = iter(times or ())
    text, answers = "", []
    if turns[0].role != "system" and system:
        text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for turn in turns:
        text += f"<|im_start|>{turn.role}\n"
        begin = len(text)
        for part in turn.parts:
            if part.media is None:
                text += part.text
            else:
                count, shown = next(counts[part.media]), [None]
                if part.media == "video":
                    shown = next(times, shown)
                for second in shown:
                    pads = f"<|{part.media}_pad|>" * (count // len(shown))
                    text += "" if second is None else f"<{second:.1f} seconds>"
                    text += f"<|vision_start|>{pads}<|vision_end|>"
        text += "<|im_end|>"
        if turn.role == "assistant":
            answers.append((begin, len(text)))
        text += "\n"
    return text, answers


def labels_of(text, answers, tokenizer, mask):
    """What each position is to predict, from characters alone."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = encoded["input_ids"]
    if mask == "all text":
        pads = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        trained = [token not in pads for token in ids]
    else:
        wanted = answers[-1:] if mask == "the last answer" else answers
        trained = [any(begin <= first and last <= end for begin, end in wanted)
                   for first, last in encoded["offset_mapping"]]
    labels = [token if take else IGNORE for token, take in zip(ids, trained, strict=True)]
    return ids, [*labels[1:], IGNORE]
