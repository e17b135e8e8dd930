"""Side data of rows whose policies note something of every token, in blocks of the pool that hold nothing else.

Knows rows, slots and bytes. A block's bytes of one layer and kv head hold the side data of as many slots as fit into
its keys, then of as many as fit into its values. Shape letters: T tokens, L layers, H_kv kv heads, n slots, W numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from engine.compression.apply import SlotMap
from engine.compression.base import Policy
from engine.compression.writing import SideSpec, WriteView, WritingPolicy, side_of
from engine.execution.rows import RowTable
from engine.models.batch import ForwardBatch, KVCache
from engine.scheduling.plan import Chunk, NewRow


@dataclass(slots=True)
class _Row:
    """num_cached: first tokens that the row found in the prefix cache, and of which nothing is noted yet."""

    policy: WritingPolicy
    spec: SideSpec
    num_cached: int
    block_ids: list[int] = field(default_factory=list)


class SideRows:
    """Row -> its blocks with side data."""

    def __init__(self, cache: KVCache, rows: RowTable) -> None:
        self._cache = cache
        self._rows = rows
        self._states: dict[int, _Row] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._states

    def add(self, new: NewRow, policy: Policy) -> None:
        spec = side_of(policy)
        if spec is not None:
            self._states[new.row] = _Row(cast(WritingPolicy, policy), spec, new.num_computed)

    def remove(self, row: int) -> None:
        self._states.pop(row, None)

    def take(self, chunk: Chunk) -> None:
        """The row has more blocks. Doing it twice is harmless."""
        state = self._states[chunk.row]
        num_slots = chunk.start - self._rows.num_dropped(chunk.row) + chunk.num_tokens
        num_known = -(-num_slots // sum(self._counts(state))) - len(chunk.new_side)
        state.block_ids[num_known:] = chunk.new_side  # what is behind has been given back
        if state.num_cached:
            self._note_cached(chunk.row, state)

    def reader(self, row: int) -> Callable[[int, int], Tensor] | None:
        """(layer, n) -> [H_kv, n, W] of the row's first slots; None for a row without side data."""
        if row not in self._states:
            return None
        return lambda layer, num_slots: self.read(row, layer, num_slots)

    def read(self, row: int, layer: int, num_slots: int) -> Tensor:
        """[H_kv, n, W]."""
        state = self._states[row]
        size = state.spec.num_bytes
        slots = torch.arange(num_slots, device=self._cache.k.device)
        found = slots.new_empty(num_slots, size, self._cache.k.shape[2], dtype=torch.uint8)
        for units, where, blocks, offsets in self._places(state, slots):
            found[where] = units[blocks, layer, :, offsets]
        return found.permute(2, 0, 1).contiguous().view(state.spec.dtype)

    def write(self, row: int, layer: int, slots: Tensor, data: Tensor) -> None:
        """data [T, H_kv, W] of slots [T]."""
        state = self._states[row]
        expected = len(slots), self._cache.k.shape[2], state.spec.width
        if data.shape != expected:
            raise ValueError(f"on_kv returned {list(data.shape)}, need {list(expected)}")
        packed = data.to(state.spec.dtype).contiguous().view(torch.uint8).transpose(1, 2)  # [T, bytes, H_kv]
        for units, where, blocks, offsets in self._places(state, slots):
            units[blocks, layer, :, offsets] = packed[where]

    def keep(self, row: int, index: Tensor) -> None:
        """Only these slots [L, H_kv, K] are left, -1 for none, in this order."""
        num_slots = int(index.max()) + 1
        for layer in range(index.shape[0]):
            data = self.read(row, layer, num_slots)
            places = index[layer].clamp_min(0).unsqueeze(2).expand(-1, -1, data.shape[2])
            kept = data.gather(1, places).transpose(0, 1)
            self.write(row, layer, torch.arange(len(kept), device=kept.device), kept)

    def hook(self, chunks: Sequence[Chunk], batch: ForwardBatch) -> WriteTap | None:
        """Who looks at what the chunks write; the chunks are in the order of the batch."""
        starts = batch.cu_seqlens_q.tolist()
        parts = [
            (chunk, slice(first, end))
            for chunk, first, end in zip(chunks, starts[:-1], starts[1:], strict=True)
            if chunk.row in self._states
        ]
        return WriteTap(self, parts, batch.positions) if parts else None

    def note(
        self, chunk: Chunk, layer: int, positions: Tensor, k: Tensor, v: Tensor, q: Tensor, unrotated: Tensor
    ) -> None:
        """Of a chunk's tokens, as they are written."""
        first = chunk.start - self._rows.num_dropped(chunk.row)
        slots = torch.arange(first, first + chunk.num_tokens, device=k.device)
        self._note(chunk.row, layer, slots, positions, k, v, q, unrotated)

    def _note(
        self, row: int, layer: int, slots: Tensor, positions: Tensor, k: Tensor, v: Tensor,
        q: Tensor | None = None, unrotated: Tensor | None = None,
    ) -> None:  # fmt: skip
        dtype = self._cache.k.dtype
        view = WriteView(
            layer=layer,
            positions=positions,
            num_prompt_tokens=self._rows.num_prompt_tokens(row),
            queries=q,
            unrotated=unrotated,
            keys=k.to(dtype),
            values=v.to(dtype),
        )
        self.write(row, layer, slots, self._states[row].policy.on_kv(view))

    def _note_cached(self, row: int, state: _Row) -> None:
        """Of the tokens that came from the prefix cache, from their keys and values there."""
        num_slots, state.num_cached = state.num_cached, 0
        source = SlotMap(self._cache, [self._rows.block_ids(row).tolist()])
        slots = torch.arange(num_slots, device=self._cache.k.device)
        for layer in range(self._cache.k.shape[1]):
            k, v = (source.layer(pool, layer, num_slots).transpose(0, 1) for pool in (self._cache.k, self._cache.v))
            self._note(row, layer, slots, slots, k, v)

    def _counts(self, state: _Row) -> list[int]:
        """Slots whose data fit into the keys, and into the values, of a block."""
        units = (pool[0, 0, 0].numel() * pool.itemsize for pool in (self._cache.k, self._cache.v))
        return [unit // state.spec.num_bytes for unit in units]

    def _places(self, state: _Row, slots: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each pool: its bytes [NB, L, H_kv, bytes], which of the slots are there, their blocks [m, 1] and the
        offsets [m, bytes] of their data.
        """
        size = state.spec.num_bytes
        pools = [pool.flatten(3).view(torch.uint8) for pool in (self._cache.k, self._cache.v)]
        counts = self._counts(state)
        blocks = torch.tensor(state.block_ids, device=slots.device)[slots // sum(counts)]
        places = slots % sum(counts)
        found = []
        for pool, first, count in zip(pools, (0, counts[0]), counts, strict=True):
            where = (places >= first) & (places < first + count)
            offsets = (places[where] - first).unsqueeze(1) * size + torch.arange(size, device=slots.device)
            found.append((pool, where, blocks[where].unsqueeze(1), offsets))
        return found


class WriteTap:
    """See `engine.models.batch.WriteHook`."""

    def __init__(self, side: SideRows, parts: Sequence[tuple[Chunk, slice]], positions: Tensor) -> None:
        self._side = side
        self._parts = parts
        self._positions = positions

    def on_kv(self, layer: int, q: Tensor, unrotated: Tensor, k: Tensor, v: Tensor) -> None:
        """See there."""
        for chunk, tokens in self._parts:
            own = (x[tokens] for x in (k, v, q, unrotated))
            self._side.note(chunk, layer, self._positions[tokens], *own)
