"""A model that answers: training's own tokens, pixels and positions, transformers' `generate`.

S tokens of a sample, P patches, D numbers a patch, B samples at once.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from megatron_vl.data.conversation import BadEntry, Turn
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.encode.model_files import check_model_files
from megatron_vl.errors import Bounds, InputError, check_bounds
from megatron_vl.models.family import Grid
from megatron_vl.models.media import MediaLimits, StoredMedia
from megatron_vl.models.registry import Family, family, load_spec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.platform import select_platform
from megatron_vl.weights.convert import open_source

_BOUNDS = {
    "max_new_tokens": Bounds(least=1, most=2**20),
    "temperature": Bounds(least=0, most=100),
    "top_p": Bounds(above=0, most=1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        InputError: numbers that cannot be used, or not together.
    """

    max_new_tokens: int = 512  # of an answer
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float | None = None  # of the likeliest tokens with this probability together; None: all

    def __post_init__(self) -> None:
        check_bounds(self, _BOUNDS)
        if self.top_p is not None and not self.temperature:
            raise InputError("--top-p is for answers drawn at random; give --temperature above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What an answer follows: `megatron_vl.models.family.Asked`, its pixels not yet decoded."""

    tokens: torch.Tensor  # int64 [S]
    grids: tuple[Grid, ...]
    positions: torch.Tensor  # int64 [axes, S]
    media: tuple[StoredMedia, ...]
    read: Callable[[str], bytes]  # a file of `media` by its name there
    patches: torch.Tensor | None = None  # float32 [P, D]


class Answerer:
    """A published directory's model on this machine's device."""

    def __init__(
        self, model, encoder: ModelEncoder, *, spec: ModelSpec, family: Family, device: torch.device
    ):
        """`model` is of `Family.generator`; `from_hf_dir` loads it."""
        self.model, self.encoder = model, encoder
        self.spec, self.family, self.device = spec, family, device
        published = model.generation_config
        ends = published.eos_token_id  # None, a token, or several
        self.end_ids = encoder.chat.end_ids | {
            *(ends if isinstance(ends, list) else [ends])
        } - {None}
        # `generate` would take these in place of what `_settings` leaves open.
        for name in ("do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens"):
            setattr(published, name, None)

    @classmethod
    def from_hf_dir(
        cls, hf_dir: Path, *, dtype: str | None = None, limits: MediaLimits | None = None
    ) -> Answerer:
        """Read the files of a Hugging Face directory.

        Args:
            dtype: of the weights; None: float32 in host memory, the published one elsewhere.
            limits: of images and videos; None: the model's own.

        Raises:
            InputError: files that are missing or cannot be used, or weights that are not all there.
        """
        spec = load_spec(hf_dir)
        of = family(spec.model_type)
        check_model_files(hf_dir, spec, of)
        open_source(hf_dir, of.weight_map(spec))  # transformers would draw a missing one at random
        encoder = ModelEncoder.from_hf_dir(hf_dir, spec, of, limits=limits)
        platform = select_platform()
        device = platform.device(0)
        dtype = dtype or ("float32" if platform.in_host_memory else spec.dtype)
        logging.disable_progress_bar()
        model = of.generator(hf_dir, dtype=getattr(torch, dtype)).to(device)
        return cls(model, encoder, spec=spec, family=of, device=device)

    def check_thinking(self, thinking: bool | None) -> None:
        """Raises InputError: the model's answers are never preceded by reasoning."""
        if thinking is not None and not self.encoder.chat.thinks:
            raise InputError(
                f"--{'' if thinking else 'no-'}thinking is for models whose chat template can ask "
                f"for reasoning, which this {self.spec.model_type}'s cannot; leave it out."
            )

    def seed(self, seed: int) -> None:
        """Begin to draw anew. Raises InputError: a number that torch takes for no seed."""
        Bounds(least=0, most=2**63 - 1).check("--seed", seed)
        torch.manual_seed(seed)

    def question(
        self, turns: Sequence[Turn], media: Sequence[StoredMedia], read: Callable[[str], bytes],
        tools: str = "", *, thinking: bool | None = None, max_new_tokens: int,
    ) -> Question:
        """The tokens of a conversation whose last turn is to be answered.

        Args:
            max_new_tokens: that must find room behind it.

        Raises:
            BadEntry: it cannot be asked, or is too long.
            BadMedia: an image or video that the model cannot take as it is.
        """
        tokens, grids = self.encoder.encode_prompt(turns, media, tools, thinking=thinking)
        most = self.spec.decoder.max_position_embeddings
        if len(tokens) + max_new_tokens > most:
            raise BadEntry(
                "too long",
                f"it has {len(tokens):,} tokens, which with an answer of {max_new_tokens:,} "
                f"(--max-new-tokens) are more than the {most:,} positions of the model",
            )
        positions = self.encoder.positions(tokens, grids, self.encoder.seconds(media))
        return Question(tokens=tokens, grids=grids, positions=positions, media=tuple(media),
                        read=read)

    def decoded(self, question: Question) -> Question:
        """The question with its pixels. Raises BadMedia: they cannot be read or decoded."""
        if not question.media:
            return question
        patches = torch.empty(sum(map(prod, question.grids)), self.encoder.processor.patch_dim)
        self.encoder.load(question.media, question.grids, question.read, patches)
        return replace(question, patches=patches)

    def answers(self, questions: Sequence[Question], sampling: Sampling) -> list[tuple[str, bool]]:
        """The answer to each question, and whether it came to its end.

        Args:
            questions: with their pixels.
        """
        generated = self._generate(questions, sampling)
        return [self.text_of(tokens) for tokens in generated.tolist()]

    def stream(self, question: Question, sampling: Sampling) -> Answer:
        """The answer to a question with its pixels, to be iterated over while it is made."""
        return Answer(self, question, sampling)

    def text_of(self, tokens: list[int]) -> tuple[str, bool]:
        """What generated tokens say up to their end, and whether they have one."""
        end = next((at for at, token in enumerate(tokens) if token in self.end_ids), None)
        return self.encoder.chat.decode(tokens[:end]), end is not None

    @torch.inference_mode()
    def _generate(self, questions: Sequence[Question], sampling: Sampling, **more) -> torch.Tensor:
        """New tokens, int64 [B, at most max_new_tokens]; behind an end token is padding."""
        questions = [self._on_device(one) for one in questions]
        length = max(len(one.tokens) for one in questions)

        def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
            return torch.stack([F.pad(row, (length - len(row), 0), value=value) for row in rows])

        tokens = [one.tokens for one in questions]
        ids = padded(tokens, self.encoder.chat.pad_token)
        generated = self.model.generate(
            input_ids=ids, attention_mask=padded([torch.ones_like(row) for row in tokens], 0),
            **self.family.generator_inputs(self.model, self.spec, questions, ids),
            generation_config=self._settings(sampling), **more,
        )
        return generated[:, length:].cpu()

    def _on_device(self, one: Question) -> Question:
        names = ("tokens", "positions", "patches")
        values = {name: getattr(one, name) for name in names}
        return replace(one, **{name: value.to(self.device) for name, value in values.items()
                               if value is not None})

    def _settings(self, sampling: Sampling):
        """The model's own, such as its repetition penalty, but for how a token is chosen."""
        settings = copy.deepcopy(self.model.generation_config)
        draws = sampling.temperature > 0
        settings.update(
            max_new_tokens=sampling.max_new_tokens, max_length=None, do_sample=draws,
            temperature=sampling.temperature if draws else None, top_k=0 if draws else None,
            top_p=(sampling.top_p or 1.0) if draws else None,
            eos_token_id=sorted(self.end_ids),
            pad_token_id=self.encoder.chat.pad_token,
        )
        return settings


class Answer:
    """One answer: an iterator over pieces of its text, which a thread makes meanwhile.

    To close it, or to leave it by an exception, ends the answer where it is.

    Attributes:
        text: of the pieces so far.
        is_whole: whether it came to its end; False while it is made, and if it is cut off.
    """

    def __init__(self, answerer: Answerer, question: Question, sampling: Sampling):
        self.text, self.is_whole = "", False
        self._pieces = self._iterate(answerer, question, sampling)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """End it; the thread ends with the token that it computes."""
        self._pieces.close()

    def _iterate(
        self, answerer: Answerer, question: Question, sampling: Sampling
    ) -> Iterator[str]:
        made: queue.SimpleQueue = queue.SimpleQueue()  # tokens; then an error, or None
        stop, tokens = threading.Event(), []

        def run() -> None:
            try:
                answerer._generate([question], sampling, streamer=_Tokens(made.put),
                                   stopping_criteria=[_Stopped(stop)])
            except BaseException as error:  # it is raised where the answer is read
                made.put(error)
            else:
                made.put(None)

        thread = threading.Thread(target=run, name="answer", daemon=True)
        thread.start()
        try:
            token = 0
            while token is not None:
                token = made.get()
                if isinstance(token, BaseException):
                    raise token
                if token is not None:
                    tokens.append(token)
                text, self.is_whole = answerer.text_of(tokens)
                if text.endswith("\ufffd") and token is not None:  # half a character
                    continue
                piece, self.text = text[len(self.text) :], text
                if piece:
                    yield piece
        finally:
            stop.set()
            thread.join()


class _Tokens(BaseStreamer):
    """Hands on new tokens one by one; the first call brings the prompt."""

    def __init__(self, hand_on: Callable[[int], None]):
        self.hand_on, self.is_prompt = hand_on, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            for token in value.flatten().tolist():
                self.hand_on(token)
        self.is_prompt = False

    def end(self) -> None:
        """The thread says so."""


class _Stopped(StoppingCriteria):
    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)
