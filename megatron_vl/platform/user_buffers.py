"""TransformerEngine's user buffers, by which its layers send while they compute.

Never run on a GPU by this project.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_vl.errors import InputError


def initialize_user_buffers(
    shape: tuple[int, int], *, tp: int, dtype: torch.dtype, fp8: bool,
    settings: Mapping[str, Mapping] | None, bootstrap_backend: str,
) -> None:
    """Make the buffers of every product of a layer; all ranks of the job at once, before a model.

    Args:
        shape: tokens and width of what enters a layer, whole over the `tp` ranks.
        dtype: of what is sent.
        fp8: layers compute in 8 bits, in which they gather.
        settings: TransformerEngine's own, by the product's name; None: its defaults.

    Raises:
        InputError: this machine cannot have them, as TransformerEngine says.
    """
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    try:
        base.initialize_ub(
            shape=list(shape), tp_size=tp, dtype=dtype,
            quantization_modes=[modes.FP8 if fp8 else modes.NONE],
            ub_cfgs=None if settings is None else dict(settings),
            bootstrap_backend=bootstrap_backend,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"tp-comm-overlap cannot have TransformerEngine's user buffers here ({error}); change "
            f"what it names, or leave tp-comm-overlap out."
        ) from error
