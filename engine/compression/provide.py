"""Prompts whose keys and values come from their policies, and a look at the unrotated keys of any decoder.

Knows rows, chunks and tensors. Shape letters: T tokens, n tokens of a prompt's beginning, H_kv kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

import kernels
from engine.compression.attend import MixedAttention, RowRange, TableSegment
from engine.compression.writing import PromptView, ProvidingPolicy
from engine.errors import NumericalError
from engine.execution.rows import RowTable
from engine.models.batch import ForwardBatch, KeyWriter, KVCache, Model
from engine.scheduling.plan import Chunk, ChunkResult, NewRow

PROBE_BLOCK = 16  # slots of a block of the probe's own cache


class Providers:
    """All methods belong to the thread of the step loop."""

    def __init__(self, cache: KVCache, rows: RowTable) -> None:
        self._cache = cache
        self._rows = rows
        self._policies: dict[int, ProvidingPolicy] = {}

    def add(self, new: NewRow) -> None:
        self._policies.pop(new.row, None)
        if new.policy is not None and new.policy.plan.num_provided:
            self._policies[new.row] = cast(ProvidingPolicy, new.policy.policy)

    def remove(self, row: int) -> None:
        self._policies.pop(row, None)

    def run(self, model: Model, chunks: Sequence[Chunk], batch: ForwardBatch) -> list[ChunkResult]:
        """Writes what the policies supply of the batch's tokens, all of them of such prompts, into the cache."""
        ends = batch.cu_seqlens_q.tolist()[1:]
        return [
            self._write(model, chunk, batch, slice(end - chunk.num_tokens, end))
            for chunk, end in zip(chunks, ends, strict=True)
        ]

    def _write(self, model: Model, chunk: Chunk, batch: ForwardBatch, tokens: slice) -> ChunkResult:
        end = chunk.start + chunk.num_tokens
        token_ids = torch.from_numpy(self._rows.tokens(chunk.row, 0, end)).long().to(batch.positions.device)
        view = PromptView(token_ids, chunk.start, lambda num_layers: unrotated_layers(model, token_ids, num_layers))
        supplied = self._policies[chunk.row].provide(view)
        num_layers, num_heads = self._cache.k.shape[1:3]
        if len(supplied) != num_layers:
            raise ValueError(f"provide returned {len(supplied)} layers, the model has {num_layers}")
        for layer, (k, v) in enumerate(supplied):
            shapes = [(chunk.num_tokens, num_heads, pool.shape[4]) for pool in (self._cache.k, self._cache.v)]
            if [k.shape, v.shape] != shapes:
                raise ValueError(f"provide returned {list(k.shape)} and {list(v.shape)} for {shapes}")
            if not bool(k.isfinite().all() and v.isfinite().all()):
                return ChunkResult(error=NumericalError.code)
            cast(KeyWriter, model).write_kv(layer, k, v, batch.positions[tokens], batch.slots[tokens], self._cache)
        return ChunkResult()


def unrotated_layers(model: Model, token_ids: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
    """Keys before their rotation and values [n, H_kv, D] of a model's first layers over these tokens, in a cache of
    their own. token_ids [n] int64.
    """
    num_tokens, spec, device = len(token_ids), model.spec, token_ids.device
    num_blocks = -(-num_tokens // PROBE_BLOCK)
    shape = num_blocks, spec.num_layers, spec.num_kv_heads, PROBE_BLOCK
    pools = [torch.empty(*shape, dim, dtype=model.dtype, device=device) for dim in (spec.head_dim, spec.head_dim_v)]
    cache = KVCache(*pools)
    starts = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
    places = torch.arange(num_tokens, device=device)
    captured = _Captured()
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=places,
        slots=places,
        cu_seqlens_q=starts,
        seq_lens=starts[1:].clone(),
        block_table=torch.arange(num_blocks, dtype=torch.int32, device=device).unsqueeze(0),
        max_seqlen_q=num_tokens,
        attention_plan=kernels.plan_attention(
            [0, num_tokens], [num_tokens], num_kv_heads=spec.num_kv_heads, device=device
        ),
        writes=captured,
    )
    segment = TableSegment(batch, cache, RowRange.of(batch, 0, 1), ())
    model.forward_layers(replace(batch, attention=MixedAttention([segment])), cache, num_layers)
    return captured.layers


class _Captured:
    """See `engine.models.batch.WriteHook`."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def on_kv(self, layer: int, q: Tensor, unrotated: Tensor, k: Tensor, v: Tensor) -> None:
        """See there."""
        self.layers.append((unrotated, v.clone()))
