"""Flags of Baichuan2's own fine-tune.py that have defaults of their own."""

DEFAULTS = {
    "model_max_length": "512", "lora_r": "1", "lora_alpha": "32", "lora_dropout": "0.1",
    "lora_target_modules": "W_pack",
}
