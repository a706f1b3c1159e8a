"""The files beside config.json that patches are made with: see
`megatron_vl.models.common.deepstack`."""

from megatron_vl.models.common.deepstack.media_files import check_media_files, missing_media_files

__all__ = ["check_media_files", "missing_media_files"]
