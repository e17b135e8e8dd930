"""Tables of rows whose layers or heads keep different numbers of tokens, and what a step's attention needs of them.

Knows rows and slots. Shape letters: T tokens, R rows, L layers, H_kv kv heads, G groups (L, or L * H_kv), MB blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import kernels
from engine.compression.apply import SlotMap, flat
from engine.compression.attend import RowRange, SplitSegment
from engine.models.batch import ForwardBatch, KVCache
from engine.scheduling.plan import Chunk, Compaction


class SplitRows:
    """Row -> its tables [G, MB] of parts and their slots [G]."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._tables: dict[int, list[list[int]]] = {}
        self._num_slots: dict[int, np.ndarray] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._tables

    def num_groups(self, row: int) -> int:
        return len(self._tables[row])

    def tables(self, row: int) -> list[list[int]]:
        return self._tables[row]

    def num_slots(self, row: int) -> np.ndarray:
        """[G] int64."""
        return self._num_slots[row]

    def set(self, row: int, compaction: Compaction) -> None:
        self._tables[row] = [list(table) for table in compaction.tables]
        self._num_slots[row] = np.array(compaction.kept, dtype=np.int64)

    def remove(self, row: int) -> None:
        self._tables.pop(row, None)
        self._num_slots.pop(row, None)

    def append(self, chunk: Chunk) -> None:
        """Takes new parts into the tables. Doing it twice is harmless."""
        if not chunk.new_parts:
            return
        tables = self._tables[chunk.row]
        group, part = chunk.new_parts[-1]
        if part in tables[group]:
            return
        for group, part in chunk.new_parts:
            tables[group].append(part)

    def advance(self, row: int, num_tokens: int) -> None:
        """So many tokens have been added to every table."""
        self._num_slots[row] += num_tokens

    def keep(self, row: int, accepted: Sequence[int]) -> None:
        """The accepted nodes of a draft are added to every table, behind the row's tokens; the others are forgotten."""
        if any(node != place for place, node in enumerate(accepted)):
            self._move(row, accepted)
        self.advance(row, len(accepted))
        block_size = self._cache.k.shape[3]
        for table, num_slots in zip(self._tables[row], self._num_slots[row].tolist(), strict=True):
            del table[-(-num_slots // block_size) :]

    def _move(self, row: int, nodes: Sequence[int]) -> None:
        """Nodes of a draft go to the first slots behind the row's."""
        num_layers, num_heads = self._cache.k.shape[1:3]
        num_slots = torch.from_numpy(self._num_slots[row]).to(self._cache.k.device)
        per_head = num_slots.view(num_layers, -1, 1).expand(num_layers, num_heads, 1)
        slots = SlotMap(self._cache, self._tables[row])
        index = torch.tensor([nodes, range(len(nodes))], device=per_head.device).view(2, 1, 1, -1)
        src, dst = (slots.addresses(per_head + places).flatten(0, 1) for places in index)
        kernels.move_slots(flat(self._cache.k), flat(self._cache.v), src, dst)

    def segment(self, chunks: Sequence[Chunk], batch: ForwardBatch, first: int) -> SplitSegment:
        """The chunks are those of neighbouring rows of the batch, from row `first`, all with as many groups."""
        block_size, device = self._cache.k.shape[3], self._cache.k.device
        num_layers, num_heads = self._cache.k.shape[1:3]
        num_groups = self.num_groups(chunks[0].row)
        ends = [self._num_slots[chunk.row] + chunk.num_tokens for chunk in chunks]
        width = max(-(-int(end.max()) // block_size) for end in ends)
        tables = np.zeros((num_groups, len(chunks), width), dtype=np.int32)
        slots = []
        for place, chunk in enumerate(chunks):
            for group, table in enumerate(self._tables[chunk.row]):
                tables[group, place, : min(width, len(table))] = table[:width]
            at = self._num_slots[chunk.row][:, None] + np.arange(chunk.num_tokens)  # [G, T]
            parts = np.take_along_axis(tables[:, place], at // block_size, axis=1).astype(np.int64)
            slots.append(parts * block_size + at % block_size)
        lens = np.stack(ends, axis=1).astype(np.int32)  # [G, R]
        where = np.concatenate(slots, axis=1)  # [G, T]
        arrays = [tables, lens, where]
        if num_groups != num_layers:  # group = layer * H_kv + head
            arrays = [x.reshape(num_layers, num_heads, *x.shape[1:]).swapaxes(1, 2) for x in arrays]
        tensors = [torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in arrays]
        return SplitSegment(batch, self._cache, RowRange.of(batch, first, len(chunks)), *tensors)
