"""Tiny models with the patches and the chat template of Qwen2-VL."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.errors import InputError
from megatron_vl.models.common.tiny_decoder import qwen2_decoder
from megatron_vl.models.common.tiny_tokenizer import qwen2_vocabulary
from megatron_vl.models.tiny import TinySizes

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
TEMPORAL, MERGE, CHANNELS = 2, 2, 3


def patch_model_files(
    sizes: TinySizes, *, model_type: str, architecture: str, vision: dict
) -> dict[str, object]:
    """The files of a model's directory, without weights.

    Args:
        vision: the keys of vision_config that the family's towers have of their own.

    Raises:
        InputError: an mrope section that does not fit the head, or sizes of a resampler.
    """
    vocabulary = qwen2_vocabulary(sizes, CHAT_TEMPLATE)
    ids, head_dim = vocabulary.ids, sizes.hidden_size // sizes.num_heads
    section = check_mrope_section(sizes.mrope_section or _mrope_section(head_dim), head_dim)
    return {
        "config.json": qwen2_decoder(sizes, vocabulary) | {
            "architectures": [architecture],
            "model_type": model_type,
            "pad_token_id": ids["<|endoftext|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "vision_token_id": ids["<|vision_pad|>"],
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "vision_config": {
                "depth": sizes.vision_depth,
                "num_heads": sizes.vision_heads,
                "in_chans": CHANNELS,
                "patch_size": sizes.patch_size,
                "spatial_merge_size": MERGE,
                "spatial_patch_size": sizes.patch_size,
                "temporal_patch_size": TEMPORAL,
                **vision,
            },
        },
        **vocabulary.files,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "preprocessor_config.json": preprocessor_config(sizes),
    }


def check_mrope_section(section: Sequence[int], head_dim: int) -> list[int]:
    """The section. Raises InputError: it does not fit the head."""
    if 2 * sum(section) != head_dim:
        raise InputError(
            f"--mrope-section {list(section)} sums to {sum(section)}; it must be half of the head "
            f"width {head_dim}."
        )
    return list(section)


def _mrope_section(head_dim: int) -> list[int]:
    """The published [16, 24, 24] of a head 128 wide, scaled."""
    half = head_dim // 2
    height = width = 3 * half // 8
    return [half - height - width, height, width]


def preprocessor_config(sizes: TinySizes) -> dict:
    """preprocessor_config.json of Qwen2-VL."""
    return {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "min_pixels": sizes.min_pixels,
        "max_pixels": sizes.max_pixels,
        "size": {"shortest_edge": sizes.min_pixels, "longest_edge": sizes.max_pixels},
        "patch_size": sizes.patch_size,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
