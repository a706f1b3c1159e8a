"""A tiny Qwen3-VL, with experts or without."""

from __future__ import annotations

from megatron_vl.errors import InputError
from megatron_vl.models.common.tiny_qwen3 import qwen3_decoder
from megatron_vl.models.common.tiny_tokenizer import qwen2_vocabulary
from megatron_vl.models.common.tiny_vision import (
    CHANNELS,
    MERGE,
    TEMPORAL,
    check_mrope_section,
    preprocessor_config,
)
from megatron_vl.models.tiny import TinySizes

DEFAULTS = {"vision_depth": 4, "patch_size": 16}
POSITIONS = 8 * 8  # of the stored table
HALF = [0.5, 0.5, 0.5]
TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {%- if messages[0].content is string %}
            {{- messages[0].content }}
        {%- else %}
            {%- for content in messages[0].content %}
                {%- if 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' }}
        {%- if messages[0].content is string %}
            {{- messages[0].content }}
        {%- else %}
            {%- for content in messages[0].content %}
                {%- if 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set image_count = namespace(value=0) %}
{%- set video_count = namespace(value=0) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content in message.content %}
                {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                    {%- set image_count.value = image_count.value + 1 %}
                    {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                    <|vision_start|><|image_pad|><|vision_end|>
                {%- elif content.type == 'video' or 'video' in content %}
                    {%- set video_count.value = video_count.value + 1 %}
                    {%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}
                    <|vision_start|><|video_pad|><|vision_end|>
                {%- elif 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content_item in message.content %}
                {%- if 'text' in content_item %}
                    {{- content_item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and message.content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content in message.content %}
                {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                    {%- set image_count.value = image_count.value + 1 %}
                    {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                    <|vision_start|><|image_pad|><|vision_end|>
                {%- elif content.type == 'video' or 'video' in content %}
                    {%- set video_count.value = video_count.value + 1 %}
                    {%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}
                    <|vision_start|><|video_pad|><|vision_end|>
                {%- elif 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501 (as published with the models that do not think)


def deepstack_model_files(
    sizes: TinySizes, *, model_type: str, architecture: str, text: dict | None = None
) -> dict[str, object]:
    """The files of its directory, without weights.

    Args:
        text: keys of text_config beside those of a Qwen3.

    Raises:
        InputError: an mrope section that does not fit the head, or a tower of one layer.
    """
    vocabulary = qwen2_vocabulary(sizes, TEMPLATE)
    ids, decoder = vocabulary.ids, qwen3_decoder(sizes, vocabulary)
    half = decoder["head_dim"] // 2
    height = width = 5 * half // 16  # as in the published [24, 20, 20] of a head 128 wide
    section = check_mrope_section(
        sizes.mrope_section or (half - height - width, height, width), decoder["head_dim"]
    )
    pixels = preprocessor_config(sizes) | {
        "image_mean": HALF, "image_std": HALF, "processor_class": "Qwen3VLProcessor",
    }
    del pixels["image_processor_type"]
    rope_theta, dtype = decoder.pop("rope_theta"), decoder.pop("torch_dtype")
    for name in ("max_window_layers", "sliding_window", "use_sliding_window"):
        del decoder[name]
    return {
        "config.json": {
            "architectures": [architecture],
            "model_type": model_type,
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "tie_word_embeddings": decoder["tie_word_embeddings"],
            "text_config": decoder | (text or {}) | {
                "dtype": dtype,
                "model_type": f"{model_type}_text",
                "rope_theta": 5 * rope_theta,
                "rope_scaling": {
                    "mrope_interleaved": True, "mrope_section": section, "rope_type": "default",
                },
            },
            "vision_config": {
                "deepstack_visual_indexes": _feature_layers(sizes.vision_depth),
                "depth": sizes.vision_depth,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": sizes.vision_hidden_size,
                "in_channels": CHANNELS,
                "initializer_range": sizes.init_std,
                "intermediate_size": sizes.vision_hidden_size * sizes.vision_mlp_ratio,
                "model_type": model_type,
                "num_heads": sizes.vision_heads,
                "num_position_embeddings": POSITIONS,
                "out_hidden_size": sizes.hidden_size,
                "patch_size": sizes.patch_size,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": TEMPORAL,
            },
        },
        **vocabulary.files,
        "chat_template.json": {"chat_template": TEMPLATE},
        "preprocessor_config.json": pixels | {
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": pixels | {
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }


def _feature_layers(depth: int) -> list[int]:
    """After each quarter of the tower but the last, as in the published [5, 11, 17] of 24."""
    if depth == 1:
        raise InputError("--vision-depth is 1; a tower with features has two layers or more.")
    return sorted({depth * quarter // 4 - 1 for quarter in (1, 2, 3)} - {-1})
