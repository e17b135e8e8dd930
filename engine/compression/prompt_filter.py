"""First passes over prompts that a policy shortens: the first layers run, and one of them tells which tokens matter.

Knows rows, chunks and tensors. Such rows generate nothing until they have come again with the shorter prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from engine.compression.apply import SlotMap
from engine.compression.attend import RowRange, TableSegment
from engine.compression.gemfilter import filter_logits
from engine.compression.writing import FilteringPolicy
from engine.execution.rows import RowTable
from engine.models.batch import ForwardBatch, KVCache, Model
from engine.scheduling.plan import Chunk, ChunkResult, NewRow


class PromptFilters:
    """All methods belong to the thread of the step loop."""

    def __init__(self, cache: KVCache, rows: RowTable) -> None:
        self._cache = cache
        self._rows = rows
        self._policies: dict[int, FilteringPolicy] = {}

    def add(self, new: NewRow) -> None:
        self._policies.pop(new.row, None)
        if new.policy is not None and new.policy.plan.num_filtered is not None:
            self._policies[new.row] = cast(FilteringPolicy, new.policy.policy)

    def remove(self, row: int) -> None:
        self._policies.pop(row, None)

    def run(self, model: Model, chunks: Sequence[Chunk], batch: ForwardBatch) -> list[ChunkResult]:
        """Runs the batch of these chunks, all of rows whose prompts are being filtered, through the layers needed."""
        num_layers = self._cache.k.shape[1]
        layers = [self._policies[chunk.row].layer_of(num_layers) for chunk in chunks]
        attention = _Watching(batch, self._cache, layers)
        model.forward_layers(replace(batch, attention=attention), self._cache, max(layers) + 1)
        results = []
        for i, chunk in enumerate(chunks):
            query = attention.queries[i]
            if not bool(query.isfinite().all()):
                results.append(ChunkResult(error="numerical_error"))
            elif chunk.start + chunk.num_tokens < self._rows.num_prompt_tokens(chunk.row):
                results.append(ChunkResult())
            else:
                results.append(ChunkResult(filtered=self._choose(chunk, layers[i], query)))
        return results

    def _choose(self, chunk: Chunk, layer: int, query: Tensor) -> tuple[int, ...]:
        """Which tokens of the prompt stay."""
        num_tokens = self._rows.num_prompt_tokens(chunk.row)
        slots = SlotMap(self._cache, [self._rows.block_ids(chunk.row).tolist()])
        kept = self._policies[chunk.row].choose(filter_logits(query, slots.layer(self._cache.k, layer, num_tokens)))
        return tuple(range(num_tokens)) if kept is None else tuple(kept.tolist())


class _Watching:
    """Attends as usual and keeps each row's last query [H, D] of the layer that chooses for it."""

    def __init__(self, batch: ForwardBatch, cache: KVCache, layers: Sequence[int]) -> None:
        self._segment = TableSegment(batch, cache, RowRange.of(batch, 0, len(layers)), ())
        self._layers = layers
        self._last = (batch.cu_seqlens_q[1:] - 1).tolist()
        self.queries: dict[int, Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, soft_cap: float,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `engine.models.batch.AttentionHook`."""
        for row, chosen in enumerate(self._layers):
            if chosen == layer:
                self.queries[row] = q[self._last[row]].clone()
        out = q.new_empty(*q.shape[:2], v.shape[2])
        self._segment.attend(
            layer, q, k, v, out, {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
        )
        return out

    def packed(self) -> None:
        """Nothing that the native step does."""
