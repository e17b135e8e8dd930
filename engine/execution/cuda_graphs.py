"""Steps that only decode, recorded once per size and replayed: one launch instead of hundreds.

A recording has the addresses of its inputs in it. So a batch is copied into tensors that stay where they are, padded to
the next size that is recorded; rows that fill up write no slot, see no key, and nobody looks at what they compute.
Knows batches and their sizes; no rows of requests, no sampling.
Shape letters: T tokens, R rows (as many), MB blocks of a table, C hidden size.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.models.batch import ForwardBatch
from kernels.paged_attention.plan import FixedPlan

logger = logging.getLogger(__name__)

# Attention divides rows into pieces of a fixed number of slots. A recording has room for so many pieces, which cost
# next to nothing where they are not used: every size is recorded for few roominesses, by this factor apart.
ROOM_FACTOR = 4


class Graph(Protocol):
    """What records a call and repeats it."""

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        """Runs the call, which reads nothing but tensors that stay where they are. The result does so, too."""

    def replay(self) -> None:
        """Writes the result anew, from what the tensors hold by now."""


class CudaGraph:
    """Recorded by CUDA, in memory that all recordings of one maker share: they never run side by side."""

    def __init__(self, pool: Any) -> None:
        """pool: of `torch.cuda.graph_pool_handle`."""
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        call()  # kernels are compiled and libraries get their memory outside of the recording
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=self._pool):
            return call()

    def replay(self) -> None:
        self._graph.replay()


def cuda_graph_maker() -> Callable[[], Graph]:
    """Makes graphs that share their memory."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


def row_buckets(max_rows: int) -> list[int]:
    """Numbers of rows that are recorded: at most half as many again as needed, from four rows on."""
    sizes = {max_rows}
    size = 1
    while size < max_rows:
        sizes.add(size)
        if size >= 2 and size * 3 // 2 < max_rows:
            sizes.add(size * 3 // 2)
        size *= 2
    return sorted(sizes)


@dataclass(frozen=True)
class _Recording:
    graph: Graph
    plan: FixedPlan
    hidden: Tensor  # [R, C], written by each replay


class DecodeGraphs:
    """Recordings of one model's forward over one cache, made when they are first needed."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Tensor],
        new_graph: Callable[[], Graph],
        *,
        max_rows: int,
        max_blocks: int,
        num_kv_heads: int,
        device: torch.device,
        must_succeed: bool = False,
    ) -> None:
        """
        forward       of the model, into the cache: hidden states [T, C]
        max_rows      rows of the largest recording; steps with more run as they are
        max_blocks    columns of the widest block table
        must_succeed  raise where a recording fails, instead of going on without
        """
        self._forward = forward
        self._new_graph = new_graph
        self._buckets = row_buckets(max_rows)
        self._num_kv_heads = num_kv_heads
        self._device = device
        self._must_succeed = must_succeed
        self._is_broken = False
        self._recordings: dict[tuple[int, int], _Recording] = {}  # by rows and pieces
        self._num_used = 0  # rows of the inputs that are not padding
        self._token_ids, self._positions, self._slots = torch.zeros(3, max_rows, dtype=torch.int64, device=device)
        self._slots.fill_(-1)
        self._seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._table = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)

    @property
    def num_recorded(self) -> int:
        return len(self._recordings)

    def forward(self, batch: ForwardBatch) -> Tensor | None:
        """Hidden states [R, C] of a batch that fits, valid until the next call; None for one that does not.

        Fitting are batches of one token per row, all of which attend as usual and have no adapter, up to `max_rows`.
        """
        if self._is_broken or not self._fits(batch):
            return None
        num_rows = batch.token_ids.shape[0]
        size = self._buckets[bisect.bisect_left(self._buckets, num_rows)]
        seq_lens = np.zeros(size, dtype=np.int64)
        seq_lens[:num_rows] = batch.attention_plan.seq_lens
        self._take(batch, num_rows)
        recording = self._recording(size, _with_room(size, kernels.num_decode_items(seq_lens)))
        if recording is None:
            return None
        recording.plan.fill(seq_lens)
        recording.graph.replay()
        return recording.hidden[:num_rows]

    @torch.inference_mode()
    def record_all(self, report: Callable[[float], None] = lambda share: None) -> None:
        """Records every number of rows, for contexts that attention does not divide; the others follow when needed."""
        for i, size in enumerate(self._buckets):
            report(i / len(self._buckets))
            if self._recording(size, size) is None:
                return

    def _fits(self, batch: ForwardBatch) -> bool:
        num_rows = batch.seq_lens.shape[0]
        return (
            batch.token_ids.shape[0] == num_rows <= self._buckets[-1]
            and batch.max_seqlen_q == 1
            and batch.adapters is None
            and batch.attention is None
            and batch.watcher is None
        )

    def _take(self, batch: ForwardBatch, num_rows: int) -> None:
        """Copies the batch to where recordings look for it."""
        for target, source in (
            (self._token_ids, batch.token_ids),
            (self._positions, batch.positions),
            (self._slots, batch.slots),
            (self._seq_lens, batch.seq_lens),
        ):
            target[:num_rows].copy_(source)
        self._table[:num_rows, : batch.block_table.shape[1]].copy_(batch.block_table[:num_rows])
        if num_rows < self._num_used:
            self._slots[num_rows : self._num_used].fill_(-1)
            self._seq_lens[num_rows : self._num_used].zero_()
        self._num_used = num_rows

    def _recording(self, size: int, num_pieces: int) -> _Recording | None:
        """The recording for so many rows and pieces of attention. None where it cannot be made."""
        found = self._recordings.get((size, num_pieces))
        if found is None and not self._is_broken:
            try:
                found = self._recordings[size, num_pieces] = self._record(size, num_pieces)
            except RuntimeError as error:
                if self._must_succeed:
                    raise
                self._is_broken = True
                logger.warning("no CUDA graphs: a step of %d rows cannot be recorded: %s", size, error)
        return found

    def _record(self, size: int, num_pieces: int) -> _Recording:
        plan = kernels.fixed_decode_plan(size, num_pieces, num_kv_heads=self._num_kv_heads, device=self._device)
        batch = ForwardBatch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            slots=self._slots[:size],
            cu_seqlens_q=self._starts[: size + 1],
            seq_lens=self._seq_lens[:size],
            block_table=self._table[:size],
            max_seqlen_q=1,
            attention_plan=plan,
        )
        graph = self._new_graph()
        hidden = graph.record(lambda: self._forward(batch))
        logger.debug("recorded a step of %d rows and %d pieces of attention", size, num_pieces)
        return _Recording(graph, plan, hidden)


def _with_room(size: int, num_pieces: int) -> int:
    """The least room for so many pieces that is recorded for that many rows."""
    room = size
    while room < num_pieces:
        room *= ROOM_FACTOR
    return room
