"""A conversation with a model: what was said, what was shown, and what comes next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_vl.ask.answerer import Answer, Answerer, Sampling
from megatron_vl.ask.media import stored_media
from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.raw.media import RawMedia
from megatron_vl.errors import InputError
from megatron_vl.models.media import BadMedia


class Dialogue:
    """Turns of a user and a model, encoded anew for every answer as training encodes them."""

    def __init__(
        self, answerer: Answerer, *, sampling: Sampling, system: str | None = None,
        thinking: bool | None = None,
    ):
        """`thinking`: see `ChatTokenizer.encode_prompt`."""
        answerer.check_thinking(thinking)
        self.answerer, self.sampling, self.thinking = answerer, sampling, thinking
        self.system = system
        self.is_whole = True  # whether the last answer came to its end
        self.reset()

    def reset(self) -> None:
        """Forget all that was said and shown, but for the system prompt."""
        self.turns = [] if self.system is None else [
            Turn(role="system", parts=(Part(text=self.system),))
        ]
        self.media: list[RawMedia] = []  # in the order of their places in the turns
        self.shown: list[RawMedia] = []  # to go with the next question

    def rewind(self, answers: int) -> None:
        """Forget all behind that many answers."""
        self.turns = self.turns[: (self.system is not None) + 2 * answers]
        parts = (part for turn in self.turns for part in turn.parts)
        self.media = self.media[: sum(part.media is not None for part in parts)]
        self.shown = []

    def show(self, kind: str, path: str | Path) -> None:
        """Let the next question show an image or a video.

        Raises:
            InputError: the model takes none, or it cannot be decoded.
        """
        taken = self.answerer.spec.tokens.media_kinds
        if kind not in taken:
            takes = " and ".join(f"{one}s" for one in taken) or "text alone"
            raise InputError(f"{path} is shown as {_a(kind)}, but this "
                             f"{self.answerer.spec.model_type} takes {takes}; leave it out.")
        path = Path(path).expanduser()
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise InputError(f"{path} {what}; give the file of {_a(kind)}.")
        media = RawMedia(kind=kind, files=(path,))
        try:
            stored_media([media])
        except BadMedia as error:
            raise InputError(f"{path} cannot be shown: {error}; give {_a(kind)}.") from error
        self.shown.append(media)

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a question in pieces, while it is made: see `Answer`.

        What was answered when it ends, or is ended, is part of the dialogue.

        Raises:
            InputError: it is too long, or cannot be asked otherwise.
        """
        parts = (*(Part(media=one.kind) for one in self.shown), Part(text=text))
        turns = [*self.turns, Turn(role="user", parts=parts)]
        media = [*self.media, *self.shown]
        try:
            stored, read = stored_media(media)
            question = self.answerer.decoded(self.answerer.question(
                turns, stored, read, thinking=self.thinking,
                max_new_tokens=self.sampling.max_new_tokens,
            ))
        except (BadEntry, BadMedia) as error:
            mend = "begin anew with /reset" if len(self.turns) > 1 else "ask it otherwise"
            if getattr(error, "reason", None) == "too long":
                mend += ", lower --max-new-tokens, or show less"
            raise InputError(f"the question cannot be asked: {error}; {mend}.") from error
        self.is_whole = False
        answer = self.answerer.stream(question, self.sampling)
        return self._said(answer, turns, media)

    def _said(self, answer: Answer, turns: list[Turn], media: list[RawMedia]) -> Iterator[str]:
        def note() -> None:
            said = Turn(role="assistant", parts=(Part(text=answer.text),))
            self.turns, self.media, self.shown = [*turns, said], media, []

        try:
            yield from answer
        except (GeneratorExit, KeyboardInterrupt):
            note()
            raise
        finally:
            answer.close()
        note()
        self.is_whole = answer.is_whole


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
