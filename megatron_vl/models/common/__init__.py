"""What the model families share; importing this starts neither Megatron-Core nor transformers."""
