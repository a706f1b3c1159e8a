"""Qwen3-VL's vision tower: learned positions, and features of some layers (deepstack).

Letters: P patches of all images, C channels x frames x height x width of a patch, D vision width,
M merged patches (P / merge^2), E language width, K features.

What some layers put out is merged as the embeddings are, each by a merger of its own, and the first
language layers add it: arXiv 2511.21631, section 2.2. All mergers are where the tower ends; before,
chunks hand on what they keep beside their hidden states.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.module import MegatronModule

from megatron_vl.models.common.core_attention import SegmentParams
from megatron_vl.models.common.deepstack.block import KeepingBlock
from megatron_vl.models.common.deepstack.positional_table import PositionalTable
from megatron_vl.models.common.deepstack.vision_spec import DeepstackVisionSpec
from megatron_vl.models.common.layer_spec import LayerKind, block_spec, projector_submodules
from megatron_vl.models.common.media_share import make_whole, mark_copies
from megatron_vl.models.common.patch_tower import (
    PatchEmbed,
    merger_config,
    patch_rotary,
    tower_config,
)
from megatron_vl.models.common.transformer_config import ModelOptions
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.norm import LayerNorm
from megatron_vl.ops.segments import Segments
from megatron_vl.parallel import Layout, StageSplit

Grid = tuple[int, int, int]


def build_tower(
    spec: ModelSpec, layout: Layout, split: StageSplit, options: ModelOptions, *, layers: range,
    **chunk,
) -> DeepstackTower:
    """One chunk's `layers` of the tower; `chunk` as `DeepstackTower` has it."""
    return DeepstackTower(
        spec.vision, tower_config(spec, layout, split, options),
        merger_config(spec, layout, options), layers=layers, **chunk,
    )


class DeepstackTower(MegatronModule):
    """Patches in, embeddings and features out; or one chunk's layers of that.

    Args:
        layers: those of this chunk, by their numbers in the whole tower.
        first: whether patches enter here; else hidden states do.
        last: whether it ends here, with norm and mergers; else hidden states leave.
        groups: the process groups of its layers; without any tensor parallelism in them although
            the model has some, the tower is a whole one on each of those ranks.
        vp_stage: this chunk's number on its stage, None without virtual stages.
    """

    def __init__(
        self, spec: DeepstackVisionSpec, config, merger_config, *, layers: range, groups,
        first: bool = True, last: bool = True, vp_stage: int | None = None,
    ):
        super().__init__(config=config)
        self.spec, self.first, self.last = spec, first, last
        self.is_whole = groups.tp.size() < parallel_state.get_tensor_model_parallel_world_size()
        if first:
            dtype = config.params_dtype
            self.patch_embed = PatchEmbed(spec, dtype, config.init_method, bias=True)
            self.pos_embed = PositionalTable(spec.num_positions, spec.hidden_size, dtype=dtype)
            config.init_method(self.pos_embed.weight)
        self.decoder = KeepingBlock(
            config=config,
            spec=block_spec([LayerKind(causal=False)] * len(layers)),
            keeps=[layers.index(layer) for layer in spec.feature_layers if layer in layers],
            pre_process=True,
            post_process=last,
            vp_stage=vp_stage,
            pg_collection=groups,
        )
        if last:
            self.projection = _projector(spec, merger_config, groups.tp)
            self.deepstack = FeatureMergers(spec, merger_config, groups.tp)
        if self.is_whole:
            make_whole(self)

    def sharded_state_dict(self, *args, **options) -> dict:
        """Megatron-Core's, which knows nothing of a whole tower on tensor-parallel ranks."""
        state = super().sharded_state_dict(*args, **options)
        return mark_copies(state) if self.is_whole else state

    def forward(self, patches_PC: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Encode images, or run this chunk's part of it.

        Args:
            patches_PC: float [P, C], in merge-block order; if not `first` hidden states and what
                earlier layers keep, `spec.states`.
            grid_thw: int64 [images, 3], frames, rows and columns of patches.

        Returns:
            [M, (1 + K) E], image after image: of each token its embedding and its features, side by
            side. If not `last` the same as came in, with what these layers keep.

        Raises:
            ValueError: patches that do not match the grids.
        """
        grids = [tuple(grid) for grid in grid_thw.tolist()]
        if sum(t * h * w for t, h, w in grids) != patches_PC.shape[0]:
            raise ValueError(f"{patches_PC.shape[0]} patches do not fill the grids {grids}")
        if self.first:
            hidden_PD, kept = self._embedded(patches_PC, grids), []
        else:
            hidden_PD, *kept = patches_PC.split(self.spec.hidden_size, dim=1)
        device = patches_PC.device
        hidden_P1D, added = self.decoder(
            hidden_states=hidden_PD.unsqueeze(1),
            packed_seq_params=SegmentParams(
                segments=Segments([h * w for t, h, w in grids for _ in range(t)], device=device),
                rotary=patch_rotary(grids, self.spec, self.config.params_dtype, device),
            ),
        )
        hidden_PD, kept = hidden_P1D.squeeze(1), [*kept, *(one.squeeze(1) for one in added)]
        if not self.last:
            return torch.cat([hidden_PD, *kept], dim=1)
        merged = hidden_PD.reshape(-1, 1, self.spec.merged_size)
        return torch.cat([self.projection(merged).squeeze(1), *self.deepstack(kept)], dim=1)

    def _embedded(self, patches_PC: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        hidden_PD = self.patch_embed(patches_PC)
        positions_PD = self.pos_embed(grids, self.spec.spatial_merge_size)
        return hidden_PD + positions_PD.to(hidden_PD.dtype)


class FeatureMergers(MegatronModule):
    """A merger for each feature; they normalise merged patches, that of the embeddings patches."""

    def __init__(self, spec: DeepstackVisionSpec, config, tp):
        super().__init__(config=config)
        for number in range(spec.num_features):
            self.add_module(str(number), FeatureMerger(spec, config, tp))

    def forward(self, kept: list[torch.Tensor]) -> list[torch.Tensor]:
        """[P, D] of each feature's layer to [M, E]."""
        return [merger(hidden_PD)
                for merger, hidden_PD in zip(self.children(), kept, strict=True)]


class FeatureMerger(MegatronModule):
    def __init__(self, spec: DeepstackVisionSpec, config, tp):
        super().__init__(config=config)
        self.width = spec.merged_size
        self.norm = LayerNorm(self.width, eps=spec.norm_eps, dtype=config.params_dtype)
        self.projection = _projector(spec, config, tp)

    def forward(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        return self.projection(self.norm(hidden_PD.reshape(-1, 1, self.width))).squeeze(1)


def _projector(spec: DeepstackVisionSpec, config, tp) -> MultimodalProjector:
    return MultimodalProjector(config, projector_submodules(), "mlp", spec.merged_size, tp_group=tp)
