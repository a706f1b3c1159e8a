"""The device a step runs on: --device in the words of `megatron_vl.platform`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

DEVICES = ("cuda", "npu", "cpu")
# What hides a kind's devices where it is empty, and else lists those that are seen.
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}


def all_of(device: str) -> dict[str, str]:
    """The variables by which a process sees no device of another kind."""
    return {name: "" for kind, name in _VISIBLE.items() if kind != device}


def one_of(device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a process sees one device of this kind, and none of another."""
    own = {name: (environ.get(name) or "0").split(",")[0]
           for kind, name in _VISIBLE.items() if kind == device}
    return all_of(device) | own


def platform_of(device: str):
    """That of this machine, which ends the process where it is another one than was asked for."""
    from megatron_vl.platform import select_platform  # and torch, which check.py does without

    found = select_platform()
    if found.name != device:
        sys.exit(f"--device {device}: this machine's is {found.name}; see what hides the other.")
    return found
