"""Two short sequences, in chunks and interleaved, through a small cache: what the adapter compares with plain runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import kernels
from engine.models.batch import ForwardBatch, KVCache, Model

CHECK_IDS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8]]
_BATCHES = [[(0, 0, 3)], [(0, 3, 6), (1, 0, 4)], [(1, 4, 5), (0, 6, 7)]]  # (sequence, start, stop)
_BLOCKS = [[3, 0], [1, 2]]
_BLOCK_SIZE = 4


def run_interleaved(model: Model) -> list[Tensor]:
    """Hidden states of the check sequences, computed in the batches above."""
    spec = model.spec
    shape = (4, spec.num_layers, spec.num_kv_heads, _BLOCK_SIZE)
    cache = KVCache(
        k=torch.zeros(*shape, spec.head_dim, dtype=model.dtype, device=model.device),
        v=torch.zeros(*shape, spec.head_dim_v, dtype=model.dtype, device=model.device),
    )
    parts: list[list[Tensor]] = [[] for _ in CHECK_IDS]
    for chunks in _BATCHES:
        hidden = model.forward(_batch(chunks, model), cache)
        for (sequence, _, _), part in zip(
            chunks, hidden.split([stop - start for _, start, stop in chunks]), strict=True
        ):
            parts[sequence].append(part)
    return [torch.cat(part) for part in parts]


def _batch(chunks: list[tuple[int, int, int]], model: Model) -> ForwardBatch:
    def tokens() -> Iterator[tuple[int, int]]:
        for sequence, start, stop in chunks:
            yield from ((sequence, position) for position in range(start, stop))

    def on_device(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=model.device)

    lengths = [stop - start for _, start, stop in chunks]
    cu_seqlens_q = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor([stop for _, _, stop in chunks], dtype=torch.int32)
    slot = [_BLOCKS[s][p // _BLOCK_SIZE] * _BLOCK_SIZE + p % _BLOCK_SIZE for s, p in tokens()]
    return ForwardBatch(
        token_ids=on_device([CHECK_IDS[s][p] % model.vocab_size for s, p in tokens()], torch.int64),
        positions=on_device([p for _, p in tokens()], torch.int64),
        slots=on_device(slot, torch.int64),
        cu_seqlens_q=cu_seqlens_q.to(model.device),
        seq_lens=seq_lens.to(model.device),
        block_table=on_device([_BLOCKS[s] for s, _, _ in chunks], torch.int32),
        max_seqlen_q=max(lengths),
        attention_plan=kernels.plan_attention(
            cu_seqlens_q, seq_lens, num_kv_heads=model.spec.num_kv_heads, device=model.device
        ),
    )
