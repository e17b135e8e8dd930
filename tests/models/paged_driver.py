"""Drives a model over a paged cache without the engine: shuffled blocks, ragged batches, prompts in chunks.

Each step mixes prompt chunks of some requests with decode rows of others. For tests of models alone; what the whole
engine generates is driven by `tests.e2e.driving`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kernels
from engine.models.batch import ForwardBatch, KVCache, Model


@dataclass
class PagedRequest:
    """One sequence: its tokens so far, how many of them are in the cache, and in which blocks."""

    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


class PagedDriver:
    """A model with a cache of `num_blocks` blocks that are handed out in random order."""

    def __init__(
        self, model: Model, *, num_blocks: int = 96, block_size: int = 4, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.block_size = block_size
        spec = model.spec
        shape = (num_blocks, spec.num_layers, spec.num_kv_heads, block_size)
        # NaN shows every read of a slot that was never written.
        self.cache = KVCache(
            k=torch.full((*shape, spec.head_dim), torch.nan, dtype=dtype, device=model.device),
            v=torch.full((*shape, spec.head_dim_v), torch.nan, dtype=dtype, device=model.device),
        )
        self.free_blocks = random.Random(0).sample(range(num_blocks), num_blocks)

    def forward(self, work: Sequence[tuple[PagedRequest, int]]) -> list[Tensor]:
        """Compute the next `count` tokens of each request in one batch; hidden states [count, C] of each."""
        hidden = self.model.forward(self._batch(work), self.cache)
        return list(hidden.split([count for _, count in work]))

    def _batch(self, work: Sequence[tuple[PagedRequest, int]]) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for request, count in work:
            span = range(request.num_computed, request.num_computed + count)
            while len(request.blocks) * self.block_size < span.stop:
                request.blocks.append(self.free_blocks.pop())
            token_ids += request.token_ids[span.start : span.stop]
            positions += span
            slots += [request.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in span]
            starts.append(len(token_ids))
            request.num_computed = span.stop
        width = max(len(request.blocks) for request, _ in work)
        table = [request.blocks + [0] * (width - len(request.blocks)) for request, _ in work]
        seq_lens = [request.num_computed for request, _ in work]
        device = self.model.device
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_table=torch.tensor(table, dtype=torch.int32, device=device),
            max_seqlen_q=max(count for _, count in work),
            attention_plan=kernels.plan_attention(
                starts, seq_lens, num_kv_heads=self.model.spec.num_kv_heads, device=device
            ),
        )


def prompt_logits(model: Model, token_ids: Sequence[int], *, first_chunk: int) -> Tensor:
    """Logits [T, V] of every position of a sequence that runs in two chunks."""
    driver = PagedDriver(model)
    request = PagedRequest(list(token_ids))
    chunks = [driver.forward([(request, count)])[0] for count in (first_chunk, len(token_ids) - first_chunk)]
    return model.logits(torch.cat(chunks))
