"""What every spec asks of its sizes."""

from __future__ import annotations

from megatron_vl.errors import InputError


def check_positive(spec, *names: str) -> None:
    """Raises InputError: one of these attributes of `spec` is no whole number above 0."""
    for name in names:
        size = getattr(spec, name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(
                f"config.json's {name} is {size!r}; it must be a whole number above 0."
            )
