"""Start a training from what MindSpeed-MM's scripts give its pretrain_vlm.py.

    python -m megatron_vl.cli.mm_train $DISTRIBUTED_ARGS $GPT_ARGS --mm-data data.json \
        --mm-model model.json $OUTPUT_ARGS

Raw data are prepared in `cache_dir`, once; then `megatron-vl train` runs. Both commands are
printed, and so is every flag and key that has no meaning here. A flag that neither program has is
refused.
"""

from __future__ import annotations

import os
import shlex
import sys
from typing import NoReturn

from megatron_vl.cli import main as program
from megatron_vl.cli.train import started_with
from megatron_vl.errors import CALLED, InputError
from megatron_vl.training.options.mindspeed import CALLED_BY, translated


def main(argv: list[str] | None = None) -> NoReturn:
    """Prepare what is not, train, and exit the process with the code of the command that ended."""
    os.environ[CALLED] = ";".join(f"{option}={key}" for option, key in CALLED_BY.items())
    try:
        prepared, words = translated(sys.argv[1:] if argv is None else argv)
        if prepared and started_with(words[1:])[0].nnodes > 1:
            raise InputError(
                f"{prepared[0][1]} is not prepared yet; before you start several nodes, run on one "
                f"of them megatron-vl {shlex.join(prepared[0])}."
            )
        for job in prepared:
            print("megatron-vl", shlex.join(job), flush=True)
            if code := program.run(job):
                sys.exit(code)
    except InputError as error:
        print(f"mm_train: {error}", file=sys.stderr)
        sys.exit(2)
    print("megatron-vl", shlex.join(words), flush=True)
    program.main(words)


if __name__ == "__main__":
    main()
