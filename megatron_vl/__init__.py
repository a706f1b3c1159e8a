"""megatron_vl: train Qwen-family vision-language models on Megatron-Core, on any machine."""

__version__ = "0.1.0"
