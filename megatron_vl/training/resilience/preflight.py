"""Before any model is built: do all ranks run the same program on the same files?

One `all_gather_object`, and more only while file systems show different checkpoints. Ranks that
differ would otherwise fail an hour later, hang, or train on.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from statistics import median_low

import torch

import megatron_vl
from megatron_vl.data.contents import contents_of
from megatron_vl.data.dataset_dir import split_shards
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.errors import InputError
from megatron_vl.platform.init import ranks
from megatron_vl.training.options.config import TrainConfig
from megatron_vl.training.paths import datasets
from megatron_vl.weights.files import fingerprint
from megatron_vl.weights.found import LATEST, iterations
from megatron_vl.weights.hf_io import SIDE_FILES, WEIGHT_FILES

PACKAGES = ("torch", "megatron-core", "megatron-energon", "transformers")
MISSING = "missing"
CLOCK_SECONDS = 2.0  # clocks may differ by so much; NTP keeps them within hundredths
# An NFS client believes for up to a minute (acdirmax) that a file is not there, or is as it was.
_STALE_SECONDS = 70.0
_LOOK_SECONDS = 2.0
TOLD = 4  # differences that a message tells, and hosts; all are counted


def preflight(config: TrainConfig) -> None:
    """Compare this rank with all others; rank 0 prints one line.

    torch.distributed must be up. The clock is a warning, for nothing is computed from it. Where
    ranks differ in what SAVE holds alone, it waits for their file systems.

    Raises:
        InputError: on every rank, when ranks differ; says in what, which, and both values.
    """
    started, waiting = time.perf_counter(), False
    group = None
    if torch.distributed.get_backend() != "gloo":
        group = torch.distributed.new_group(backend="gloo")
    while True:
        mine, waited = facts(config), time.perf_counter() - started
        torch.distributed.barrier(group)
        # Ranks leave the barrier together, so that what the clocks show then can be compared.
        told = (socket.gethostname(), time.time(), mine, waited)
        everyone: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, told, group)
        hosts, clocks, known, waits = map(list, zip(*everyone, strict=True))
        found = differences(known, hosts)
        # By rank 0's clock, for all ranks have to go on together.
        if not found or waits[0] > _STALE_SECONDS or differences(
                [lasting(config, one) for one in known], hosts):
            break
        if torch.distributed.get_rank() == 0 and not waiting:
            print(f"preflight: {found[0]}; waiting up to {_STALE_SECONDS:.0f} s for the file "
                  f"system to show the same everywhere", flush=True)
        waiting = True
        time.sleep(_LOOK_SECONDS)
    if group is not None:
        torch.distributed.destroy_process_group(group)
    if found:
        more = f"; and {len(found) - TOLD} more" if len(found) > TOLD else ""
        raise InputError(
            f"the ranks do not agree: {'; '.join(found[:TOLD])}{more}; give every node the same "
            f"program, files and options."
        )
    if torch.distributed.get_rank() == 0:
        count = len(set(hosts))
        print(f"preflight: {len(hosts)} rank{'s' * (len(hosts) > 1)} on {count} "
              f"host{'s' * (count > 1)} agree, {time.perf_counter() - started:.1f} s", flush=True)
        if warning := clock_warning(clocks, hosts):
            print(f"preflight: {warning}", flush=True)


def facts(config: TrainConfig) -> dict[str, object]:
    """What must be alike on every rank: versions, options, and the files as this rank sees them."""
    options = {f"option {name.replace('_', '-')}": v for name, v in config.to_dict().items()}
    return {
        **versions(),
        "megatron_vl": f"{megatron_vl.__version__} with sources {_sources()}",
        **options,
        **{str(path): _content(path) for path in _files(config)},
        **_checkpoints(config),
        **{f"what the shards of {path} hold ({split})": _shards(path, split)
           for path, split in _datasets(config)},
    }


def _checkpoints(config: TrainConfig) -> dict[str, object]:
    """Of SAVE, as its listing shows them."""
    if config.checkpoint.save is None:
        return {}
    there = iterations(Path(config.checkpoint.save))
    said = f"{len(there)} checkpoints, the last of iteration {there[-1]}" if there else MISSING
    return {str(Path(config.checkpoint.save) / "iter_*"): said}


def lasting(config: TrainConfig, facts: dict[str, object]) -> dict[str, object]:
    """Those that no other look at the same files changes: all but what a run writes into SAVE."""
    save = config.checkpoint.save
    return {name: one for name, one in facts.items()
            if save is None or Path(save) not in Path(name).parents}


def differences(known: list[dict[str, object]], hosts: list[str]) -> list[str]:
    """One phrase for every fact in which ranks differ: the fewer against the most."""
    found = []
    for name in dict.fromkeys(name for one in known for name in one):
        # A file that only other ranks saw is missing here.
        values = [one.get(name, MISSING) for one in known]
        (usual, _), *others = Counter(map(str, values)).most_common()
        if others:
            phrases = [f"{value} on {_where(values, value, hosts)}" for value, _ in others]
            found.append(
                f"{name} is {' and '.join(phrases)} but {usual} on {_where(values, usual, hosts)}"
            )
    return found


def clock_warning(clocks: list[float], hosts: list[str]) -> str:
    """A sentence about the ranks whose wall clock, in seconds, is far from the middle one."""
    median = median_low(clocks)
    far = [rank for rank, clock in enumerate(clocks) if abs(clock - median) > CLOCK_SECONDS]
    if not far:
        return ""
    most = max((clocks[rank] - median for rank in far), key=abs)
    return (
        f"the clock of {_named(far, hosts)} is {abs(most):.0f} s "
        f"{'ahead of' if most > 0 else 'behind'} the others'; times in logs will not fit together."
    )


def _where(values: list, value: str, hosts: list[str]) -> str:
    return _named([rank for rank, one in enumerate(values) if str(one) == value], hosts)


def _named(numbers: list[int], hosts: list[str]) -> str:
    names = list(dict.fromkeys(hosts[rank] for rank in numbers))
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return f"{ranks(numbers)} ({', '.join(names[:TOLD])}{more})"


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def _sources() -> str:
    """Of our own code: hosts may hold different copies of one version."""
    home = Path(megatron_vl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        digest.update(str(path.relative_to(home)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _files(config: TrainConfig) -> Iterable[Path]:
    """The model's config and tokenizer, how far the checkpoints are, every dataset's own index."""
    checkpoint = config.checkpoint
    for model in (checkpoint.hf_config or checkpoint.load, checkpoint.save):  # see hf_directory
        for pattern in SIDE_FILES if model is not None else ():
            if not pattern.startswith(("README", "LICENSE")):
                yield from _matches(Path(model), pattern)
    for directory in (checkpoint.load, checkpoint.save):  # where a run goes on from
        if directory is not None:
            yield from _matches(Path(directory), LATEST)
            for pattern in WEIGHT_FILES:
                yield from _matches(Path(directory), pattern)
    for mixture, _ in _mixtures(config):
        if mixture.metadataset is not None:
            yield mixture.metadataset
    for directory, _ in _datasets(config):
        yield from _matches(directory / ".nv-meta", "*")


def _mixtures(config: TrainConfig) -> list[tuple[Mixture, str]]:
    return [] if config.data.train_data_path is None else datasets(config)


def _datasets(config: TrainConfig) -> Iterator[tuple[Path, str]]:
    """Directories of datasets, and the splits of them that are read."""
    for mixture, split in _mixtures(config):
        # A metadataset may be missing here; which is what the ranks compare.
        with contextlib.suppress(InputError):
            yield from mixture.leaves(split)


def _shards(dataset: Path, split: str) -> str:
    """A fingerprint of a split's samples, of which every node may have its own copy."""
    try:
        shards = split_shards(dataset, split)
        return f"{len(shards)} shards {contents_of(dataset, shards)['index']}"
    except InputError:
        return MISSING


def _matches(directory: Path, pattern: str) -> list[Path]:
    """Files by a pattern; those that SQLite keeps beside an open index come and go."""
    return sorted(
        path for path in directory.glob(pattern)
        if path.is_file() and not path.name.endswith(("-wal", "-shm", "-journal"))
    )


def _content(path: Path) -> str:
    try:
        return fingerprint(path)
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"unreadable ({error.strerror})"
