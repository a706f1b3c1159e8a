"""What a loader's saved state is bound to, and the state that a rank goes on from.

energon's state is made of places, not of names: with other data or settings the same places are
other samples. So a state is saved with what it was made for, and compared before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState
from pydantic import InstanceOf

from megatron_vl.errors import InputError, shown
from megatron_vl.typed import Shape, Text, typed

DATA = "the training data"  # counts of samples and how they are mixed, as a mark
CONTENT = "content"  # of every dataset by its path; a state without is of endless buffers too
READERS = ("num_workers", "data-parallel size", "data-parallel rank")
ANEW = "--load the checkpoint with another --save, where the data begins anew"


class _MadeFor(Shape):
    """What is looked at by its name; the rest is compared as it is."""

    content: dict[Text, dict[Text, Text | None]] | None = None


class _Saved(Shape):
    made_for: _MadeFor
    state: InstanceOf[SavableDataLoaderState] | None


def state_for(
    saved: Sequence[dict], made_for: Mapping[str, object]
) -> tuple[SavableDataLoaderState, str]:
    """This rank's state, and a sentence about what could not be compared; "" if all was.

    At another data-parallel size the reading processes keep their places and are dealt out anew, as
    `energon checkpoint redist` does; there must be as many of them in all.

    Args:
        saved: what the loaders of all data-parallel ranks saved, in the order of the ranks.
        made_for: what this rank's loader is made for.

    Raises:
        InputError: they were saved for another dataset, other settings or another number of
            reading processes; they are named.
    """
    try:
        for one in saved:
            typed(_Saved, one)
    except ValueError as error:
        raise InputError(
            f"the checkpoint's data state does not say which dataset and settings it was made "
            f"for ({error}); {ANEW}."
        ) from error
    rank, dealt = made_for["data-parallel rank"], len(saved) != made_for["data-parallel size"]
    was = saved[0 if dealt else rank]["made_for"]
    differ = other_data(was, made_for) + [
        f"{name} was {shown(was[name])} and is {now}"
        for name, now in made_for.items()
        if name not in (DATA, CONTENT) and name in was and was[name] != now
        and not (dealt and name in READERS)
    ]
    if differ:
        raise InputError(
            f"the data cannot go on where the checkpoint left it: {', '.join(differ)}; go on "
            f"with the old value, or {ANEW}."
        )
    states = [one["state"] for one in saved]
    state = _deal(states, made_for) if dealt else states[rank]
    new = [f"{name} ({now} now)" for name, now in made_for.items()
           if name not in (DATA, CONTENT, *was)]
    unknown = f"the checkpoint is of a version that had no {', '.join(new)}" if new else ""
    if CONTENT in was:
        return state, unknown
    said = (
        f"the checkpoint is of an older version and does not note the content of its data: of "
        f"{', '.join(made_for[CONTENT])} the numbers of samples were compared, the samples not; "
        f"the epoch that it was in may show some of them twice or not"
    )
    return None if state is None else _of_whole_epochs(state), "; ".join(
        filter(None, (said, unknown))
    )


def other_data(was: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """In which data two loaders differ, by path; wherever the data lie."""
    old, new = was.get(CONTENT), now[CONTENT]
    found = []
    if old is not None and len(old) == len(new):
        for (before, one), (path, other) in zip(old.items(), new.items(), strict=True):
            if _same(one, other):
                continue
            found.append(
                f"the samples of {path} are others than they were" if before == path else
                f"the samples of {path} are not those of {shown(before)}, which it read"
            )
    if not found and was.get(DATA) != now[DATA]:
        paths = ", ".join(new)
        found.append(
            f"it read {shown(', '.join(old))} and is to read {paths}, or in other shares"
            if old else
            f"{paths} holds other numbers of samples than it read, or is mixed in another way"
        )
    return found


def _same(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Digests are compared where both have them: not everything that prepares a set notes them."""
    known = [name for name in one if one[name] is not None and other.get(name) is not None]
    return all(one[name] == other[name] for name in known)


def _deal(
    states: Sequence[SavableDataLoaderState], made_for: Mapping[str, object]
) -> SavableDataLoaderState:
    """This rank's share of the reading processes of all ranks."""
    rank, size = made_for["data-parallel rank"], made_for["data-parallel size"]
    workers = [worker for state in states for worker in state.worker_states]
    here = max(1, made_for["num_workers"])
    if len(workers) != size * here:
        fitting = (
            f"give --num-workers {len(workers) // size}" if len(workers) % size == 0 else
            f"use a data-parallel size that divides {len(workers)}"
        )
        raise InputError(
            f"the checkpoint's data was read by {len(workers)} processes "
            f"({len(states)} data-parallel ranks) but this run has {size} x {here}; {fitting}, "
            f"or {ANEW}."
        )
    return SavableDataLoaderState(
        worker_states=workers[rank * here : (rank + 1) * here],
        next_worker_id=0,
        micro_batch_size=states[0].micro_batch_size,
    )


# ---- states of older versions -------------------------------------------------------------------


def _of_whole_epochs(state: SavableDataLoaderState) -> SavableDataLoaderState:
    """A state of buffers behind the repeat, as one of those before it: see `epochs`.

    What waited in them comes in the epoch that goes on.
    """
    def worker(one: FlexState | SavableDatasetCheckpoint) -> FlexState | SavableDatasetCheckpoint:
        if not isinstance(one, SavableDatasetCheckpoint):
            return _chain(one)
        held = one.state
        return SavableDatasetCheckpoint(
            state=None if held is None else SavableDatasetState(
                rng=held.rng, dataset_state=_chain(held.dataset_state),
                sample_index=held.sample_index,
            ),
            offset=one.offset,
        )

    return SavableDataLoaderState(
        worker_states=[worker(one) for one in state.worker_states],
        next_worker_id=state.next_worker_id, micro_batch_size=state.micro_batch_size,
    )


def _chain(state: FlexState) -> FlexState:
    (inner,) = state["datasets"]
    if state["__class__"] != "_RowPacking":
        return _with(state, datasets=[_chain(inner)])
    encoder = _with(inner, datasets=[_samples(inner["datasets"][0])])
    rows = _with(state, __class__="RowPacking", datasets=[encoder], _empties=False)
    return FlexState(datasets=[rows], __class__="RepeatDataset", _repetition=0, _index=0)


def _samples(state: FlexState) -> FlexState:
    shuffle = state if state["__class__"] == "ShuffleBufferDataset" else None
    if shuffle is not None:
        (state,) = state["datasets"]
    if state["__class__"] == "RepeatDataset":
        (state,) = state["datasets"]
    if shuffle is None:
        return state
    return _shuffled(state, shuffle["_active_buffer"]["_restore_keys"], shuffle)


def _shuffled(state: FlexState, keys: list[tuple], shuffle: FlexState) -> FlexState:
    """Every dataset with what of it waited in the buffer of all."""
    kind, inner = state["__class__"], state.get("datasets", [])
    if kind == "BlendDataset":
        parts = [[key[2:] for key in keys if key[1] == n] for n in range(len(inner))]
    elif kind == "RepeatDataset":
        parts = [keys]
    else:
        buffer = _with(shuffle["_active_buffer"], _restore_keys=keys)
        return _with(shuffle, __class__="EpochShuffle", datasets=[state], _active_buffer=buffer,
                     _empties=False)
    return _with(state, datasets=[
        _shuffled(one, part, shuffle) for one, part in zip(inner, parts, strict=True)
    ])


def _with(state: FlexState, **changes: object) -> FlexState:
    return FlexState(state | changes)
