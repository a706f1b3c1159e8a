"""Marks that tests share."""

from __future__ import annotations

import pytest
import torch

# Without a GPU Triton interprets its kernels: no test that `-m gpu` is asked for.
ON_A_GPU = pytest.mark.gpu if torch.cuda.is_available() else lambda test: test
