"""The files beside config.json that Qwen3-VL's patches are made with: Qwen2-VL's.

But videos are sized by `size` alone, as transformers' `Qwen3VLVideoProcessor` does.
"""

from functools import partial

from megatron_vl.models.common import patch_media_files
from megatron_vl.models.common.patch_media_files import missing_media_files

__all__ = ["check_media_files", "missing_media_files"]

check_media_files = partial(patch_media_files.check_media_files, edges_alone=True)
