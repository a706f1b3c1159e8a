"""A model for Megatron-Core's pipeline: GPTModel, the vision tower before it, what joins them.

Letters: s row length, b rows, n trained positions, E language width, V vocabulary (per tp rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    PipelineOffloadManager,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional as F

from megatron_vl.models.common.context_parallel import RowShare
from megatron_vl.models.common.core_attention import SegmentParams
from megatron_vl.models.common.fusion import fuse, nothing_of
from megatron_vl.models.common.language_model import LanguageModel
from megatron_vl.models.common.layer_spec import LayerKind, block_spec
from megatron_vl.models.common.media_share import MediaShare, sum_whole, vision_groups
from megatron_vl.models.common.parts import MERGER, part_of
from megatron_vl.models.common.relay import EndOfGradient, Relay
from megatron_vl.models.common.routed_tokens import RoutedTokens
from megatron_vl.models.common.transformer_config import ModelOptions, language_config
from megatron_vl.models.spec import ModelSpec
from megatron_vl.models.tower_spec import TowerSpec
from megatron_vl.ops.rotary import Rotary, section_angles
from megatron_vl.ops.segments import Segments
from megatron_vl.parallel import LANGUAGE, VISION, Layout, StageSplit


class PipelineModel(MegatronModule):
    """One chunk of the model: its vision layers, its language layers, what joins the two.

    Without a vision tower the word embedding is on the first chunk. With one, pixels enter there
    and the tower ends where the word embedding is; from there on chunks hold language layers.
    Before, they pass vision hidden states on: see `Relay`.

    Args:
        spec: sizes, from the model's config.json.
        layout: ranks in every direction.
        split: layers of every stage and chunk.
        options: precision, attention backend, recompute, frozen parts.
        groups: the process groups of the vision tower: see `vision_groups`.
        build_tower: makes a chunk's part of the family's vision tower; None: the model has none.
        pre_process, post_process: whether this chunk is the first, the last.
        vp_stage: this chunk's number on its stage, None without virtual stages.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        split: StageSplit,
        options: ModelOptions,
        *,
        groups: ProcessGroupCollection,
        build_tower: Callable[..., MegatronModule] | None,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ):
        config = language_config(spec, layout, split, options)
        super().__init__(config=config)
        self.spec = spec
        self.pre_process, self.post_process = pre_process, post_process
        self.vp_stage = vp_stage
        self.spans = split.encoders_span
        stage, chunk = parallel_state.get_pipeline_model_parallel_rank(), vp_stage or 0
        self.embeds = (stage, chunk) == split.embedding_chunk
        self.vision_model = None
        # A chunk between two with vision layers, without any of its own, passes patches on.
        if build_tower is not None and (chunk, stage) <= split.embedding_chunk[::-1]:
            self.vision_layers = split.layers(VISION, stage, chunk)
            self.vision_model = build_tower(
                spec, layout, split, options, layers=self.vision_layers, groups=groups,
                first=pre_process, last=self.embeds,
                vp_stage=vp_stage if self.spans else None,
            )
            if pre_process and VISION in options.adapted:
                self.vision_model.decoder.register_forward_pre_hook(_reach, with_kwargs=True)
        self.language_model = None
        layers, decoder = split.layers(LANGUAGE, stage, chunk), spec.decoder
        # Each of the first language layers adds a feature: those left here, and those added here.
        features = 0 if spec.vision is None else spec.vision.num_features
        self.features = max(0, features - layers.start)
        self.features_added = min(self.features, len(layers))
        if self.embeds or self.vision_model is None:
            kind = LayerKind(
                causal=True, qk_norm=decoder.qk_norm,
                experts=None if decoder.experts is None else decoder.experts.count,
                quantized=options.quantize_base is not None,
            )
            self.language_model = LanguageModel(
                config=config,
                transformer_layer_spec=block_spec([kind] * len(layers)),
                vocab_size=spec.padded_vocab_size(layout.tp),
                max_sequence_length=spec.decoder.max_position_embeddings,
                pre_process=self.embeds,
                post_process=post_process,
                parallel_output=True,
                share_embeddings_and_output_weights=spec.decoder.tie_word_embeddings,
                position_embedding_type="none",  # core attention turns by `_rotary`
                # Scattered after the image embeddings are in: a shard must already hold them.
                scatter_embedding_sequence_parallel=False,
                vp_stage=vp_stage,
            )
            self.language_model.real_vocab_size = spec.decoder.vocab_size
            self.language_model.normalized_head = spec.decoder.normalized_head
        # Megatron-Core's gradient and pipeline code asks the outermost module.
        self.share_embeddings_and_output_weights = (
            spec.decoder.tie_word_embeddings and not self.spans
        )
        self.model_type = ModelType.encoder_or_decoder
        self.share = RowShare()
        self.relay = Relay(
            config, self.share.size, _smallest(spec.vision, split) if self.spans else None,
            num_features=spec.travelling_features(split),
        )
        self.media_share = MediaShare(layout)
        self._received: torch.Tensor | None = None
        self.adapted = frozenset(options.adapted)
        self.frozen = frozenset(options.frozen) - self.adapted  # nothing of them is trained
        for name, weight in self.named_parameters():
            if part_of(name) in options.frozen:  # others may be constants by themselves
                weight.requires_grad_(False)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The tied embedding of this chunk, None on a middle stage."""
        if self.language_model is None:
            return None
        return self.language_model.shared_embedding_or_output_weight()

    def tied_copy(self) -> torch.nn.Parameter | None:
        """The tied embedding of this chunk if another one holds it too and `sum_tied` ties them."""
        weight = self.shared_embedding_or_output_weight() if self.spans else None
        return weight if getattr(weight, "shared_embedding", False) else None

    def pipeline_length(self, row_length: int) -> int:
        """The `seq_length` that Megatron-Core's schedules need for rows of `row_length` tokens."""
        return self.relay.length(row_length)

    def set_input_tensor(self, input_tensor) -> None:
        """What the chunk before sent: hidden states [s, b, E], or vision's in such a tensor."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self._received = input_tensor

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Segments,
        *,
        pixel_patches: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        row_tokens: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run this chunk.

        Args:
            input_ids: int64 [b, s]; on the host, as all but positions and pixels is.
            position_ids: int64 [axes, b, s]; of three axes time, row and column.
            segments: of the b*s tokens, row after row.
            pixel_patches: float [P, C] on the first chunk, None without images.
            grid_thw: int64 [images, 3] in the order of their tokens, row after row.
            labels: int64 [b, s], already shifted; read only where `loss_mask` is not 0.
            loss_mask: float [b, s].
            row_tokens: [b], tokens of each row's samples; what is behind them is padding. Read in
                training alone.

        Returns:
            Hidden states [s, b, E] before the last chunk; on the last one the loss of every
            trained position [n], in evaluation `Scores`, or without labels the logits [b, s, V];
            under context parallelism those of this rank's part of s.

        Raises:
            ValueError: image tokens and image embeddings differ in number.
        """
        decoder_input, vision, mine = None, None, []
        received, self._received = self._received, None  # else it outlives its backward
        if self.vision_model is not None:
            mine = self._own_media(grid_thw)
            vision = self._see(pixel_patches, grid_thw, mine, received, position_ids.device)
            if not self.embeds:
                return self.relay.packed(vision, input_ids.shape)
        if self.embeds:
            decoder_input, features = self._embed(
                input_ids, vision, grid_thw, mine, position_ids.device
            )
            del vision  # as large as the features; the layers would run beside it
        else:
            received, features = self.relay.hidden(received, input_ids.shape[1], self.features)
            self.language_model.set_input_tensor(received)
        added = None
        if features is not None:
            parts = [self.features_added, self.features - self.features_added]
            added, features = features.split(parts)
        columns = self.share.columns(input_ids.shape[1])
        output = self.language_model(
            input_ids=input_ids[:, columns],
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=None if labels is None else labels[:, columns],
            loss_mask=None if loss_mask is None else loss_mask[:, columns],
            packed_seq_params=SegmentParams(
                segments=segments, rotary=self._rotary(position_ids[..., columns]),
                routed=self._routed(segments, row_tokens, loss_mask),
            ),
            extra_block_kwargs=None if added is None or not len(added) else {"context": added},
        )
        self.language_model.set_input_tensor(None)
        if self.post_process:
            return output
        return self.relay.packed(output, input_ids.shape, features)

    def _rotary(self, position_ids: torch.Tensor) -> Rotary:
        """Of int64 [axes, b, t]."""
        decoder = self.spec.decoder
        angles = section_angles(
            position_ids, base=decoder.rope_theta, head_dim=decoder.head_dim,
            sections=decoder.rope_sections, interleaved=decoder.rope_interleaved,
        )
        return Rotary.of(angles, self.config.params_dtype)

    def _routed(self, segments, row_tokens, loss_mask) -> RoutedTokens | None:
        """What the routers of experts are told of a microbatch that is trained."""
        if self.spec.decoder.experts is None or not self.training:
            return None
        return RoutedTokens.of(
            segments, row_tokens, share=self.share,
            sequence_parallel=self.config.sequence_parallel,
            weight=round(float(loss_mask.sum())),  # trained tokens, or samples
        )

    # ---- images -------------------------------------------------------------------------------

    def _see(
        self, pixel_patches, grid_thw, mine: list[int], received, device: torch.device
    ) -> torch.Tensor | None:
        """What this chunk's vision layers make of this rank's images; None if there are none.

        Ranks that share the rows have each their part of the microbatch's images. A rank without
        any sees a blank one in training, whose gradient is zero, so that every vision weight that
        is trained is touched: gradient reduction waits for all of them. Between chunks one always
        travels.
        """
        given = 0 if grid_thw is None else grid_thw.shape[0]
        if given and self.pre_process and pixel_patches is None:
            raise ValueError(f"{given} images or videos but no pixels")
        waited_for = self.training and not self.frozen >= {VISION, MERGER}
        if not given and not self.spans and not waited_for:
            return None
        vision = self.spec.vision
        grids = grid_thw[mine] if mine else torch.tensor([vision.smallest_grid])
        shape = vision.states(grids.tolist(), self.vision_layers.start)
        if not self.pre_process:
            hidden_PD = self.relay.states(received, shape)
            if VISION not in self.frozen:
                return self.vision_model(hidden_PD, grids)
            # No graph through layers that nothing is trained before.
            return EndOfGradient.apply(self.vision_model(hidden_PD.detach(), grids), received)
        if not mine:
            pixels = torch.zeros(
                shape[0], vision.patch_dim, dtype=self.config.params_dtype, device=device
            )
        elif len(mine) == given:
            pixels = pixel_patches
        else:
            media = pixel_patches.split(grid_thw.prod(-1).tolist())
            pixels = torch.cat([media[index] for index in mine])
        return self.vision_model(pixels, grids)

    def _own_media(self, grid_thw: torch.Tensor | None) -> list[int]:
        """Of the microbatch's images and videos those that this rank encodes."""
        if grid_thw is None:
            return []
        return self.media_share.mine(list(map(self.spec.vision.forward_flops, grid_thw.tolist())))

    def _embed(
        self, input_ids, vision_ME, grid_thw, mine: list[int], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The decoder's input: this rank's tokens [t, b, E], with the media's embeddings, and the
        features [K, t, b, E] that its layers add, zero where there is no image; None without any.
        """
        columns = self.share.columns(input_ids.shape[1])
        hidden_tbE = self.language_model.embedding(
            input_ids=input_ids[:, columns].to(device, non_blocking=True), position_ids=None
        )
        is_media = self.spec.tokens.places(input_ids)
        if grid_thw is not None and grid_thw.shape[0]:
            vision_ME = self._gathered(vision_ME, grid_thw, mine)
            if self.features:  # they stand beside the embeddings
                hidden_tbE = F.pad(hidden_tbE, (0, vision_ME.shape[1] - hidden_tbE.shape[2]))
            try:
                hidden_tbE = fuse(hidden_tbE, vision_ME, is_media, self.share)
            except ValueError as error:
                raise ValueError(f"{error}; grids {grid_thw.tolist()}") from error
        elif count := int(is_media.sum()):
            raise ValueError(f"{count} image tokens but no pixels")
        elif vision_ME is not None:
            hidden_tbE = hidden_tbE + nothing_of(vision_ME).to(hidden_tbE.dtype)
        if self.config.sequence_parallel:
            hidden_tbE = tensor_parallel.scatter_to_sequence_parallel_region(hidden_tbE)
        features = None
        if hidden_tbE.shape[2] > self.config.hidden_size:
            hidden_tbE, *several = hidden_tbE.split(self.config.hidden_size, dim=2)
            hidden_tbE, features = hidden_tbE.contiguous(), torch.stack(several)
        return _reached(hidden_tbE) if LANGUAGE in self.adapted else hidden_tbE, features

    def _gathered(self, vision_ME, grid_thw: torch.Tensor, mine: list[int]) -> torch.Tensor:
        """The embeddings of all the microbatch's media, from the ranks that encoded them."""
        tokens = list(map(self.spec.vision.num_tokens, grid_thw.tolist()))
        if not mine:
            vision_ME = vision_ME[:0] + nothing_of(vision_ME).to(vision_ME.dtype)
        return self.media_share.gather(vision_ME, mine, tokens)


def _reached(x: torch.Tensor) -> torch.Tensor:
    """What enters layers with adapters, reached by gradients though all before it is frozen:
    layers that are recomputed compute none otherwise, and no stage has an output without."""
    return x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x


def _reach(decoder: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same of a vision tower's layers. Pixels need no gradient for it."""
    return args, kwargs | {"hidden_states": _reached(kwargs["hidden_states"])}


def _smallest(vision: TowerSpec, split: StageSplit) -> tuple[int, int]:
    """Of the smallest image the tokens, and the numbers of what enters the tower's last chunk,
    which is the most that any hands on."""
    grid, layers = vision.smallest_grid, split.layers(VISION, *split.embedding_chunk)
    return vision.num_tokens(grid), math.prod(vision.states([grid], layers.start))


def build_chunks(
    spec: ModelSpec, layout: Layout, split: StageSplit, options: ModelOptions,
    build_tower: Callable[..., MegatronModule] | None,
) -> list[PipelineModel]:
    """This rank's chunks of the model, first to last; arguments as `PipelineModel`'s."""
    chunks, groups = [], vision_groups(layout)
    if options.offload_modules:
        PipelineOffloadManager.reset_instance()  # what it learnt is of another model
    for chunk in range(layout.vp):
        vp_stage = chunk if layout.vp > 1 else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        chunks.append(
            PipelineModel(
                spec, layout, split, options, groups=groups, build_tower=build_tower,
                pre_process=first, post_process=last, vp_stage=vp_stage,
            )
        )
    with torch.no_grad():
        sum_tied(chunks, "data")  # copies start at zero
    return chunks


def sum_tied(chunks: list[PipelineModel], attribute: str) -> None:
    """Adds up an attribute (`data`, `main_grad`) of the tied embedding's copies, in each of them.

    Of the copies that `PipelineModel.tied_copy` names: those Megatron-Core does not find.
    """
    copies = [copy for chunk in chunks if (copy := chunk.tied_copy()) is not None]
    copies = [copy for copy in copies if hasattr(copy, attribute)]  # frozen ones have no gradient
    if not copies:
        return
    first, *others = [getattr(copy, attribute) for copy in copies]
    for other in others:
        first.add_(other)
    group = parallel_state.get_embedding_group()
    if group.size() > 1:
        torch.distributed.all_reduce(first, group=group)
    for other in others:
        other.copy_(first)


def sum_vision(chunks: list[PipelineModel], attribute: str) -> None:
    """Adds up an attribute (`main_grad`) of vision towers that are whole on several ranks."""
    for chunk in chunks:
        if chunk.vision_model is not None and chunk.vision_model.is_whole:
            sum_whole(chunk.vision_model, attribute)
