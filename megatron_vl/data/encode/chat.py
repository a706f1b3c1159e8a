"""Conversations to tokens, through the model's own chat template and tokenizer."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.encode.answers import trained_turns
from megatron_vl.data.encode.model_files import check_tokenizer
from megatron_vl.data.encode.samples import IGNORE
from megatron_vl.data.encode.template import ChatTemplate
from megatron_vl.data.grounding import Pixels, render
from megatron_vl.data.options import TrainedText
from megatron_vl.errors import InputError, shown
from megatron_vl.models.family import COPY_AGAIN, TOKENIZER, Family, Span
from megatron_vl.models.media import IMAGE, MEDIA_KINDS, VIDEO
from megatron_vl.models.spec import TokenIds
from megatron_vl.typed import Shape, Text, read_file


class _Legacy(Shape):
    """chat_template.json"""

    chat_template: Text


class ChatTokenizer:
    """A Hugging Face tokenizer and its chat template.

    Tokens are those of the whole text, as transformers' processor makes them. `ChatTemplate` finds
    the answers in it: no marker is searched in what a person wrote, and no system prompt is
    assumed.
    """

    def __init__(self, tokenizer, *, tokens: TokenIds, family: Family | None = None,
                 trained: TrainedText | None = None):
        """`tokenizer` is a fast tokenizer of transformers; `from_hf_dir` loads it.

        Args:
            family: that may know the chat template; None: it is rendered.
        """
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.trained = trained or TrainedText()
        self._placeholders = {kind: getattr(tokens, kind) for kind in tokens.media_kinds}
        self.pad_token = tokenizer.pad_token_id if tokens.pad is None else tokens.pad
        self.template = ChatTemplate(
            tokenizer, family=family, last_answer_only=self.trained.mask_history,
            text_only=not self._placeholders,
        )
        self._own_tokens = frozenset(
            token.content for token in tokenizer.added_tokens_decoder.values()
        )

    @property
    def special_ids(self) -> frozenset[int]:
        """Of the tokenizer's own marks."""
        return frozenset((*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder))

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the template's, and the tokenizer's end of text."""
        closing = self.tokenizer.backend_tokenizer.encode(
            self.template.closing, add_special_tokens=False
        ).ids
        ends = {self.tokenizer.eos_token_id, *(closing if len(closing) == 1 else ())}
        return frozenset(ends - {None})

    @property
    def thinks(self) -> bool:
        """See `ChatTemplate.thinks`."""
        return self.template.thinks

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, marks as they are written."""
        return self.tokenizer.decode(tokens)

    @classmethod
    def from_hf_dir(cls, hf_dir: Path, *, tokens: TokenIds, family: Family | None = None,
                    trained: TrainedText | None = None) -> ChatTokenizer:
        """Read the tokenizer files of a Hugging Face directory.

        Raises:
            InputError: files missing or unreadable, no chat template, one whose answers cannot be
                found, or ids unlike config.json's.
        """
        from transformers import AutoTokenizer

        hf_dir = Path(hf_dir)
        if not hf_dir.is_dir():
            raise InputError(
                f"{hf_dir} is not a directory; give the model's Hugging Face directory."
            )
        for name in TOKENIZER:
            if not (hf_dir / name).is_file():
                raise InputError(
                    f"{hf_dir / name} is missing; copy it from the model's Hugging Face repository."
                )
        check_tokenizer(hf_dir)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(hf_dir), use_fast=True, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers and tokenizers raise many kinds for a bad file
            raise InputError(
                f"the tokenizer in {hf_dir} cannot be read ({_first_line(error)}); copy "
                f"tokenizer.json and tokenizer_config.json again from the model's repository."
            ) from error
        legacy = hf_dir / "chat_template.json"  # where processors kept it before the .jinja file
        if not tokenizer.chat_template and legacy.is_file():
            tokenizer.chat_template = read_file(legacy, _Legacy, mend=COPY_AGAIN).chat_template
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
        chat = cls(tokenizer, tokens=tokens, family=family, trained=trained)
        image = () if tokens.image is None else (Part(media=IMAGE),)
        turns = [Turn(role="user", parts=(*image, Part(text="a"))),
                 Turn(role="assistant", parts=(Part(text="b"),))]
        try:
            probe = chat.template.render(chat.template.messages(turns))
        except Exception as error:  # jinja2's, its sandbox's too, and what a template raises
            raise InputError(
                f"the chat template in {hf_dir} cannot be used ({_first_line(error)}); copy "
                f"chat_template.jinja again from the model's repository."
            ) from error
        ids = tokenizer.backend_tokenizer.encode(probe, add_special_tokens=False).ids
        if tokens.image is not None and ids.count(tokens.image) != 1:
            raise InputError(
                f"the chat template in {hf_dir} does not write config.json's image_token_id "
                f"{tokens.image} for an image; take both files from the same model."
            )
        try:
            chat.template.write([Turn(role=role, parts=(Part(text="a"),))
                                 for role in ("user", "assistant") * 2])
        except BadEntry as error:
            raise InputError(
                f"the chat template in {hf_dir} cannot be trained with: {error}; use another "
                f"template."
            ) from error
        return chat

    def encode(
        self, turns: Sequence[Turn], media_tokens: Sequence[int], tools: str = "", *,
        pixels: Pixels | None = None, media_names: Sequence[str] = (),
        media_times: Sequence[Sequence[float]] = (), answers_alone: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of one conversation.

        Trained are, unless `TrainedText` says otherwise, the assistant's turns, up to and with
        their end token, not the newline after it. Answers that say they are not trained never are,
        nor what a tool gives, nor a placeholder of an image or video.

        Args:
            media_tokens: placeholders each image and video takes, in order.
            tools: a JSON list of the functions that may be called.
            pixels: see `render`; needed where the family's form of objects counts pixels.
            media_names: see `Prompt.encode`; no template writes them.
            media_times: see `Processor.times`, of each image and video.
            answers_alone: what is trained beside answers has no label, as greedy decoding is not to
                give it.

        Returns:
            tokens int64 [L], labels int64 [L]: the target of each position (the next token), or
            IGNORE.

        Raises:
            BadEntry: no turn to train, an empty answer, placeholders unlike the media, the
                template refuses it or writes no tools, or the model has no form for its objects.
        """
        trained_turns(turns, self.trained)
        turns = self.rendered(turns, pixels)
        with_prompts = self.trained.train_on_prompt and not answers_alone
        text, spans = self.template.write(turns, tools, with_prompts=with_prompts)
        kinds = [kind for turn in turns for kind in turn.media]
        if any(media_times):
            text, spans, kinds, media_tokens = self._timed(
                text, spans, kinds, media_tokens, media_times
            )
        tokens, labels = self._tokens(text, spans, others=with_prompts)
        self._fill_places(kinds, media_tokens, tokens, labels)
        labels = [*labels[1:], IGNORE]
        # By way of numpy: torch looks at every number of a list, several times.
        return tuple(torch.from_numpy(np.array(one, np.int64)) for one in (tokens, labels))

    def encode_prompt(
        self, turns: Sequence[Turn], media_tokens: Sequence[int], tools: str = "", *,
        thinking: bool | None = None, pixels: Pixels | None = None,
        media_names: Sequence[str] = (), media_times: Sequence[Sequence[float]] = (),
    ) -> torch.Tensor:
        """Tokens that the answer to the last turn follows, int64 [L]: see `encode`.

        Args:
            thinking: see `ChatTemplate.prompt`.

        Raises:
            BadEntry: placeholders unlike the media, the template refuses it or writes no tools, or
                the model has no form for its objects.
        """
        turns = self.rendered(turns, pixels)
        text = self.template.prompt(turns, tools, thinking=thinking)
        kinds = [kind for turn in turns for kind in turn.media]
        if any(media_times):
            text, _, kinds, media_tokens = self._timed(text, (), kinds, media_tokens, media_times)
        tokens, labels = self._tokens(text)
        self._fill_places(kinds, media_tokens, tokens, labels)
        return torch.tensor(tokens)

    def rendered(self, turns: Sequence[Turn], pixels: Pixels | None = None) -> Sequence[Turn]:
        """The turns with their objects as this model writes them. Raises BadEntry: see `render`."""
        return render(turns, self.tokens.grounding, self._own_tokens.__contains__, pixels)

    def _tokens(
        self, text: str, spans: Sequence[Span] = (), *, others: bool = False
    ) -> tuple[list[int], list[int]]:
        """Tokens of a text, and what is trained of them: the spans', or all `others`."""
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        tokens = encoded.ids
        ignored = [IGNORE] * len(tokens)
        elsewhere, inside = (tokens, ignored) if others else (ignored, tokens)
        labels = list(elsewhere)
        if spans:
            begins, ends = zip(*encoded.offsets, strict=True) if tokens else ((), ())
            for begin, end in spans:
                # A token across the edge of an answer is part of the prompt.
                first, last = bisect_left(begins, begin), bisect_right(ends, end)
                labels[first:last] = inside[first:last]
        return tokens, labels

    def _timed(
        self, text: str, spans: Sequence[Span], kinds: list[str], counts: Sequence[int],
        times: Sequence[Sequence[float]],
    ) -> tuple[str, Sequence[Span], list[str], list[int]]:
        """A template's text, and what is where in it, with a placeholder for every frame of a
        video, behind its time.

        Raises:
            BadEntry: the text has not as many placeholders as there are videos.
        """
        mark = "".join(self.tokenizer.convert_ids_to_tokens(
            [self.tokens.vision_start, self.tokens.video, self.tokens.vision_end]
        ))
        _check_marks(VIDEO, text.count(mark), kinds)
        videos = ["".join(f"{self.tokens.timestamp.format(one)}{mark}" for one in shown)
                  for shown in times if shown]
        text, spans = replaced(text, mark, videos, spans)
        runs = [max(1, len(shown)) for shown in times]
        each = list(zip(kinds, counts, runs, strict=True))
        return (text, spans, [kind for kind, _, run in each for _ in range(run)],
                [count // run for _, count, run in each for _ in range(run)])

    def _fill_places(self, kinds: list[str], counts: Sequence[int], tokens: list[int],
                     labels: list[int]) -> None:
        """Repeat every placeholder as often as its image, video or frame has tokens."""
        for kind in MEDIA_KINDS:
            # What a person wrote may hold the tokenizer's own mark.
            marks = tokens.count(self._placeholders[kind]) if kind in self._placeholders else 0
            _check_marks(kind, marks, kinds)
        if len(kinds) != len(counts):
            raise BadEntry(
                "mark count", f"it has {len(kinds)} marks for {len(counts)} images and videos"
            )
        at = 0
        for kind, count in zip(kinds, counts, strict=True):
            placeholder = self._placeholders[kind]
            at = tokens.index(placeholder, at)
            tokens[at : at + 1] = [placeholder] * count
            labels[at : at + 1] = [IGNORE] * count
            at += count


def replaced(
    text: str, mark: str, by: Sequence[str], spans: Sequence[Span]
) -> tuple[str, list[Span]]:
    """A text with each of its marks replaced by the next of `by`; where its spans are then."""
    first, *others = text.split(mark)
    written, grown, end = [first], [], len(first)  # ends of marks, and how much longer it gets
    for new, other in zip(by, others, strict=True):
        end += len(mark)
        grown.append((end, len(new) - len(mark)))
        written += new, other
        end += len(other)

    def moved(place: int) -> int:
        return place + sum(more for end, more in grown if end <= place)

    return "".join(written), [(moved(begin), moved(end)) for begin, end in spans]


def _check_marks(kind: str, marks: int, kinds: Sequence[str]) -> None:
    """Raises BadEntry: the text has not as many marks of a kind as there are media of it."""
    if marks != kinds.count(kind):
        raise BadEntry(
            "mark count", f"its text has {marks} {kind} marks for {kinds.count(kind)} {kind}s"
        )


def _first_line(error: Exception) -> str:
    words = str(error).strip().splitlines() or [type(error).__name__]
    return shown(words[0].rstrip("."))
