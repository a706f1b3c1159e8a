"""What models share that are Qwen3-VL but for their decoder's experts: tower, media, files."""
