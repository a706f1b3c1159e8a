"""energon's own `prepare`, for shards that a test packs by hand."""

import subprocess
import sys
from pathlib import Path

import yaml

from megatron_vl.data.raw.shards import DATASET


def energon_prepare(wds: Path, parts: dict[str, range]) -> None:
    """Index `shard-NNNNNN.tar` files with their splits, as a dataset of ours."""
    command = [
        sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(wds),
        "--non-interactive", "--force-overwrite", "--no-progress", "--num-workers", "1",
        *(word for split, shards in parts.items() for word in (
            "--split-parts", f"{split}:shard-{{{shards[0]:06d}..{shards[-1]:06d}}}.tar",
        )),
        "--media-metadata-by-extension",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wds / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(DATASET, sort_keys=False))
