"""Rows that look at their blocks through bounds of the keys: to read only some (Quest), or to note which matter (RaaS).

Knows rows, blocks and tensors. The bounds of a block are part of no request: they are made anew from the block's keys,
once for all blocks of a row when it begins to generate, then for the block that it writes to. So what a draft or
another request left behind never shows. A draft's tokens look one by one, each at the bounds as they are for it; what
they note counts where they are accepted. Shape letters: T tokens, R rows, L layers, H query heads, H_kv kv heads,
D head_dim, MB blocks of a table, K blocks read, BS block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kernels
from engine.compression.attend import RowRange, Segment
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

    def __contains__(self, row: object) -> bool:
        return row in self._states

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
        """The chunks are those of neighbouring rows of the batch from row `first`, one token each or a draft that is a
        chain.
        """
        assert self._bounds is not None
        states = [self._states[chunk.row] for chunk in chunks]
        rows = RowRange.of(batch, first, len(chunks))
        table, ends = batch.block_table[rows.rows], batch.seq_lens[rows.rows].tolist()
        stamps = any(isinstance(state.policy, RaaS) for state in states)
        looks: dict[int, _Look] = {}
        num_tokens = 0
        for place, (state, chunk, end) in enumerate(zip(states, chunks, ends, strict=True)):
            blocks = table[place].cpu().long()
            known = min(state.num_bounded, end - chunk.num_tokens) // self._block_size * self._block_size
            for index, num_slots in enumerate(range(end - chunk.num_tokens + 1, end + 1)):
                # stamps depend on the bounds of the newest block as the query sees it, the choice of blocks does not
                look = looks.setdefault(index if stamps else 0, _Look())
                look.tokens.append(num_tokens + index)
                new = torch.arange(known, num_slots)
                look.slots.append(blocks[new // self._block_size] * self._block_size + new % self._block_size)
                known = num_slots
            num_tokens += chunk.num_tokens
        num_read = [
            state.policy.num_blocks(state.num_prompt_tokens, self._block_size) if isinstance(state.policy, Quest) else 1
            for state in states
        ]
        return BoundedSegment(batch, self._cache, self._bounds, rows, list(looks.values()), num_dense, num_read, stamps)

    def commit(self, chunks: Sequence[Chunk], segment: BoundedSegment, accepted: Sequence[Sequence[int]]) -> None:
        """The step has succeeded: what it found out about rows' first tokens and accepted nodes counts."""
        for first, chunk, nodes in zip(segment.rows.starts[:-1].tolist(), chunks, accepted, strict=True):
            state = self._states[chunk.row]
            for token in range(first, first + 1 + len(nodes)):
                state.num_bounded = segment.num_slots[token]
                if isinstance(state.policy, RaaS):
                    bounds = torch.stack([scores[token] for scores in segment.bounds_of_layers])  # [L, H_kv, MB]
                    num_blocks = -(-state.num_bounded // self._block_size)
                    self._stamp(state, bounds[..., :num_blocks], chunk.start + token - first)

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


@dataclass(slots=True)
class _Look:
    """A look at bounds: of which tokens of a segment, and the slots whose blocks need new bounds before."""

    tokens: list[int] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)


class BoundedSegment(Segment):
    """Rows of few queries, each of which chooses on its own. The first layers read all blocks, the others those with
    the highest bounds.

    num_slots          [T] integers, that each query sees
    bounds_of_layers   [T, H_kv, MB] float32 per layer, of scaled logits: where rows note which blocks they use
    """

    def __init__(
        self, batch: ForwardBatch, cache: KVCache, bounds: Tensor, rows: RowRange, looks: Sequence[_Look],
        num_dense: int, num_read: Sequence[int], stamps: bool,
    ) -> None:  # fmt: skip
        self.rows = rows
        self.bounds_of_layers: list[Tensor] = []
        self._cache = cache
        self._bounds = bounds
        self._table = batch.block_table[rows.rows]
        self._seq_lens = batch.seq_lens[rows.rows]
        self._written = batch.slots[rows.tokens]
        self._num_dense = num_dense
        self._stamps = stamps
        self._block_size = cache.k.shape[3]
        device = self._table.device
        self._looks = [(torch.tensor(look.tokens, device=device), torch.cat(look.slots).to(device)) for look in looks]
        # every query as a row of its own: what it may see, and how much it reads
        lengths = rows.starts.diff().long()
        self._token_table = self._table.repeat_interleave(lengths, dim=0)
        offsets = torch.arange(len(self._token_table), device=device) - rows.starts[1:].repeat_interleave(lengths) + 1
        self._token_lens = (self._seq_lens.repeat_interleave(lengths) + offsets).int()
        self._token_starts = torch.arange(len(self._token_table) + 1, dtype=torch.int32, device=device)
        self._num_present = (self._token_lens.long() + self._block_size - 1) // self._block_size
        self._num_read = torch.tensor(num_read, device=device).repeat_interleave(lengths)
        self.num_slots: list[int] = self._token_lens.tolist()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        """See `engine.compression.attend.Segment`."""
        k_cache, v_cache = self._cache.layer(layer)
        kernels.kv_write(k, v, k_cache, v_cache, self._written)
        table, lens, starts = self._table, self._seq_lens, self.rows.starts
        is_dense = layer < self._num_dense or options["window"] > 0  # a window counts slots, and reads few as it is
        if not is_dense or self._stamps:
            scores = self._scores(layer, q)
            if self._stamps:
                self.bounds_of_layers.append(scores * options["scale"])
            if not is_dense:
                (table, lens), starts = self._selected(scores), self._token_starts
        kernels.paged_attention(q, k_cache, v_cache, table, lens, starts, out=out, **options)

    def _scores(self, layer: int, q: Tensor) -> Tensor:
        """What each query makes of the blocks: [T, H_kv, MB] float32."""
        k_cache, bounds = self._cache.layer(layer)[0], self._bounds[:, layer]
        if len(self._looks) == 1:  # all tokens, in order
            kernels.update_bounds(k_cache, bounds, self._looks[0][1])
            where = self._token_table, self._token_lens
            return kernels.bound_scores(q, bounds, *where, block_size=self._block_size)
        scores = torch.empty(q.shape[0], k_cache.shape[1], self._table.shape[1], device=q.device)
        for tokens, slots in self._looks:
            kernels.update_bounds(k_cache, bounds, slots)
            where = self._token_table[tokens], self._token_lens[tokens]
            scores[tokens] = kernels.bound_scores(q[tokens], bounds, *where, block_size=self._block_size)
        return scores

    def _selected(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of the blocks to read and their slots: [T, H_kv, K] and [T, H_kv] int32."""
        places = select_blocks(scores, self._num_present, self._num_read)
        table = self._token_table.unsqueeze(1).expand(-1, places.shape[1], -1).gather(2, places.clamp_min(0))
        num_blocks = (places >= 0).sum(2)
        in_last = self._token_lens.long() - (self._num_present - 1) * self._block_size  # slots of the newest block
        lens = (num_blocks - 1) * self._block_size + in_last.unsqueeze(1)
        return table.contiguous(), lens.int()
