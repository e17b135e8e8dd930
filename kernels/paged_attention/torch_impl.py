"""Paged attention in plain torch, row by row: gather the row's keys and values, two matrix products, float32 inside.

The fallback where no compiler exists. Holds scores of one row at a time.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from kernels.paged_attention.plan import AttentionPlan, Row


def plan(rows: tuple[Row, ...], num_kv_heads: int, device: torch.device) -> None:
    """No work list: rows run one after the other."""


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    plan: AttentionPlan,
    layout: Hashable,
) -> None:
    """See `kernels.paged_attention.paged_attention`; writes out [T, H, Dv] and lse [T, H]."""
    num_kv_heads = block_table.shape[1] if block_table.dim() == 3 else k_cache.shape[1]
    start = 0
    for index, row in enumerate(plan.rows):
        tokens = slice(start, start + row.num_queries)
        start = tokens.stop
        if row.num_queries == 0:
            continue
        lengths = seq_lens[index].expand(num_kv_heads)  # [H_kv]
        longest = max(0, row.seq_len)
        keys, values = (_gather(cache, block_table[index], longest, lengths) for cache in (k_cache, v_cache))
        queries = q[tokens].float().unflatten(1, (num_kv_heads, -1))  # [n, H_kv, G, D]
        scores = torch.einsum("nhgd,hsd->hgns", queries, keys) * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        paths = None if plan.paths is None else plan.paths[tokens]
        if paths is not None and int(paths[0, 0]) > 0:
            hidden = ~_visible_in_tree(lengths, paths.to(lengths.device), longest, window)
        else:
            hidden = ~_visible(lengths, row.num_queries, longest, window)  # [H_kv, n, S]
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        if sinks is not None:
            sink = sinks.view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        if scores.shape[-1] == 0:
            out[tokens] = 0.0
            if lse is not None:
                lse[tokens] = -torch.inf
            continue
        norm = scores.logsumexp(-1, keepdim=True)
        weights = torch.exp(scores - norm.masked_fill(norm == -torch.inf, 0.0))[..., :longest]
        out[tokens] = torch.einsum("hgns,hsd->nhgd", weights, values).flatten(1, 2).to(out.dtype)
        if lse is not None:
            lse[tokens] = norm[..., 0].permute(2, 0, 1).flatten(1)


def _gather(cache: Tensor, table: Tensor, longest: int, lengths: Tensor) -> Tensor:
    """The row's slots in order, [H_kv, longest, D] float32; zero beyond a head's own length."""
    num_blocks = -(-longest // cache.shape[2])
    if table.dim() == 1:
        gathered = cache[table[:num_blocks].long()].transpose(0, 1)  # [H_kv, blocks, BS, D]
    else:
        heads = torch.arange(table.shape[0], device=table.device) if cache.shape[1] > 1 else 0
        used = torch.arange(num_blocks, device=table.device) * cache.shape[2] < lengths[:, None]
        blocks = table[:, :num_blocks].long().where(used, 0)
        gathered = cache[blocks.T, heads].transpose(0, 1)
    slots = gathered.flatten(1, 2)[:, :longest].float()
    unused = torch.arange(longest, device=table.device) >= lengths[:, None]
    return slots.masked_fill(unused[..., None], 0.0)


def _visible(lengths: Tensor, num_queries: int, longest: int, window: int) -> Tensor:
    """Whether query n of each kv head sees slot s, [H_kv, n, longest]."""
    slots = torch.arange(longest, device=lengths.device)
    own = lengths[:, None] - num_queries + torch.arange(num_queries, device=lengths.device)  # [H_kv, n]
    seen = slots <= own[..., None]
    return seen & (slots > own[..., None] - window) if window > 0 else seen


def _visible_in_tree(lengths: Tensor, paths: Tensor, longest: int, window: int) -> Tensor:
    """As `_visible`, for a row that is a tree: paths [n, W] of its tokens."""
    num_queries = paths.shape[0]
    counts = paths[:, 0]
    is_node = torch.arange(paths.shape[1] - 1, device=paths.device) < counts[:, None]  # [n, W - 1]
    sees = torch.zeros(num_queries, num_queries, dtype=torch.bool, device=paths.device)
    sees[is_node.nonzero()[:, 0], paths[:, 1:][is_node].long()] = True
    before = lengths[:, None] - num_queries  # [H_kv, 1]
    slots = torch.arange(longest, device=lengths.device)
    node = slots - before  # [H_kv, S], negative before the row's first
    in_tree = sees[:, node.clamp(0, num_queries - 1)].transpose(0, 1)  # [H_kv, n, S]
    seen = torch.where((node < 0)[:, None], True, in_tree & (node < num_queries)[:, None])
    if window <= 0:
        return seen
    place = torch.where(node < 0, slots, before + counts[node.clamp(0, num_queries - 1)] - 1)  # in the text, [H_kv, S]
    own = before + counts - 1  # [H_kv, n]
    return seen & (place[:, None] > own[..., None] - window)
