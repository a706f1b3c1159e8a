"""Qwen-VL's tower: a ViT as a Megatron-Core TransformerBlock, and the resampler behind it.

Letters: I images, P patches of one, C channels x height x width of a patch, D tower width, Q
queries, E language width.

Positions are absolute: stored tables of 16 x 16, resized bicubically to the patches of an image.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.nn import functional as F

from megatron_vl.models.common.core_attention import SegmentParams
from megatron_vl.models.common.layer_spec import LayerKind, block_spec
from megatron_vl.models.common.media_share import make_whole, mark_copies
from megatron_vl.models.common.transformer_config import (
    ModelOptions,
    TowerConfig,
    encoder_config,
    encoder_projector_config,
)
from megatron_vl.models.qwen_vl.positional_table import drawn, resized
from megatron_vl.models.qwen_vl.resampler import Resampler
from megatron_vl.models.qwen_vl.vision_spec import ResampledVisionSpec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.norm import LayerNorm
from megatron_vl.ops.segments import Segments
from megatron_vl.parallel import VISION, Layout, StageSplit


def build_tower(
    spec: ModelSpec, layout: Layout, split: StageSplit, options: ModelOptions, *, layers: range,
    **chunk,
) -> ResampledTower:
    """One chunk's `layers` of the tower; `chunk` as `ResampledTower` has it."""
    vision = spec.vision
    config = encoder_config(
        VISION, spec, layout, split, options,
        ffn_hidden_size=vision.ffn_hidden_size, normalization="LayerNorm",
    )
    resampler_config = encoder_projector_config(
        spec, layout, options,
        hidden_size=vision.out_hidden_size,
        num_attention_heads=vision.resampler_heads,
        layernorm_epsilon=vision.norm_eps,
    )
    return ResampledTower(
        vision, config, resampler_config, num_layers=len(layers),
        trains_positions=options.train_constants, **chunk,
    )


class PatchProjection(torch.nn.Conv2d):
    """A convolution whose kernel equals its stride: one matrix product over flattened patches."""

    def forward(self, patches_PC: torch.Tensor) -> torch.Tensor:
        return F.linear(patches_PC.to(self.weight.dtype), self.weight.flatten(1))


class ResampledTower(MegatronModule):
    """Patches in, language-model embeddings out; or one chunk's layers of that.

    Args:
        num_layers: of this chunk.
        trains_positions: whether the resampler's stored table is trained.
        first: whether patches enter here; else hidden states do.
        last: whether it ends here, with the resampler; else hidden states leave.
        groups: the process groups of its layers; without any tensor parallelism in them although
            the model has some, the tower is a whole one on each of those ranks.
        vp_stage: this chunk's number on its stage, None without virtual stages.
    """

    def __init__(
        self, spec: ResampledVisionSpec, config: TowerConfig, resampler_config: TowerConfig, *,
        num_layers: int, trains_positions: bool, groups, first: bool = True, last: bool = True,
        vp_stage: int | None = None,
    ):
        super().__init__(config=config)
        self.spec, self.first, self.last = spec, first, last
        self.is_whole = groups.tp.size() < parallel_state.get_tensor_model_parallel_world_size()
        width, dtype = spec.hidden_size, config.params_dtype
        if first:
            self.patch_embed = PatchProjection(
                spec.in_channels, width, spec.patch_size, stride=spec.patch_size, bias=False,
                dtype=dtype,
            )
            config.init_method(self.patch_embed.weight)
            self.positional_embedding = drawn((spec.num_positions, width), width**-0.5, dtype)
            self.pre_norm = LayerNorm(width, eps=spec.norm_eps, dtype=dtype)
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec([LayerKind(causal=False)] * num_layers),
            pre_process=True,
            post_process=last,
            post_layer_norm=False,  # the resampler has norms of its own
            vp_stage=vp_stage,
            pg_collection=groups,
        )
        if last:
            out = spec.out_hidden_size
            self.projection = Resampler(spec, resampler_config, groups.tp, trains_positions)
            self.post_norm = LayerNorm(out, eps=spec.norm_eps, dtype=dtype)
            self.proj = drawn((out, out), out**-0.5, dtype)
        if self.is_whole:
            make_whole(self)

    def sharded_state_dict(self, *args, **options) -> dict:
        """Megatron-Core's, which knows nothing of a whole tower on tensor-parallel ranks."""
        state = super().sharded_state_dict(*args, **options)
        return mark_copies(state) if self.is_whole else state

    def forward(self, patches_NC: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Encode images, or run this chunk's part of it.

        Args:
            patches_NC: float [I * P, C], image after image, row by row; hidden states [I * P, D]
                if not `first`.
            grid_thw: int64 [I, 3], each `spec.only_grid`.

        Returns:
            [I * Q, E], image after image; hidden states [I * P, D] if not `last`.

        Raises:
            ValueError: patches or grids that are not those of whole images.
        """
        grids, patches = [tuple(grid) for grid in grid_thw.tolist()], self.spec.side**2
        if set(grids) != {self.spec.only_grid} or len(patches_NC) != len(grids) * patches:
            raise ValueError(f"{len(patches_NC)} patches of the grids {grids}; each image has "
                             f"{self.spec.only_grid}")
        hidden_ND = self._embedded(patches_NC) if self.first else patches_NC
        hidden_N1D = self.decoder(
            hidden_states=hidden_ND.unsqueeze(1),
            attention_mask=None,
            packed_seq_params=SegmentParams(
                segments=Segments([patches] * len(grids), device=hidden_ND.device)
            ),
        )
        if not self.last:
            return hidden_N1D.squeeze(1)
        out_IQE = self.post_norm(self.projection(hidden_N1D.view(len(grids), patches, -1)))
        return (out_IQE @ self.proj).flatten(0, 1)

    def _embedded(self, patches_NC: torch.Tensor) -> torch.Tensor:
        hidden_ND = self.patch_embed(patches_NC)
        table_PD = resized(self.positional_embedding, self.spec.side)
        return self.pre_norm((hidden_ND.unflatten(0, (-1, len(table_PD))) + table_PD).flatten(0, 1))
