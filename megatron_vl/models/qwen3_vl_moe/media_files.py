"""The files beside config.json that its patches are made with: Qwen2-VL's."""

from megatron_vl.models.common.patch_media_files import check_media_files, missing_media_files

__all__ = ["check_media_files", "missing_media_files"]
