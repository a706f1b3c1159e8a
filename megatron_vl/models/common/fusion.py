"""Where media meet text: embeddings of images and videos at the places of their tokens.

Letters: s row length, b rows, t tokens of a rank's part of a row, M media tokens of a microbatch,
E language width.
"""

from __future__ import annotations

import torch

from megatron_vl.models.common.context_parallel import RowShare


def fuse(
    hidden_tbE: torch.Tensor, media_ME: torch.Tensor, is_media: torch.Tensor, share: RowShare
) -> torch.Tensor:
    """The word embeddings of a rank's tokens, with the media's in their places.

    Args:
        media_ME: of the whole microbatch, row after row.
        is_media: bool [b, s], on the host; M of them.
        share: this rank's part of a row.

    Raises:
        ValueError: tokens and embeddings differ in number.
    """
    count = int(is_media.sum())
    if media_ME.shape[0] != count:
        raise ValueError(f"{count} image tokens but {media_ME.shape[0]} image embeddings")
    columns = share.columns(is_media.shape[1])

    def on_device(x: torch.Tensor) -> torch.Tensor:
        return x.to(hidden_tbE.device, non_blocking=True)

    # Row after row, as images are counted: the place of each token among them.
    order = (is_media.flatten().cumsum(0) - 1).view_as(is_media)[:, columns].flatten()
    places = is_media[:, columns].flatten().nonzero().flatten()
    t, b, width = hidden_tbE.shape
    rows_btE = hidden_tbE.transpose(0, 1).reshape(b * t, width)
    if share.size > 1:
        media_ME = media_ME.index_select(0, on_device(order[places]))
    rows_btE = rows_btE.index_put((on_device(places),), media_ME.to(rows_btE.dtype))
    return rows_btE.reshape(b, t, width).transpose(0, 1).contiguous()


def nothing_of(blank_ME: torch.Tensor) -> torch.Tensor:
    """Zero, through which a blank image's weights get a gradient of zero; in 32 bits, for a 16-bit
    sum could overflow."""
    return 0.0 * blank_ME.float().sum()
