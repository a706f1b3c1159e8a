"""The vision towers of Qwen2-VL and Qwen2.5-VL as a native Megatron-Core TransformerBlock.

Letters: P patches of all images, D vision width, C channels x frames x height x width of a patch,
M merged patches (P / merge^2), E language width.

Every frame of every image is one attention segment. Positions are two-dimensional: half of each
head turns with the patch's row, half with its column. Patches arrive in merge-block order, as the
image processor writes them, so consecutive merge^2 patches form one language token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from megatron.core import parallel_state
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.nn import functional as F

from megatron_vl.models.common.core_attention import SegmentParams
from megatron_vl.models.common.layer_spec import LayerKind, block_spec, projector_submodules
from megatron_vl.models.common.media_share import make_whole, mark_copies
from megatron_vl.models.common.transformer_config import (
    ModelOptions,
    TowerConfig,
    encoder_config,
    encoder_projector_config,
)
from megatron_vl.models.spec import ModelSpec
from megatron_vl.models.tower_spec import VisionSpec
from megatron_vl.ops.fusion import choose_kernel
from megatron_vl.ops.rotary import Rotary
from megatron_vl.ops.segments import Segments
from megatron_vl.parallel import VISION, Layout, StageSplit


def tower_config(
    spec: ModelSpec, layout: Layout, split: StageSplit, options: ModelOptions
) -> TowerConfig:
    """The layers' configuration."""
    return encoder_config(
        VISION, spec, layout, split, options,
        ffn_hidden_size=spec.vision.stored_ffn_size, normalization=spec.vision.normalization,
    )


def merger_config(spec: ModelSpec, layout: Layout, options: ModelOptions) -> TowerConfig:
    """The merger's MLP: merged patches -> 4x vision width -> language width, with GELU."""
    return encoder_projector_config(
        spec, layout, options,
        num_attention_heads=spec.vision.num_heads,
        hidden_size=spec.vision.out_hidden_size,
        ffn_hidden_size=spec.vision.merged_size,
        kv_channels=spec.vision.head_dim,
        add_bias_linear=True,
        activation_func=choose_kernel("gelu", options.fused_ops).function,
    )


class PatchProjection(torch.nn.Conv3d):
    """A convolution whose kernel equals its stride: one matrix product over flattened patches.

    A Conv3d so that the weight has the published name and shape.
    """

    def forward(self, patches_PC: torch.Tensor) -> torch.Tensor:
        return F.linear(patches_PC.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(torch.nn.Module):
    """Patches to the tower's width."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, init_method, *, bias: bool = False):
        super().__init__()
        kernel = (spec.temporal_patch_size, spec.patch_size, spec.patch_size)
        self.proj = PatchProjection(
            spec.in_channels, spec.hidden_size, kernel, stride=kernel, bias=bias, dtype=dtype
        )
        init_method(self.proj.weight)
        if bias:
            torch.nn.init.zeros_(self.proj.bias)

    def forward(self, patches_PC: torch.Tensor) -> torch.Tensor:
        return self.proj(patches_PC)


class PatchTower(MegatronModule):
    """Patches in, language-model embeddings out; or one chunk's layers of that.

    Args:
        kinds: the layers of this chunk.
        first: whether patches enter here; else hidden states do.
        last: whether it ends here, with norm and merger; else hidden states leave.
        groups: the process groups of its layers; without any tensor parallelism in them although
            the model has some, the tower is a whole one on each of those ranks.
        vp_stage: this chunk's number on its stage, None without virtual stages.

    Raises:
        ValueError: patches that do not match the grids.
    """

    def __init__(
        self, spec: VisionSpec, config, merger_config, *, kinds: Sequence[LayerKind], groups,
        first: bool = True, last: bool = True, vp_stage: int | None = None,
    ):
        super().__init__(config=config)
        self.spec, self.first, self.last = spec, first, last
        self.is_whole = groups.tp.size() < parallel_state.get_tensor_model_parallel_world_size()
        if first:
            self.patch_embed = PatchEmbed(spec, config.params_dtype, config.init_method)
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(kinds),
            pre_process=True,
            post_process=last,
            vp_stage=vp_stage,
            pg_collection=groups,
        )
        if last:
            self.projection = MultimodalProjector(
                merger_config, projector_submodules(), "mlp", spec.merged_size, tp_group=groups.tp
            )
        if self.is_whole:
            make_whole(self)
        self._clear_padding(groups.tp)

    @torch.no_grad()
    def _clear_padding(self, tp) -> None:
        """Zero what fills the MLP up. It stays so: it gets no gradient, and decays to zero."""
        for layer in self.decoder.layers:
            fc1, fc2 = layer.mlp.linear_fc1, layer.mlp.linear_fc2
            part = fc2.weight.shape[1]
            held = min(max(self.spec.ffn_hidden_size - tp.rank() * part, 0), part)
            for first in (fc1.weight, fc1.bias) if held < part else ():
                first.unflatten(0, (-1, part))[:, held:] = 0  # of gate and up
            fc2.weight[:, held:] = 0

    def sharded_state_dict(self, *args, **options) -> dict:
        """Megatron-Core's, which knows nothing of a whole tower on tensor-parallel ranks."""
        state = super().sharded_state_dict(*args, **options)
        return mark_copies(state) if self.is_whole else state

    def forward(self, patches_PC: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Encode images, or run this chunk's part of it.

        Args:
            patches_PC: float [P, C], in merge-block order; hidden states [P, D] if not `first`.
            grid_thw: int64 [images, 3], frames, rows and columns of patches.

        Returns:
            [M, E], image after image; hidden states [P, D] if not `last`.
        """
        grids = [tuple(grid) for grid in grid_thw.tolist()]
        if sum(t * h * w for t, h, w in grids) != patches_PC.shape[0]:
            raise ValueError(f"{patches_PC.shape[0]} patches do not fill the grids {grids}")
        device, order = patches_PC.device, self.order(grids)
        hidden_PD = self.patch_embed(patches_PC) if self.first else patches_PC
        if self.first and order is not None:
            hidden_PD = _reordered(hidden_PD, order.patches.to(device, non_blocking=True))
        hidden_P1D = self.decoder(
            hidden_states=hidden_PD.unsqueeze(1),
            attention_mask=None,
            packed_seq_params=SegmentParams(
                segments=Segments([h * w for t, h, w in grids for _ in range(t)], device=device),
                windows=None if order is None else Segments(order.windows, device=device),
                rotary=patch_rotary(grids, self.spec, self.config.params_dtype, device, order),
            ),
        )
        if not self.last:
            return hidden_P1D.squeeze(1)
        merged = hidden_P1D.reshape(-1, 1, self.spec.merged_size)
        out_ME = self.projection(merged).squeeze(1)
        if order is None:
            return out_ME
        return _reordered(out_ME, order.back.to(device, non_blocking=True))

    def order(self, grids: list[tuple[int, int, int]]) -> Order | None:
        """In which layers see the patches of these grids; None: as they come."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """An order of patches in which every window is a run. On the host."""

    patches: torch.Tensor  # int64 [P], for each place the patch that comes there
    back: torch.Tensor  # int64 [M], for each merged patch the place where it is
    windows: list[int]  # patches of each window


def _reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of `x` in this order, a permutation."""
    return x.index_select(0, order)


def patch_rotary(
    grids: Sequence[tuple[int, int, int]], spec: VisionSpec, dtype: torch.dtype,
    device: torch.device, order: Order | None = None,
) -> Rotary:
    """Of the rows and columns of patches, as they come or in an order."""
    positions_P2 = torch.cat([grid_positions(grid, spec.spatial_merge_size) for grid in grids])
    if order is not None:
        positions_P2 = positions_P2[order.patches]
    angles = patch_angles(positions_P2.to(device, non_blocking=True), spec.head_dim)
    return Rotary.of(angles[:, None, None, :], dtype)


@lru_cache(maxsize=128)
def grid_positions(grid: tuple[int, int, int], merge: int) -> torch.Tensor:
    """Row and column of every patch of one image, int32 [t*h*w, 2], in merge-block order."""
    t, h, w = grid
    rows = torch.arange(h, dtype=torch.int32)[:, None].expand(h, w)
    columns = torch.arange(w, dtype=torch.int32)[None, :].expand(h, w)

    def merge_blocks(x):
        x = x.reshape(h // merge, merge, w // merge, merge)
        return x.permute(0, 2, 1, 3).flatten()

    return torch.stack([merge_blocks(rows), merge_blocks(columns)], dim=-1).repeat(t, 1)


def patch_angles(positions_P2: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotary angles float32 [P, head_dim / 2].

    Angle j of the first half is row * 10000^(-4j/head_dim), of the second half the same with the
    column (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    exponents = torch.arange(
        0, head_dim // 2, 2, dtype=torch.float32, device=positions_P2.device
    ) / (head_dim // 2)
    return (positions_P2.float()[:, :, None] * (1.0 / 10000.0**exponents)).flatten(1)
