"""`python -m megatron_vl` is the `megatron-vl` command."""

from megatron_vl.cli.main import main

if __name__ == "__main__":
    main()
