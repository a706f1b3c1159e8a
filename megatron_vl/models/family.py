"""What a model's family gives to those who name none: protocols, without torch or Megatron-Core.

`megatron_vl.models.registry.Family` is every family's; a folder under `megatron_vl/models/` holds
what it calls. S tokens of a sample, P patches, D numbers a patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from megatron_vl.models.media import MediaLimits, StoredMedia
    from megatron_vl.models.spec import ModelSpec
    from megatron_vl.models.tiny import TinySizes

COPY_AGAIN = "copy it again from the model's Hugging Face repository"  # a file of it
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # what transformers makes one of
Span = tuple[int, int]  # the characters from one up to, and without, another
Grid = tuple[int, int, int]  # frames, rows and columns of patches before any are merged


class Positions(Protocol):
    """Rotary positions of one sample: `positions(tokens, grids)`."""

    @property
    def axes(self) -> int:
        """Position ids a token has: 3 of time, height and width, 1 of a text alone."""

    def __call__(
        self, tokens: torch.Tensor, grids: Sequence[Grid], seconds: Sequence[float] = ()
    ) -> torch.Tensor:
        """Position ids int64 [axes, S], from 0.

        Args:
            tokens: int64 [S], each image or video already as many placeholders as it has tokens.
            grids: one an image or video, in the order of their placeholders.
            seconds: see `Processor.seconds`, of each of them.

        Raises:
            ValueError: the placeholders do not match the grids.
        """


class Processor(Protocol):
    """Images and videos to grids, without a pixel, and to patches, of what data has decoded."""

    @property
    def patch_dim(self) -> int:
        """D."""

    @property
    def resizes(self) -> bool:
        """Whether limits say how large a medium is; else all are brought to one size."""

    def frames(self, media: StoredMedia) -> list[int]:
        """Frames that are taken, by their numbers from 0, which ascend; [0] of an image.

        Raises:
            BadMedia: a video has not the frames that its entry asks for.
        """

    def shape(self, media: StoredMedia) -> Grid:
        """The grid of its patches: P is their product.

        Raises:
            BadMedia: the family takes none of its sizes, or it has not what its entry asks for.
        """

    def pixels(self, media: StoredMedia) -> tuple[int, int]:
        """Width and height of an image, or of a video's frames, after resizing.

        Raises:
            BadMedia: as `shape`.
        """

    def num_tokens(self, grid: Grid) -> int:
        """Tokens that the decoder sees of an image or video with this grid."""

    def seconds(self, media: StoredMedia) -> float:
        """Of a video, from one frame of its grid to the next; 0 of an image."""

    def times(self, media: StoredMedia) -> Sequence[float]:
        """Of a video, the second at which each frame of its grid is shown, where the model reads
        it (`TokenIds.timestamp`); else none.

        Raises:
            BadMedia: as `frames`.
        """

    def load(
        self, media: StoredMedia, frames: Iterable[Image.Image], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Patches, float32 [P, D].

        Args:
            frames: those of `self.frames(media)` as upright RGB images, taken one by one.
            out: where to write the patches.

        Raises:
            BadMedia: a frame is not of the size it was prepared with; and what `frames` raises.
        """


class SaidPart(Protocol):
    """A stretch of one turn: text, or the place of one image or video."""

    text: str | None
    media: str | None  # the kind


class Said(Protocol):
    """A turn of a conversation."""

    role: str
    parts: Sequence[SaidPart]


class TemplateWriter(Protocol):
    """What one chat template writes of turns without tools, faster than it is rendered."""

    def __call__(self, turns: Sequence[Said]) -> tuple[str, dict[int, Span]]:
        """The text, and where every answer is in it, by the number of its turn.

        An answer begins where the template asks for one, and ends with its end token.
        """


class Prompt(Protocol):
    """A form of conversations that is the family's own: tokens, and what is trained of them."""

    @property
    def pad_token(self) -> int:
        """What fills a row's tail."""

    @property
    def special(self) -> frozenset[int]:
        """Tokens that are marks and no text."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""

    def encode(
        self, turns: Sequence[Said], trained: Sequence[bool], media_tokens: Sequence[int] = (),
        media_names: Sequence[str] = (), *, answers_alone: bool = False,
    ) -> tuple[list[int], list[int | None]]:
        """Tokens and labels of one conversation.

        A position's label is what the position before it is to predict, None where that is not
        trained. It need not be the position's token.

        Args:
            turns: of system, user and assistant.
            trained: of each turn, whether its text is; of a trained answer its end is too.
            media_tokens: places that each image and video takes, in order.
            media_names: their paths as the entry has them, else their files' names in the shard.
            answers_alone: labels are those that greedy decoding is to give: of trained answers and
                their ends.

        Raises:
            ValueError: a turn holds one of the marks; in one phrase, which turn and mark.
        """

    def encode_prompt(
        self, turns: Sequence[Said], media_tokens: Sequence[int] = (),
        media_names: Sequence[str] = (),
    ) -> list[int]:
        """Tokens that the answer to the last turn follows, as `encode` has them before it.

        Raises:
            ValueError: see `encode`.
        """

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, marks as they are written."""


class Asked(Protocol):
    """One sample that is to be answered: what an answer follows."""

    tokens: torch.Tensor  # int64 [S]
    grids: Sequence[Grid]  # of its images and videos
    patches: torch.Tensor | None  # float32 [P, D] of them all; None without any
    positions: torch.Tensor  # int64 [axes, S]


class Family(Protocol):
    """A family as data sees it."""

    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the files in the model's directory that text is encoded with."""

    def prompt(self, hf_dir: Path, spec: ModelSpec) -> Prompt | None:
        """Of a Hugging Face directory; None: its chat template makes the text.

        Raises:
            InputError: the tokenizer's files cannot be used.
        """

    def processor(
        self, hf_dir: Path, spec: ModelSpec, limits: MediaLimits | None = None
    ) -> Processor | None:
        """The media side of a Hugging Face directory; None of a model without vision.

        Raises:
            InputError: its settings of images or videos cannot be used, or not with `limits`.
        """

    def missing_media_files(self, hf_dir: Path, spec: ModelSpec) -> list[str]:
        """Names of the files that `processor` needs and the directory lacks; without torch."""

    def check_media_files(self, hf_dir: Path, spec: ModelSpec) -> None:
        """Looks at those files, as far as it can be done without torch.

        Raises:
            InputError: one is missing, or cannot be used.
        """

    def positions(self, spec: ModelSpec, video_positions: str = "published") -> Positions:
        """The positions of this model's samples.

        Args:
            video_positions: of text after a video; what `MediaLimits.video_positions` says.
        """

    def template_writer(self, source: str) -> TemplateWriter | None:
        """Of a chat template of this source; None: the family knows none, and it is rendered."""

    def tiny(self, sizes: TinySizes) -> dict[str, object]:
        """The files of a tiny model's directory but for its weights: text, bytes, or what
        JSON holds.

        Raises:
            InputError: the family has no model of these sizes.
        """
