"""`python -m megatron_vl` is the `megatron-vl` command."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs it may have an older one
    sys.exit(
        "megatron-vl: Python 3.10 or newer is needed and {} is {}.{}; use another, which the "
        "scripts take from PYTHON.".format(sys.executable, *sys.version_info[:2])
    )

from megatron_vl.cli.main import main

if __name__ == "__main__":
    main()
