"""A vision-language model for Megatron-Core's pipeline: vision tower, GPTModel, what joins them.

Letters: s row length, b rows, n trained positions, E language width, V vocabulary (per tp rank).
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional as F

from megatron_vl.models.common.core_attention import SegmentParams
from megatron_vl.models.common.layer_spec import block_spec
from megatron_vl.models.common.transformer_config import (
    ModelOptions,
    language_config,
    merger_config,
    vision_config,
)
from megatron_vl.models.common.vision_tower import VisionTower
from megatron_vl.models.spec import VLMSpec
from megatron_vl.ops.segments import Segments
from megatron_vl.parallel import Layout, StageSplit


class LanguageModel(GPTModel):
    """GPTModel whose training head works only where a token is trained.

    A visual instruction row trains its answers, often a twentieth of its tokens; logits over
    150,000 words for the others would be computed, stored and thrown away.
    """

    real_vocab_size: int  # without the rows that pad it for tensor parallelism

    def _postprocess(self, hidden_states, *args, labels=None, loss_mask=None, **kwargs):
        if not self.post_process or labels is None:
            return super()._postprocess(
                hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs
            )
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        # What ColumnParallelLinear does around its product: the gradient of the replicated input
        # is summed over tensor-parallel ranks (and scattered again under sequence parallelism).
        if self.config.sequence_parallel:
            hidden_sbE = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True
            )
        else:
            hidden_sbE = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
        trained = loss_mask.transpose(0, 1) > 0  # [s, b]
        hidden_nE = hidden_sbE[trained]
        logits_nV = F.linear(hidden_nE, weight).float()
        padding = self.vocab_size - self.real_vocab_size
        if padding and _is_last_tensor_parallel_rank():
            # Rows added so that TP divides the vocabulary are no words: none may be predicted.
            no_word = torch.arange(logits_nV.shape[1], device=logits_nV.device)
            no_word = no_word >= logits_nV.shape[1] - padding
            logits_nV = logits_nV.masked_fill(no_word, float("-inf"))
        loss_n = tensor_parallel.vocab_parallel_cross_entropy(
            logits_nV, labels.transpose(0, 1)[trained]
        )
        return loss_n * loss_mask.transpose(0, 1)[trained]


def _is_last_tensor_parallel_rank() -> bool:
    size = parallel_state.get_tensor_model_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_rank() == size - 1


class VisionLanguageModel(MegatronModule):
    """One chunk of the model: the vision tower on the first, language layers on all.

    Args:
        spec: sizes, from the model's config.json.
        layout: ranks in every direction.
        split: layers of every stage and chunk.
        options: precision, attention backend, recompute.
        pre_process, post_process: whether this chunk is the first, the last.
        vp_stage: this chunk's number on its stage, None without virtual stages.
    """

    def __init__(
        self,
        spec: VLMSpec,
        layout: Layout,
        split: StageSplit,
        options: ModelOptions,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ):
        config = language_config(spec, layout, split, options)
        super().__init__(config=config)
        self.spec = spec
        self.pre_process, self.post_process = pre_process, post_process
        self.vp_stage = vp_stage
        self.vision_model = None
        if pre_process:
            self.vision_model = VisionTower(
                spec.vision,
                vision_config(spec, layout, options),
                merger_config(spec, layout, options),
            )
        stage = parallel_state.get_pipeline_model_parallel_rank()
        layers = split.layers("llm", stage, vp_stage or 0)
        self.language_model = LanguageModel(
            config=config,
            transformer_layer_spec=block_spec(causal=True, num_layers=len(layers)),
            vocab_size=spec.padded_vocab_size(layout.tp),
            max_sequence_length=spec.decoder.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=spec.decoder.tie_word_embeddings,
            position_embedding_type="mrope",
            rotary_base=spec.decoder.rope_theta,
            # Scattered after the image embeddings are in: a shard must already hold them.
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.language_model.real_vocab_size = spec.decoder.vocab_size
        # Megatron-Core's gradient and pipeline code asks the outermost module.
        self.share_embeddings_and_output_weights = spec.decoder.tie_word_embeddings
        self.model_type = self.language_model.model_type

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The tied embedding of this chunk, None on a middle stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor) -> None:
        """Hidden states [s, b, E] from the stage before."""
        self.language_model.set_input_tensor(input_tensor)

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
    ) -> torch.Tensor:
        """Run this chunk.

        Args:
            input_ids: int64 [b, s].
            position_ids: int64 [3, b, s], temporal, row and column positions.
            segments: of the b*s tokens, row after row.
            pixel_patches: float [P, C] on the first chunk, None without images.
            grid_thw: int64 [images, 3] in the order of their tokens, row after row.
            labels: int64 [b, s], already shifted; read only where `loss_mask` is not 0.
            loss_mask: float [b, s].

        Returns:
            Hidden states [s, b, E] before the last chunk; on the last one the loss of every
            trained position [n], or without labels the logits [b, s, V].

        Raises:
            ValueError: image tokens and image embeddings differ in number.
        """
        decoder_input = None
        if self.pre_process:
            decoder_input = self._embed(input_ids, pixel_patches, grid_thw)
        return self.language_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=labels,
            loss_mask=loss_mask,
            packed_seq_params=SegmentParams(segments=segments),
        )

    def _embed(self, input_ids, pixel_patches, grid_thw) -> torch.Tensor:
        hidden_sbE = self.language_model.embedding(input_ids=input_ids, position_ids=None)
        is_vision = (input_ids == self.spec.tokens.image) | (input_ids == self.spec.tokens.video)
        places = is_vision.flatten().nonzero().flatten()  # row after row, as images are counted
        if pixel_patches is not None and pixel_patches.shape[0]:
            vision_ME = self.vision_model(pixel_patches, grid_thw)
            if vision_ME.shape[0] != places.shape[0]:
                raise ValueError(
                    f"{places.shape[0]} image tokens but {vision_ME.shape[0]} image embeddings; "
                    f"grids {grid_thw.tolist()}"
                )
            s, b, width = hidden_sbE.shape
            rows_bsE = hidden_sbE.transpose(0, 1).reshape(b * s, width)
            rows_bsE = rows_bsE.index_copy(0, places, vision_ME.to(rows_bsE.dtype))
            hidden_sbE = rows_bsE.reshape(b, s, width).transpose(0, 1).contiguous()
        elif places.numel():
            raise ValueError(f"{places.numel()} image tokens but no pixels")
        elif self.training:
            # A microbatch without images still touches every vision weight, with gradient zero:
            # gradient reduction waits for all of them.
            blank = self._blank_image(hidden_sbE.device).float()  # a 16-bit sum could overflow
            hidden_sbE = hidden_sbE + (0.0 * blank.sum()).to(hidden_sbE.dtype)
        if self.config.sequence_parallel:
            hidden_sbE = tensor_parallel.scatter_to_sequence_parallel_region(hidden_sbE)
        return hidden_sbE

    def _blank_image(self, device: torch.device) -> torch.Tensor:
        vision = self.spec.vision
        merge = vision.spatial_merge_size
        patches = torch.zeros(merge * merge, vision.patch_dim, device=device)
        return self.vision_model(patches, torch.tensor([[1, merge, merge]]))


def build_chunks(
    spec: VLMSpec, layout: Layout, split: StageSplit, options: ModelOptions
) -> list[VisionLanguageModel]:
    """This rank's chunks of the model, first to last."""
    chunks = []
    for chunk in range(layout.vp):
        vp_stage = chunk if layout.vp > 1 else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        chunks.append(
            VisionLanguageModel(
                spec, layout, split, options,
                pre_process=first, post_process=last, vp_stage=vp_stage,
            )
        )
    return chunks
