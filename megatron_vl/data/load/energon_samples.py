"""energon's own sample types as conversations, for datasets that `energon prepare` made.

dataset.yaml names the type and maps its fields to parts of a sample. An image or a video is the
file's bytes, text is from a .txt or a place in a .json.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from string import ascii_uppercase

from megatron.energon import (
    CaptioningSample,
    MultiChoiceVQASample,
    Sample,
    VidQASample,
    VQASample,
)

from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.dataset_dir import SAMPLE_TYPES
from megatron_vl.data.encode.media import image_size, video_info
from megatron_vl.data.encode.samples import ConversationSample
from megatron_vl.data.raw.formats.llava import question_and_answer
from megatron_vl.errors import InputError
from megatron_vl.models.media import IMAGE, VIDEO, StoredMedia


def conversation_of(sample: Sample, name: str) -> ConversationSample:
    """One question about one image or video, of a dataset with energon's own sample type.

    Args:
        sample: of one of `SERVED`.
        name: of the sample, for the message.

    Raises:
        InputError: the dataset's fields are of another kind.
        BadMedia: no image's header, or no video.
        BadEntry: the question marks other media than the one there is.
    """
    kind = VIDEO if isinstance(sample, VidQASample) else IMAGE
    data = getattr(sample, kind)
    question, answer = _SAID[type(sample)](sample)
    if not (isinstance(data, bytes) and isinstance(question, str) and isinstance(answer, str)):
        what = "an image" if kind == IMAGE else "a video"
        fields = ", ".join(SAMPLE_TYPES[type(sample).__name__])
        raise InputError(
            f"sample {name} is not {what}'s bytes, a question and an answer, which "
            f"{type(sample).__name__} has as {fields}; check the field_map in the dataset's "
            f".nv-meta/dataset.yaml."
        )
    if kind == IMAGE:
        height, width = image_size(data)
        media = StoredMedia(kind=IMAGE, files=(IMAGE,), height=height, width=width)
    else:
        info = video_info(data)
        media = StoredMedia(kind=VIDEO, files=(VIDEO,), height=info.height, width=info.width,
                            num_frames=info.num_frames, fps=info.fps)
    return ConversationSample.derive_from(
        sample,
        turns=_turns(question, answer, kind),
        media=(media,),
        read=lambda _: data,
    )


def _turns(question: str, answer: str, kind: str) -> tuple[Turn, Turn]:
    user, assistant = question_and_answer(question, answer)
    if len(user.media) != 1 or (kind == IMAGE and user.media != (IMAGE,)):
        raise BadEntry("mark count", f"it has the marks of {', '.join(user.media)} for one {kind}")
    # LLaVA marks a video by <image> too.
    parts = tuple(Part(media=kind) if part.media else part for part in user.parts
                  if part.media or part.text)
    return replace(user, parts=parts), assistant


# ---- question and answer of each type ----------------------------------------------------------


def _caption(sample: CaptioningSample) -> tuple:
    return "", sample.caption


def _answer(sample: VQASample | VidQASample) -> tuple:
    """The answer of the largest weight, or the first."""
    answers, weights = sample.answers, sample.answer_weights
    if not isinstance(answers, (list, tuple)) or not answers:
        return sample.context, answers
    if isinstance(weights, (list, tuple)) and len(weights) == len(answers):
        return sample.context, answers[max(range(len(answers)), key=weights.__getitem__)]
    return sample.context, answers[0]


def _choice(sample: MultiChoiceVQASample) -> tuple:
    """The choices below the question behind letters, of which the right one's is the answer."""
    choices, right = sample.choices, sample.correct_choice_idx
    if isinstance(right, str) and re.fullmatch(r"\s*\d{1,9}\s*", right, re.ASCII):
        right = int(right)
    fits = (
        isinstance(choices, (list, tuple)) and isinstance(right, int)
        and 0 <= right < len(choices) <= len(ascii_uppercase)
        and all(isinstance(text, str) for text in (sample.context, *choices))
    )
    if not fits:
        return sample.context, None
    listed = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([sample.context, *listed]), ascii_uppercase[right]


_SAID: dict[type, Callable[[Sample], tuple]] = {
    CaptioningSample: _caption,
    VQASample: _answer,
    VidQASample: _answer,
    MultiChoiceVQASample: _choice,
}
SERVED = tuple(_SAID)
