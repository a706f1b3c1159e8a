"""The same weights and samples through transformers and through Megatron-Core, in any layout.

Compared are the logits of every token, the mean loss of a trained token over the whole batch, and
the gradient of every parameter under its Hugging Face name.
"""

FP32 = 1e-5  # the largest relative difference that passes: sums run in another order
