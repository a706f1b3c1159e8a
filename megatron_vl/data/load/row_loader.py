"""An energon loader as the trainer drives it: started once, resumed exactly, closed at once."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator, Sequence

from megatron.energon import SavableDataLoader
from megatron.energon.errors import SampleException
from megatron.energon.savable_loader import (
    BasicDataLoader,
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
)

from megatron_vl.data.encode.chat import ChatTokenizer
from megatron_vl.data.encode.prompt import PromptTokenizer
from megatron_vl.data.encode.samples import RowBatch
from megatron_vl.data.load.read_ahead import ReadAhead
from megatron_vl.data.load.resume import ANEW, state_for
from megatron_vl.errors import InputError, shown

_ERROR_MARK = f"{InputError.__name__}: "


class RowLoader:
    """Iterates `RowBatch`es; a worker's `InputError` arrives here as the same one sentence.

    Iterating again goes on where the last iteration stopped in training, and starts over in
    validation.
    """

    def __init__(self, loader: SavableDataLoader | BasicDataLoader, made_for: dict | None = None,
                 epoch: int | None = None, chat: ChatTokenizer | PromptTokenizer | None = None):
        """Of training loaders only: `made_for`, what a saved state is bound to; `epoch`, samples of
        one over all ranks, None where datasets are mixed by weight. Of validation loaders: `chat`,
        what tokens are decoded with."""
        self._loader, self.epoch, self.chat = loader, epoch, chat
        self._made_for = made_for
        self._started = False
        self._restored: SavableDataLoaderState | None = None
        self._taken = 0  # batches, since then or since the beginning
        self._ahead: ReadAhead | None = None

    def __iter__(self) -> Iterator[RowBatch]:
        with _without_pin_memory_warning():
            batches = iter(self._loader)
        while True:
            try:
                with _sentences(), _without_pin_memory_warning(), self._starting():
                    batch = next(batches, None)
            except InputError:
                self.close()  # now: the error's traceback keeps this loader alive
                raise
            if batch is None:
                return
            self._taken += 1
            yield batch

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        """Fork the workers with a frozen heap.

        energon looks at every object the garbage collector knows, and collects, in each new worker:
        seconds of work that also copies the trainer's memory.
        """
        if self._started or not self._loader.num_workers:
            yield
            return
        self._started = True
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()
        if ReadAhead.fits(self._loader._iterator):
            self._ahead = ReadAhead(self._loader._iterator)

    def close(self) -> None:
        """End the workers. Left to the garbage collector, torch waits five seconds for each."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()

    def __del__(self) -> None:
        self.close()

    def save_state_rank(self) -> dict:
        """The state of this rank, to pickle beside a checkpoint; training loaders only.

        It stands before the first batch not yet taken from the iterator.
        """
        state = self._loader.save_state_rank()
        if state is not None and self._loader.num_workers:
            state.worker_states = [
                self._began(worker) if self._is_unused(worker) else found
                for worker, found in enumerate(state.worker_states)
            ]
        return {"state": state, "made_for": self._made_for}

    def _is_unused(self, worker: int) -> bool:
        """Whether no batch of this reading process has been taken since the loader began."""
        first = 0 if self._restored is None else self._restored.next_worker_id
        return (worker - first) % self._loader.num_workers >= self._taken

    def _began(self, worker: int) -> SavableDatasetCheckpoint:
        """Where a reading process began.

        Asked itself, one that has not handed over a batch forgets how many it had to skip, and one
        that is still starting skips a batch too many (energon 7.4).
        """
        if self._restored is None:
            return SavableDatasetCheckpoint(state=None, offset=0)
        return self._restored.worker_states[worker]

    def restore_state(self, saved: Sequence[dict]) -> str:
        """Go on from what the loaders of all data-parallel ranks saved, in the order of the ranks.

        Call before the first iteration.

        Returns:
            A sentence about what could not be compared with the checkpoint's; empty if all was.

        Raises:
            InputError: see `state_for`.
        """
        try:
            self._restored, unknown = state_for(saved, self._made_for)
            self._loader.restore_state_rank(self._restored)
        except InputError:
            raise
        except Exception as error:  # energon looks for nothing before it takes it
            words = shown(f"{type(error).__name__}: {error}")
            raise InputError(
                f"the checkpoint's data state does not fit this energon ({words}); {ANEW}."
            ) from error
        return unknown


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Take the worker's traceback off an `InputError`: torch puts it into the message."""
    try:
        yield
    except (InputError, SampleException) as error:
        _, mark, sentence = str(error).rpartition(_ERROR_MARK)
        if not mark:
            raise
        raise InputError(sentence.strip()) from None


@contextlib.contextmanager
def _without_pin_memory_warning() -> Iterator[None]:
    """energon always asks for pinned memory; without an accelerator torch warns about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield
