"""The `megatron-vl` command: one thin file a subcommand."""
