"""Training a few numbers beside the weights of a model: low-rank adapters (LoRA)."""
