"""One rank of every model replica reads; the others are sent what they need.

The reader is tensor-parallel rank 0 of pipeline stage 0. Ranks of stage 0 get its rows with pixels,
all others the integers alone: no second process decodes, and no two ranks can ever see different
rows. Sending never waits, so the pipeline's stages stay as far apart as its schedule wants them.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_vl.data.encode.samples import RowBatch, as_tensors, by_value
from megatron_vl.parallel import Coordinates, Layout


class RowExchange:
    """The ranks of this replica, over gloo whatever the model's own backend is.

    All ranks of the job create it together.
    """

    def __init__(self, layout: Layout, timeout_minutes: float):
        here = layout.coordinates(dist.get_rank())
        self.reader = layout.rank(Coordinates(tp=0, cp=0, dp=here.dp, pp=0))
        self.is_reader = dist.get_rank() == self.reader
        self.peers: list[tuple[int, bool]] = []  # (rank, whether it needs pixels), but the reader
        for dp in range(layout.dp):
            ranks = [layout.rank(Coordinates(tp=tp, cp=cp, dp=dp, pp=pp))
                     for pp in range(layout.pp) for cp in range(layout.cp)
                     for tp in range(layout.tp)]
            group = dist.new_group(
                sorted(ranks), backend="gloo", timeout=timedelta(minutes=timeout_minutes)
            )
            if dp == here.dp:
                self.group = group
                self.peers = [(rank, layout.coordinates(rank).pp == 0)
                              for rank in ranks if rank != self.reader]
        self.wait_seconds = 0.0  # that this rank has waited for its loader
        self._sending: list = []  # (work, tensor): a tensor must live until it has gone

    def rows(self, batches: Iterator[RowBatch] | None) -> Iterator[RowBatch]:
        """The reader's `batches` on every rank; the other ranks give None, and never see an end."""
        if not self.is_reader:
            while True:
                yield self._receive()
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            self._send(batch)
            yield batch

    def number(self, value: int) -> int:
        """The reader's `value` on every rank."""
        box = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(box, src=self.reader, group=self.group)
        return int(box)

    def settle(self) -> None:
        """Let go of what was sent, after a step: every rank has received its rows by then."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _send(self, batch: RowBatch) -> None:
        payloads: dict[bool, torch.Tensor] = {}
        for rank, pixels in self.peers:
            if pixels not in payloads:
                part = batch if pixels else replace(batch, pixel_patches=None)
                data = pickle.dumps(by_value(part), protocol=5)
                payloads[pixels] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            payload = payloads[pixels]
            for tensor in (torch.tensor([payload.numel()]), payload):
                work = dist.isend(tensor, rank, group=self.group)
                self._sending.append((work, tensor))

    def _receive(self) -> RowBatch:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, self.reader, group=self.group)
        payload = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(payload, self.reader, group=self.group)
        values = pickle.loads(memoryview(payload.numpy()))  # from our own rank, never from a file
        return RowBatch(**as_tensors(values))
