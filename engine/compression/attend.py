"""Attention of a batch whose rows keep their caches in different ways: one segment of neighbouring rows per way.

Knows rows of a batch, tables and slots; no requests, no policies. Shape letters: T tokens, R rows, H query heads,
H_kv kv heads, D head_dim, S slots, C channels, L layers, MB blocks of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

import kernels
from engine.compression.base import EvidenceKind
from engine.models.batch import ForwardBatch, KVCache
from kernels.decoder_step import PackedTokens


@dataclass(frozen=True)
class RowRange:
    """Neighbouring rows [first, first + num_rows) of a batch and their tokens."""

    first: int
    num_rows: int
    tokens: slice
    starts: Tensor  # [R + 1] int32, where each row's tokens begin, from 0

    @staticmethod
    def of(batch: ForwardBatch, first: int, num_rows: int) -> RowRange:
        starts = batch.cu_seqlens_q[first : first + num_rows + 1]
        return RowRange(first, num_rows, slice(int(starts[0]), int(starts[-1])), starts - starts[0])

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.num_rows)


class Segment(Protocol):
    rows: RowRange

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        """Writes keys and values [T, H_kv, D] of the segment's tokens to the cache and their attention to `out`."""

    def packed(self) -> Sequence[PackedTokens] | None:
        """See `engine.models.batch.AttentionHook`, of the segment's rows. None for those who do not say."""
        return None


class MixedAttention:
    """See `engine.models.batch.AttentionHook`. The segments cover all rows."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, soft_cap: float,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
        out = torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)
        for segment in self._segments:
            tokens = segment.rows.tokens
            segment.attend(layer, q[tokens], k[tokens], v[tokens], out[tokens], options)
        return out

    def packed(self) -> Sequence[PackedTokens] | None:
        """See `engine.models.batch.AttentionHook`."""
        found: list[PackedTokens] = []
        for segment in self._segments:
            own = segment.packed()
            if own is None:
                return None
            found += own
        return found


@dataclass(frozen=True)
class Scored:
    """Rows of a segment whose evidence is of one kind.

    weights       [C, T] float32 of their tokens
    before        of each row, what it had: [C, L, H_kv, n] float32, or None for nothing. It is not changed
    noise_keys    [T] int64, for the kind "noisy"
    temperatures  [T] float32, likewise
    """

    kind: EvidenceKind
    rows: RowRange
    weights: Tensor
    before: Sequence[Tensor | None]
    noise_keys: Tensor | None = None
    temperatures: Tensor | None = None

    def of_layer(self, layer: int, num_kv_heads: int, num_slots: int) -> Tensor:
        """What the rows had in one layer: [C, R, H_kv, S] float32, a copy with zeros for what came since."""
        shape = self.weights.shape[0], self.rows.num_rows, num_kv_heads, num_slots
        scores = torch.zeros(shape, dtype=torch.float32, device=self.weights.device)
        for row, before in enumerate(self.before):
            if before is not None:
                scores[:, row, :, : before.shape[3]] = before[:, layer]
        return scores


def score(
    scored: Scored, layer: int, q: Tensor, k_cache: Tensor, table: Tensor, seq_lens: Tensor, lse: Tensor,
    num_slots: int, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """What the rows have after these queries, in one layer: [C, R, H_kv, S] float32. Arguments are of these rows.

    num_slots   S, at least as many as any of them has
    options     of the layer's attention
    """
    return kernels.attention_scores(
        q,
        k_cache,
        table,
        seq_lens,
        scored.rows.starts,
        lse,
        scored.weights,
        kind=scored.kind,
        noise_keys=scored.noise_keys,
        temperature=scored.temperatures,
        layer=layer,
        out=scored.of_layer(layer, k_cache.shape[1], num_slots),
        **{name: options[name] for name in ("scale", "window", "soft_cap")},
    )


class Recorder(Protocol):
    """Wants to see the queries of some rows."""

    rows: RowRange

    def record(self, q: Tensor, lse: Tensor, options: dict[str, Any]) -> None:
        """The rows' queries [T, H, D] in the next layer, the log of their softmax denominators [T, H], and the layer's
        options. They may be overwritten afterwards.
        """


def plan_rows(batch: ForwardBatch, rows: RowRange, seq_lens: Tensor, num_kv_heads: int) -> kernels.AttentionPlan:
    """Attention of some rows of a batch, trees among them, on their own. seq_lens [R]: see `kernels.plan_attention`."""
    parents = batch.attention_plan.parents
    return kernels.plan_attention(
        rows.starts.cpu(),
        seq_lens.cpu(),
        num_kv_heads=num_kv_heads,
        device=batch.slots.device,
        parents=None if parents is None else parents[rows.tokens],
    )


class TableSegment(Segment):
    """Rows with one block table each, and the probabilities that some of them, the first ones, ask for.

    `staged` has, for each `Scored`, one [C, R, H_kv, S] float32 per layer, complete after the last layer.
    """

    def __init__(
        self, batch: ForwardBatch, cache: KVCache, rows: RowRange, scored: Sequence[Scored],
        recorders: Sequence[Recorder] = (),
    ) -> None:  # fmt: skip
        self.rows = rows
        self.staged: list[list[Tensor]] = [[] for _ in scored]
        self._cache = cache
        self._scored = scored
        self._recorders = recorders
        self._slots = batch.slots[rows.tokens]
        self._table = batch.block_table[rows.rows]
        self._seq_lens = batch.seq_lens[rows.rows]
        self._num_slots = [int(batch.seq_lens[group.rows.rows].max()) for group in scored]
        self._batch = batch

    @cached_property
    def _plan(self) -> kernels.AttentionPlan:
        if self.rows.num_rows == len(self._batch.seq_lens):
            return self._batch.attention_plan
        return plan_rows(self._batch, self.rows, self._seq_lens, self._cache.k.shape[2])

    def packed(self) -> Sequence[PackedTokens] | None:
        """See `Segment`."""
        return None if self._scored or self._recorders else ()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        """See `Segment`."""
        k_cache, v_cache = self._cache.layer(layer)
        kernels.kv_write(k, v, k_cache, v_cache, self._slots)
        where = self._table, self._seq_lens, self.rows.starts
        if not self._scored and not self._recorders:
            kernels.paged_attention(q, k_cache, v_cache, *where, out=out, plan=self._plan, **options)
            return
        _, lse = kernels.paged_attention(
            q, k_cache, v_cache, *where, out=out, plan=self._plan, return_lse=True, **options
        )
        for recorder in self._recorders:
            tokens = self._own(recorder.rows.tokens)
            recorder.record(q[tokens], lse[tokens], options)
        for scored, num_slots, staged in zip(self._scored, self._num_slots, self.staged, strict=True):
            first, tokens = scored.rows.first - self.rows.first, self._own(scored.rows.tokens)
            rows = slice(first, first + scored.rows.num_rows)
            where = self._table[rows], self._seq_lens[rows], lse[tokens]
            staged.append(score(scored, layer, q[tokens], k_cache, *where, num_slots, options))

    def _own(self, tokens: slice) -> slice:
        """Tokens of the batch among those of the segment."""
        return slice(tokens.start - self.rows.tokens.start, tokens.stop - self.rows.tokens.start)


class SplitSegment(Segment):
    """Rows with a table per layer, or per layer and kv head, over parts of blocks.

    tables  [L, R, MB] or [L, R, H_kv, MB] int32, of parts
    lens    [L, R] or [L, R, H_kv] int32, slots that a row's last query sees
    slots   [L, T] or [L, T, H_kv] int64, where the tokens go
    """

    def __init__(
        self, batch: ForwardBatch, cache: KVCache, rows: RowRange, tables: Tensor, lens: Tensor, slots: Tensor
    ) -> None:
        self.rows = rows
        self._tables, self._lens, self._slots = tables, lens, slots
        self._is_per_head = lens.dim() == 3
        longest = lens.amax((0, 2)) if self._is_per_head else lens.amax(0)
        self._plan = plan_rows(batch, rows, longest, cache.k.shape[2])
        num_heads, block_size = cache.k.shape[2:4]
        heads = 1 if self._is_per_head else num_heads
        self._k = cache.k.view(-1, heads, block_size, cache.k.shape[4])
        self._v = cache.v.view(-1, heads, block_size, cache.v.shape[4])
        self.virtual: Sequence[VirtualKeys] | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        """See `Segment`."""
        slots = self._slots[layer]
        if self._is_per_head:
            k, v, slots = k.flatten(0, 1).unsqueeze(1), v.flatten(0, 1).unsqueeze(1), slots.flatten()
        kernels.kv_write(k, v, self._k, self._v, slots)
        where = self._tables[layer], self._lens[layer], self.rows.starts
        if self.virtual is None:
            kernels.paged_attention(q, self._k, self._v, *where, out=out, plan=self._plan, **options)
            return
        _, lse = kernels.paged_attention(
            q, self._k, self._v, *where, out=out, plan=self._plan, return_lse=True, **options
        )
        self.virtual[layer].merge_into(q, out, lse, self.rows.starts, options["scale"])


@dataclass(frozen=True)
class VirtualKeys:
    """One key and value per row and kv head that stand for many: [R, H_kv, D] and [R, H_kv, Dv] float32.

    log_count  [R, H_kv] float32, the logarithm of how many; -inf for none
    """

    k: Tensor
    v: Tensor
    log_count: Tensor

    def merge_into(self, q: Tensor, out: Tensor, lse: Tensor, starts: Tensor, scale: float) -> None:
        """Adds their part to the attention `out` [T, H, Dv] of the rows, whose softmax so far has `lse` [T, H]."""
        part, part_lse = kernels.virtual_key(q, self.k, self.v, self.log_count, starts, scale=scale)
        kernels.merge_attention(out, lse, part, part_lse)
