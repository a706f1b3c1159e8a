"""What is in a prepared dataset, before a GPU waits for it: `megatron-vl lint`."""

from megatron_vl.data.lint.run import LintConfig, lint

__all__ = ["LintConfig", "lint"]
