"""Flags of Qwen-VL's own finetune.py that have defaults of their own."""

DEFAULTS = {
    "model_max_length": "8192", "fix_vit": "True", "lora_r": "64", "lora_alpha": "16",
    "lora_dropout": "0.05", "lora_target_modules": "c_attn attn.c_proj w1 w2",
}
