"""Rows that look at their blocks through bounds of the keys: to read only some (Quest), or to note which matter (RaaS).

Knows rows, blocks and tensors. The bounds of a block are part of no request: they are made anew from the block's keys,
once for all blocks of a row when it begins to generate, then for the block that it writes to. So what a draft or
another request left behind never shows. Shape letters: R rows, L layers, H query heads, H_kv kv heads, D head_dim,
MB blocks of a table, K blocks read, BS block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from engine.compression.attend import RowRange
from engine.compression.quest import Quest, select_blocks
from engine.compression.raas import RaaS
from engine.models.batch import ForwardBatch, KVCache
from engine.scheduling.plan import Chunk


@dataclass(slots=True)
class _Row:
    policy: Quest | RaaS
    num_prompt_tokens: int
    num_bounded: int = 0  # slots whose blocks have bounds that hold
    stamps: Tensor | None = None  # [L, H_kv, MB] int64: position of the last query that used a block


class BoundedRows:
    """Row -> its policy and what it has noted."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._bounds: Tensor | None = None  # [NB, L, H_kv, 2, D], made with the first row that needs it
        self._states: dict[int, _Row] = {}
        self._block_size = cache.k.shape[3]

    def add(self, row: int, policy: Quest | RaaS, num_prompt_tokens: int) -> None:
        if self._bounds is None:
            num_blocks, num_layers, num_heads, _, head_dim = self._cache.k.shape
            self._bounds = self._cache.k.new_zeros(num_blocks, num_layers, num_heads, 2, head_dim)
        self._states[row] = _Row(policy, num_prompt_tokens)

    def remove(self, row: int) -> None:
        self._states.pop(row, None)

    def way(self, chunk: Chunk, num_slots: int) -> int | None:
        """How many first layers read everything, where the chunk's attention is by bounds; None where it is as usual.

        num_slots   of the row, the chunk's included
        """
        state = self._states.get(chunk.row)
        if state is None or chunk.start < state.num_prompt_tokens:
            return None
        if isinstance(state.policy, RaaS):
            return self._cache.k.shape[1]
        num_read = state.policy.num_blocks(state.num_prompt_tokens, self._block_size)
        return state.policy.num_dense_layers if -(-num_slots // self._block_size) > num_read else None

    def segment(self, chunks: Sequence[Chunk], batch: ForwardBatch, first: int, num_dense: int) -> BoundedSegment:
        """The chunks are those of neighbouring rows of the batch from row `first`, one token each."""
        assert self._bounds is not None
        states = [self._states[chunk.row] for chunk in chunks]
        rows = RowRange.of(batch, first, len(chunks))
        table, lens = batch.block_table[rows.rows], batch.seq_lens[rows.rows].tolist()
        slots = []
        for place, (state, num_slots) in enumerate(zip(states, lens, strict=True)):
            known = min(state.num_bounded, num_slots - 1) // self._block_size * self._block_size
            new = torch.arange(known, num_slots)
            slots.append(table[place].cpu().long()[new // self._block_size] * self._block_size + new % self._block_size)
        num_read = [
            state.policy.num_blocks(state.num_prompt_tokens, self._block_size) if isinstance(state.policy, Quest) else 1
            for state in states
        ]
        stamping = [place for place, state in enumerate(states) if isinstance(state.policy, RaaS)]
        return BoundedSegment(
            batch, self._cache, self._bounds, rows, torch.cat(slots).to(table.device), num_dense, num_read, stamping
        )

    def commit(self, chunks: Sequence[Chunk], segment: BoundedSegment) -> None:
        """The step has succeeded: what it found out counts."""
        lens = segment.seq_lens.tolist()
        for place, (chunk, num_slots) in enumerate(zip(chunks, lens, strict=True)):
            state = self._states[chunk.row]
            state.num_bounded = num_slots
            if isinstance(state.policy, RaaS):
                bounds = torch.stack([scores[place] for scores in segment.bounds_of_layers])  # [L, H_kv, MB]
                self._stamp(state, bounds[..., : -(-num_slots // self._block_size)], chunk.start)

    def stamps(self, row: int, num_slots: int) -> Tensor:
        """Of every slot, when its block was last used: [1, L, H_kv, n] float32."""
        stamps = self._states[row].stamps
        assert stamps is not None
        return stamps.repeat_interleave(self._block_size, dim=2)[..., :num_slots].float().unsqueeze(0)

    def keep_blocks(self, row: int, places: Sequence[int]) -> None:
        """Only the blocks at these places of the row's table are left."""
        state = self._states[row]
        assert state.stamps is not None
        state.stamps = state.stamps[..., torch.tensor(places, device=state.stamps.device)]
        state.num_bounded = len(places) * self._block_size

    def _stamp(self, state: _Row, bounds: Tensor, position: int) -> None:
        assert isinstance(state.policy, RaaS)
        stamps = torch.zeros(bounds.shape, dtype=torch.int64, device=bounds.device)
        if state.stamps is not None:
            stamps[..., : state.stamps.shape[2]] = state.stamps
        state.stamps = stamps.masked_fill(state.policy.used(bounds), position)


class BoundedSegment:
    """One query per row. The first layers read all blocks, the others those with the highest bounds.

    bounds_of_layers   [R, H_kv, MB] float32 per layer, of scaled logits: where rows note which blocks they use
    """

    def __init__(
        self, batch: ForwardBatch, cache: KVCache, bounds: Tensor, rows: RowRange, slots: Tensor, num_dense: int,
        num_read: Sequence[int], stamping: Sequence[int],
    ) -> None:  # fmt: skip
        self.rows = rows
        self.seq_lens = batch.seq_lens[rows.rows]
        self.bounds_of_layers: list[Tensor] = []
        self._cache = cache
        self._bounds = bounds
        self._table = batch.block_table[rows.rows]
        self._written = batch.slots[rows.tokens]
        self._slots = slots
        self._num_dense = num_dense
        self._stamping = stamping
        self._block_size = cache.k.shape[3]
        self._num_present = (self.seq_lens.long() + self._block_size - 1) // self._block_size
        self._num_read = torch.tensor(num_read, device=slots.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        """See `engine.compression.attend.Segment`."""
        k_cache, v_cache = self._cache.layer(layer)
        kernels.kv_write(k, v, k_cache, v_cache, self._written)
        table, lens = self._table, self.seq_lens
        is_dense = layer < self._num_dense
        if not is_dense or self._stamping:
            bounds = self._bounds[:, layer]
            kernels.update_bounds(k_cache, bounds, self._slots)
            scores = kernels.bound_scores(q, bounds, table, lens, block_size=self._block_size)
            if self._stamping:
                self.bounds_of_layers.append(scores * options["scale"])
            if not is_dense:
                table, lens = self._selected(scores)
        kernels.paged_attention(q, k_cache, v_cache, table, lens, self.rows.starts, out=out, **options)

    def _selected(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of the blocks to read and their slots: [R, H_kv, K] and [R, H_kv] int32."""
        places = select_blocks(scores, self._num_present, self._num_read)
        table = self._table.unsqueeze(1).expand(-1, places.shape[1], -1).gather(2, places.clamp_min(0))
        num_blocks = (places >= 0).sum(2)
        in_last = self.seq_lens.long() - (self._num_present - 1) * self._block_size  # slots of the newest block
        lens = (num_blocks - 1) * self._block_size + in_last.unsqueeze(1)
        return table.contiguous(), lens.int()
