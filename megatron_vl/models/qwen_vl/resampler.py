"""The resampler: learned queries attend to an image's patches (arXiv 2308.12966, section 2.1).

Letters: I images, P patches of one, D tower width, Q queries, E language width, N heads of this
tensor-parallel rank, H head dim.
"""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional as F

from megatron_vl.models.common.transformer_config import TowerConfig
from megatron_vl.models.qwen_vl.positional_table import drawn, resized, sine_table
from megatron_vl.models.qwen_vl.vision_spec import ResampledVisionSpec
from megatron_vl.ops.norm import LayerNorm

QUERY_STD = 0.02


class QKVProjection(ColumnParallelLinear):
    """Projections of three inputs, kept as one weight: q, k and v rows head by head."""

    def __init__(self, config: TowerConfig, heads: int, tp_group):
        width = config.hidden_size
        super().__init__(width, 3 * width, config=config, init_method=config.init_method,
                         tp_group=tp_group)
        self.heads = heads // tp_group.size()

    def forward(self, *inputs_SE: torch.Tensor) -> list[torch.Tensor]:
        """Of each input [..., S, E] its projection, [..., N, S, H]."""
        weight, bias = (one.unflatten(0, (self.heads, 3, -1)) for one in (self.weight, self.bias))
        made = []
        for number, x in enumerate(inputs_SE):
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
            x = F.linear(x, weight[:, number].flatten(0, 1), bias[:, number].flatten())
            made.append(x.unflatten(-1, (self.heads, -1)).transpose(-3, -2))
        return made


class Resampler(MegatronModule):
    """P patches of an image in, Q embeddings out. Keys have positions, values have none."""

    def __init__(
        self, spec: ResampledVisionSpec, config: TowerConfig, tp_group, trains_positions: bool
    ):
        super().__init__(config=config)
        width, dtype, eps = spec.out_hidden_size, config.params_dtype, spec.norm_eps
        self.side = spec.side
        self.query = drawn((spec.num_queries, width), QUERY_STD, dtype)
        table = sine_table(math.isqrt(spec.num_queries), width).to(dtype)
        self.pos_embed = torch.nn.Parameter(table, requires_grad=trains_positions)
        self.kv_proj = torch.nn.Identity()
        if spec.hidden_size != width:
            self.kv_proj = torch.nn.Linear(spec.hidden_size, width, bias=False, dtype=dtype)
            config.init_method(self.kv_proj.weight)
        self.ln_q = LayerNorm(width, eps=eps, dtype=dtype)
        self.ln_kv = LayerNorm(width, eps=eps, dtype=dtype)
        self.linear_qkv = QKVProjection(config, spec.resampler_heads, tp_group)
        self.linear_proj = RowParallelLinear(
            width, width, config=config, init_method=config.output_layer_init_method, bias=True,
            input_is_parallel=True, skip_bias_add=False, tp_group=tp_group,
        )

    def forward(self, patches_IPD: torch.Tensor) -> torch.Tensor:
        """[I, P, D] -> [I, Q, E]."""
        values_IPE = self.ln_kv(self.kv_proj(patches_IPD))
        keys_IPE = values_IPE + resized(self.pos_embed, self.side)
        queries_QE = self.ln_q(self.query) + self.pos_embed
        q_NQH, k_INPH, v_INPH = self.linear_qkv(queries_QE, keys_IPE, values_IPE)
        q_INQH = q_NQH.expand(len(patches_IPD), -1, -1, -1)
        out_INQH = F.scaled_dot_product_attention(q_INQH, k_INPH, v_INPH)
        return self.linear_proj(out_INQH.transpose(1, 2).flatten(2))[0]
