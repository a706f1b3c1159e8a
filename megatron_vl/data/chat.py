"""Conversations to tokens, through the model's own chat template and tokenizer."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from megatron_vl.data.conversation import MEDIA_KINDS, Part, Turn
from megatron_vl.data.options import TrainedText
from megatron_vl.data.samples import IGNORE
from megatron_vl.errors import InputError
from megatron_vl.inputs import json_value
from megatron_vl.models.spec import TokenIds

_PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
]
# A text no template leaves alone that trims, or looks for reasoning or tools in what was said.
_PROBE_TEXT = "\n <think>{number}</think>\n<tool_response> {number} \n"
_MAX_FORMS = 256  # shapes of conversations remembered


class BadConversation(ValueError):
    """A conversation that cannot be trained on; the message says why, the caller which sample.

    `reason` is one of `BadEntry`'s.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class ChatTokenizer:
    """A Hugging Face tokenizer and its chat template.

    The text is tokenised whole, as transformers' processor does, and each turn is found in it by
    rendering the conversation up to that turn: no marker is searched in what a person wrote, and
    no system prompt is assumed.
    """

    def __init__(self, tokenizer, *, tokens: TokenIds, trained: TrainedText | None = None):
        """`tokenizer` is a fast tokenizer of transformers; `from_hf_dir` loads it."""
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.trained = trained or TrainedText()
        self._placeholders = {kind: getattr(tokens, kind) for kind in MEDIA_KINDS}
        self.pad_token = tokenizer.pad_token_id if tokens.pad is None else tokens.pad
        self._forms: dict[tuple, _Form | None] = {}

    @classmethod
    def from_hf_dir(cls, hf_dir: Path, *, tokens: TokenIds,
                    trained: TrainedText | None = None) -> ChatTokenizer:
        """Read the tokenizer files of a Hugging Face directory.

        Raises:
            InputError: files missing or unreadable, no chat template, or ids unlike config.json's.
        """
        from transformers import AutoTokenizer

        hf_dir = Path(hf_dir)
        if not hf_dir.is_dir():
            raise InputError(
                f"{hf_dir} is not a directory; give the model's Hugging Face directory."
            )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (hf_dir / name).is_file():
                raise InputError(
                    f"{hf_dir / name} is missing; copy it from the model's Hugging Face repository."
                )
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(hf_dir), use_fast=True, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers and tokenizers raise many kinds for a bad file
            raise InputError(
                f"the tokenizer in {hf_dir} cannot be read ({str(error).strip().splitlines()[0]}); "
                f"copy tokenizer.json and tokenizer_config.json again from the model's repository."
            ) from error
        legacy = hf_dir / "chat_template.json"  # where processors kept it before the .jinja file
        if not tokenizer.chat_template and legacy.is_file():
            try:
                template = json_value(legacy.read_text(encoding="utf-8"))["chat_template"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{legacy} cannot be read or has no chat_template; copy it again from the "
                    f"model's Hugging Face repository."
                ) from error
            tokenizer.chat_template = template
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer in {hf_dir} has no chat template; copy chat_template.jinja or a "
                f"tokenizer_config.json with chat_template from the model's repository."
            )
        if tokenizer.pad_token_id is None and tokens.pad is None:
            raise InputError(
                f"the tokenizer in {hf_dir} has no pad token; add pad_token to its "
                f"tokenizer_config.json."
            )
        chat = cls(tokenizer, tokens=tokens, trained=trained)
        try:
            probe = chat._render(_PROBE)
        except Exception as error:  # jinja2's, its sandbox's too, and what a template raises
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"the chat template in {hf_dir} cannot be used ({words[0].rstrip('.')}); copy "
                f"chat_template.jinja again from the model's repository."
            ) from error
        ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if ids.count(tokens.image) != 1:
            raise InputError(
                f"the chat template in {hf_dir} does not write config.json's image_token_id "
                f"{tokens.image} for an image; take both files from the same model."
            )
        return chat

    def encode(
        self, turns: Sequence[Turn], media_tokens: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of one conversation.

        Trained are, unless `TrainedText` says otherwise, the assistant's turns, up to and with
        their end token, not the newline after it. A placeholder of an image or video never is.

        Args:
            media_tokens: placeholders each image and video takes, in order.

        Returns:
            tokens int64 [L], labels int64 [L]: the target of each position (the next token), or
            IGNORE.

        Raises:
            BadConversation: no turn to train, an empty answer, placeholders unlike the media.
        """
        for turn in turns:
            if turn.role == "assistant" and not any(p.text and p.text.strip() for p in turn.parts):
                raise BadConversation("empty answer", "its answer is empty")
        text, spans = self._write(turns)
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        tokens = encoded.ids
        if not spans:
            raise BadConversation("no answer", "it has no answer to train on")
        if self.trained.train_on_prompt:
            labels = list(tokens)
        else:
            begins, ends = zip(*encoded.offsets, strict=True)
            labels = [IGNORE] * len(tokens)
            for begin, end in spans[-1:] if self.trained.mask_history else spans:
                # A token across the edge of an answer is part of the prompt and not trained.
                first, last = bisect_left(begins, begin), bisect_right(ends, end)
                labels[first:last] = tokens[first:last]
        self._fill_places([kind for turn in turns for kind in turn.media], media_tokens,
                          tokens, labels)
        labels = [*labels[1:], IGNORE]
        return torch.tensor(tokens), torch.tensor(labels)

    def _fill_places(self, kinds: list[str], counts: Sequence[int], tokens: list[int],
                     labels: list[int]) -> None:
        """Repeat every placeholder as often as its image or video has tokens."""
        for kind, placeholder in self._placeholders.items():
            # What a person wrote may hold the tokenizer's own mark.
            if tokens.count(placeholder) != kinds.count(kind):
                raise BadConversation(
                    "mark count",
                    f"its text has {tokens.count(placeholder)} {kind} marks for "
                    f"{kinds.count(kind)} {kind}s",
                )
        if len(kinds) != len(counts):
            raise BadConversation(
                "mark count", f"it has {len(kinds)} marks for {len(counts)} images and videos"
            )
        at = 0
        for kind, count in zip(kinds, counts, strict=True):
            placeholder = self._placeholders[kind]
            at = tokens.index(placeholder, at)
            tokens[at : at + 1] = [placeholder] * count
            labels[at : at + 1] = [IGNORE] * count
            at += count

    def _write(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, and the characters in it that are trained."""
        shape = tuple((t.role, *(part.media for part in t.parts)) for t in turns)
        if shape not in self._forms:
            if len(self._forms) >= _MAX_FORMS:
                self._forms.clear()
            self._forms[shape] = self._form(turns)
        form = self._forms[shape]
        if form is None:
            return self._render_with_spans([turn.message() for turn in turns])
        texts = (part.text for turn in turns for part in turn.parts if part.text is not None)
        pieces = [next(texts) if piece is None else piece for piece in form.pieces]
        ends = [0, *accumulate(map(len, pieces))]
        return "".join(pieces), [(ends[first], ends[last]) for first, last in form.spans]

    def _form(self, turns: Sequence[Turn]) -> _Form | None:
        """What the template writes around the texts of such turns; None if it changes texts."""
        probes, probed = [], []
        for turn in turns:
            parts = []
            for part in turn.parts:
                if part.text is not None:
                    probes.append(_PROBE_TEXT.format(number=len(probes)))
                    part = Part(text=probes[-1])
                parts.append(part)
            probed.append(Turn(role=turn.role, parts=tuple(parts)).message())
        text, spans = self._render_with_spans(probed)
        pieces: list[str | None] = []
        cuts = sorted({edge for span in spans for edge in span})
        edges = {}  # character -> piece that begins there
        at = 0
        for begin, end, probe in self._find(text, probes):
            if begin < 0:
                return None
            for cut in [c for c in cuts if at <= c <= begin]:
                pieces.append(text[at:cut])
                edges[cut], at = len(pieces), cut
            pieces.append(text[at:begin])
            if probe:
                pieces.append(None)
            at = end
        if not edges.keys() >= set(cuts):
            return None
        return _Form(pieces=pieces, spans=[(edges[begin], edges[end]) for begin, end in spans])

    @staticmethod
    def _find(text: str, probes: list[str]):
        """Begin and end of each probe in `text`, in order, and last of the text's own end."""
        at = 0
        for probe in probes:
            begin = text.find(probe, at)
            at = begin + len(probe)
            yield begin, at, True
            if begin < 0:
                return
        yield len(text), len(text), False

    def _render_with_spans(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        text = self._render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], add_generation_prompt=True)
            last = number + 1 == len(messages)
            turn = text if last else self._render(messages[: number + 1])
            if not (turn.startswith(prompt) and text.startswith(turn)):
                raise InputError(
                    "the model's chat template does not write a conversation turn after turn, so "
                    "the answers cannot be found in it; use a template whose text only grows."
                )
            spans.append((len(prompt), len(turn.rstrip())))
        return text, spans

    def _render(self, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """A template's text for turns of one shape; rendering costs more than all the rest of it."""

    pieces: list[str | None]  # the template's own text, and None where a part's text goes
    spans: list[tuple[int, int]]  # trained stretches: the piece each begins with and ends before
