"""Attention over lists of slots: each query has its own list for each kv head, of whole blocks or of single tokens.

Knows lists, tables and the two pools; no rows, no policies. A token is a block of one slot in a view of the pools in
which every kv head of every layer has slots of its own, so one kernel serves both.
Shape letters: N queries, H query heads, H_kv kv heads, D head_dim, n slots, W entries of a list, BS block size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kernels
from engine.compression.scoring import indices
from engine.models.batch import KVCache


def listed(index: Tensor, num_items: Tensor, width: int) -> Tensor:
    """Which of `width` items each query's list names: [N, 1 | H_kv, width] bool, none beyond its first num_items.

    index      [N | 1, 1 | H_kv, K] int64, in any order, -1 and what is out of range for nothing
    num_items  [N] int64, at most width
    """
    index = index.expand(len(num_items), -1, -1)
    is_named = torch.zeros(*index.shape[:2], width + 1, dtype=torch.bool, device=index.device)
    named = index.masked_fill((index < 0) | (index >= num_items.view(-1, 1, 1)), width)
    return is_named.scatter_(2, named, True)[..., :width]


class ListAttention:
    """Attention of one layer's queries over lists, gathered until `run`."""

    def __init__(self, cache: KVCache) -> None:
        num_blocks, num_layers, num_heads, block_size, _ = cache.k.shape
        self._cache = cache
        self._block_size, self._num_heads = block_size, num_heads
        self._layer_slots = num_heads * block_size
        self._block_slots = num_layers * self._layer_slots
        num_slots = num_blocks * self._block_slots
        if num_slots > torch.iinfo(torch.int32).max:
            raise ValueError(
                f"the pools have {num_slots} slots in all layers and heads, lists of tokens count up to 2**31 - 1"
            )
        self._units = [pool.view(-1, 1, 1, pool.shape[4]) for pool in (cache.k, cache.v)]
        self._width = num_slots - (num_layers - 1) * self._layer_slots
        self._heads = torch.arange(num_heads, device=cache.k.device).view(1, -1, 1) * block_size

    def of_blocks(self, chosen: Tensor, width: int, blocks: Tensor, num_slots: Tensor) -> tuple[Tensor, Tensor]:
        """Tables [N, H_kv, W] and their slots [N, H_kv] int32.

        chosen     [N, 1 | H_kv, n] bool: numbers of blocks, the newest of each query among them
        width      W, at least as many as any query has
        blocks     [MB] int64: the row's blocks
        num_slots  [N] int64, that a query sees
        """
        places = indices(chosen, width).expand(-1, self._num_heads, -1)
        in_newest = (num_slots - 1) % self._block_size + 1
        lens = ((places >= 0).sum(-1) - 1) * self._block_size + in_newest.unsqueeze(1)
        return blocks[places.clamp_min(0)].int(), lens.int()

    def of_tokens(self, chosen: Tensor, width: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise for `run_tokens`: tables of single slots. chosen [N, 1 | H_kv, n] bool: slots."""
        slots = indices(chosen, max(1, width)).expand(-1, self._num_heads, -1)
        ids = blocks[slots.clamp_min(0) // self._block_size] * self._block_slots + self._heads
        return (ids + slots.clamp_min(0) % self._block_size).int(), (slots >= 0).sum(-1).int()

    def run_blocks(self, layer: int, q: Tensor, table: Tensor, lens: Tensor, options: dict[str, Any]) -> Tensor:
        """[N, H, Dv] of queries q [N, H, D] over tables of `of_blocks`."""
        out, _ = self._run(*self._cache.layer(layer), q, table, lens, table.shape[2] * self._block_size, options)
        return out

    def run_tokens(
        self, layer: int, key_layer: int, q: Tensor, table: Tensor, lens: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Attention of queries q [N, H, D] over tables of `of_tokens`, with keys of one layer and values of another:
        [N, H, Dv], and the log of the softmax denominator [N, H] float32, -inf over an empty list.
        """
        k, v = (
            units.narrow(0, of_layer * self._layer_slots, self._width)
            for units, of_layer in zip(self._units, (key_layer, layer), strict=True)
        )
        return self._run(k, v, q, table, lens, table.shape[2], options)

    def _run(
        self, k: Tensor, v: Tensor, q: Tensor, table: Tensor, lens: Tensor, most: int, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        num_queries = q.shape[0]
        starts = torch.arange(num_queries + 1, dtype=torch.int32)
        plan = kernels.plan_attention(starts, [most] * num_queries, num_kv_heads=self._num_heads, device=q.device)
        where = table.contiguous(), lens.contiguous(), starts.to(q.device)
        return kernels.paged_attention(q, k, v, *where, plan=plan, return_lse=True, **{**options, "window": 0})


def virtual_part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attention of q [N, H, D] over keys and values [N, H_kv, m, D] of no slot, with bias [N, H_kv, m] on the logits:
    [N, H, Dv] float32, zeros where there is none, and the log of the softmax denominator [N, H].
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))  # [N, H_kv, G, D]
    logits = torch.einsum("nhgd,nhmd->nhgm", grouped, k.float()) * options["scale"]
    if options["soft_cap"] > 0:
        logits = options["soft_cap"] * torch.tanh(logits / options["soft_cap"])
    logits += bias.unsqueeze(2)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.unsqueeze(-1)).nan_to_num(0.0)
    out = torch.einsum("nhgm,nhmd->nhgd", weights, v.float())
    return out.flatten(1, 2), lse.flatten(1, 2)
