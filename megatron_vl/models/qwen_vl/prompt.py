"""Qwen-VL's form of a conversation, and what its published fine-tuning trains of it.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\nPicture 1: <img>...</img>\\nquestion<|im_end|>\\n
    <|im_start|>assistant\\nanswer<|im_end|>\\n

(without the line breaks of this page). Of every turn <|im_start|>, <|im_end|> and the line break
behind it are trained; of an answer its text is too. Roles and the other turns' text are not.

An image is <img>, a place for each of its embeddings, and </img>. In the places are the bytes of
its path, filled up with <imgpad>: embeddings cover them, and nothing reads them in training. Of a
path longer than the places, which the published tokenizer refuses, they hold the beginning.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_vl.models.family import Said
from megatron_vl.models.qwen_vl.tokenizer import (
    END_OF_TEXT,
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    MARKS,
    OF_OBJECTS,
    TURN_END,
    TURN_START,
    load_encoding,
)
from megatron_vl.models.spec import ModelSpec

SYSTEM = "You are a helpful assistant."
_LABEL = re.compile(r"Picture [0-9]+: $")  # before an image, where the entry has it already
_RESERVED = re.compile("|".join(re.escape(mark) for mark in MARKS if mark not in OF_OBJECTS))


class ChatMLPrompt:
    """`megatron_vl.models.family.Prompt`."""

    def __init__(self, encoding):
        """`encoding`: a `tiktoken.Encoding`."""
        self.encoding = encoding
        self.ids = {mark: encoding.encode_single_token(mark) for mark in MARKS}
        self.special = frozenset(self.ids.values())
        self.pad_token = self.ids[END_OF_TEXT]
        self.ends = frozenset({self.ids[TURN_END], self.ids[END_OF_TEXT]})
        self.new_line = encoding.encode("\n")

    def encode(
        self, turns: Sequence[Said], trained: Sequence[bool], media_tokens: Sequence[int] = (),
        media_names: Sequence[str] = (), *, answers_alone: bool = False,
    ) -> tuple[list[int], list[int | None]]:
        """See `megatron_vl.models.family.Prompt`."""
        made = []
        if turns[0].role != "system":
            text = self.encoding.encode_ordinary(SYSTEM)
            made.append(self._turn(
                "system", text, [None] * len(text), marked=not answers_alone
            ))
        images = enumerate(zip(media_tokens, media_names, strict=True), start=1)
        for number, (turn, is_trained) in enumerate(zip(turns, trained, strict=True), start=1):
            text, labels = self._value(turn, number, images)
            answers = is_trained and turn.role == "assistant"
            says = answers if answers_alone else is_trained
            made.append(self._turn(
                turn.role, text, labels if says else [None] * len(text), ends=says,
                marked=not answers_alone and (is_trained or turn.role != "assistant"),
            ))
        return tuple([one for part in parts for one in part] for parts in zip(*made, strict=True))

    def encode_prompt(
        self, turns: Sequence[Said], media_tokens: Sequence[int] = (),
        media_names: Sequence[str] = (),
    ) -> list[int]:
        """See `megatron_vl.models.family.Prompt`."""
        asked, _ = self.encode(turns, [False] * len(turns), media_tokens, media_names)
        return [*asked, self.ids[TURN_START], *self._role_line("assistant")]

    def _role_line(self, role: str) -> list[int]:
        return [*self.encoding.encode_ordinary(role), *self.new_line]

    def _turn(
        self, role: str, text: list[int], labels: list[int | None], *, marked: bool,
        ends: bool = False,
    ) -> tuple[list[int], list[int | None]]:
        """Tokens and labels of a turn.

        Args:
            marked: its marks are trained.
            ends: the mark that ends it is, whatever the others are.
        """
        start, end = [self.ids[TURN_START]], [self.ids[TURN_END]]
        role_line = self._role_line(role)

        def trained(ids: list[int], are: bool) -> list[int | None]:
            return ids if are else [None] * len(ids)

        return [*start, *role_line, *text, *end, *self.new_line], [
            *trained(start, marked), *[None] * len(role_line), *labels,
            *trained(end, marked or ends), *trained(self.new_line, marked),
        ]

    def _value(
        self, turn: Said, number: int, images: Iterator[tuple[int, tuple[int, str]]]
    ) -> tuple[list[int], list[int | None]]:
        """Tokens and labels of what a turn says, as if it were trained.

        Args:
            images: from the next one on its number, its places and its name.

        Raises:
            ValueError: it holds a mark.
        """
        said, shown = "", []
        for part in turn.parts:
            if part.media is None:
                text = part.text
                if mark := _RESERVED.search(text):
                    raise ValueError(f"turn {number} holds the reserved mark {mark[0]}")
                if said.endswith(f"{IMAGE_END}\n"):
                    text = text.removeprefix("\n")
                said += text
                continue
            place, image = next(images)
            label = "" if _LABEL.search(said) else f"Picture {place}: "
            said += f"{label}{IMAGE_START}{IMAGE_END}\n"
            shown.append(image)
        return self._with_places(said, iter(shown))

    def _with_places(
        self, said: str, shown: Iterator[tuple[int, str]]
    ) -> tuple[list[int], list[int | None]]:
        tokens: list[int] = []
        labels: list[int | None] = []
        for token in self.encoding.encode(
            unicodedata.normalize("NFC", said), disallowed_special=(),
            allowed_special={IMAGE_START, IMAGE_END, *OF_OBJECTS},
        ):
            tokens.append(token)
            labels.append(token)
            if token == self.ids[IMAGE_START]:
                count, name = next(shown)
                places = [*unicodedata.normalize("NFC", name).encode()[:count]]
                tokens += [*places, *[self.ids[IMAGE_PAD]] * (count - len(places))]
                labels += [None] * count
        return tokens, labels

    def decode(self, tokens: Iterable[int]) -> str:
        """See `megatron_vl.models.family.Prompt`; an id behind the last token is U+FFFD."""
        known, unknown = self.encoding.decode_single_token_bytes, "\ufffd".encode()
        written = (known(one) if one < self.encoding.n_vocab else unknown for one in tokens)
        return b"".join(written).decode("utf-8", "replace")


def prompt(hf_dir: Path, spec: ModelSpec) -> ChatMLPrompt:
    """Of a directory.

    Raises:
        InputError: its qwen.tiktoken cannot be used.
    """
    return ChatMLPrompt(load_encoding(hf_dir, spec))
