"""The files beside config.json that Qwen2-VL's patches are made with."""

from megatron_vl.models.common.patch_media_files import check_media_files, missing_media_files

__all__ = ["check_media_files", "missing_media_files"]
