"""Attention of new tokens over a paged KV cache, for any mix of prompt chunks and decoding rows.

Knows block tables, slot positions and lengths; no requests, no layers, no RoPE (keys are cached rotated).
Shape letters: T new tokens, R rows (requests), H query heads, H_kv kv heads, D and Dv head dims, NB blocks of BS slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from kernels import backend
from kernels.paged_attention.plan import AttentionPlan, Extents, FixedPlan, check_parents
from kernels.paged_attention.triton_plan import num_decode_items

__all__ = ["fixed_decode_plan", "num_decode_items", "paged_attention", "plan_attention"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def plan_attention(
    cu_seqlens_q: Extents,
    seq_lens: Extents,
    *,
    num_kv_heads: int = 1,
    device: torch.device | str = "cpu",
    parents: Sequence[int] | None = None,
) -> AttentionPlan:
    """Divide a step's attention into work items; once per step, for all layers and any window.

    cu_seqlens_q  [R+1]  row r owns tokens cu_seqlens_q[r] to cu_seqlens_q[r+1]; starts at 0, does not fall
    seq_lens      [R] or [R, H_kv]  as for `paged_attention`, or an upper bound of it
    num_kv_heads          how many heads compute side by side; only a hint for the division of work
    parents       [T]     what each token continues: an earlier one of its row, counted from the row's first, or -1 for
                          the first, which continues the slots before the row's. A token then sees these slots and the
                          tokens on its path, itself the last, as if they were adjacent. None: each continues the one
                          before it
    The first two are read on the host, when the plan is first used: give lists or what lies on the CPU, else that waits
    for the device; and leave them as they are until then.
    Raises ValueError when lengths disagree, or when what a token continues does not come before it.
    """
    starts, lengths = len(cu_seqlens_q), len(seq_lens)
    if starts != lengths + 1:
        raise ValueError(f"cu_seqlens_q has {starts} entries, need one more than the {lengths} of seq_lens")
    device = torch.device(device)
    module = backend.implementation("paged_attention", device)
    plan = AttentionPlan(cu_seqlens_q, seq_lens, num_kv_heads, device, module, parents)
    if parents is not None:
        check_parents(parents, plan.rows)
    return plan


def fixed_decode_plan(
    num_rows: int, num_items: int, *, num_kv_heads: int = 1, device: torch.device | str = "cpu"
) -> FixedPlan:
    """A plan of `num_rows` rows of one token each that a CUDA graph may capture: `fill` it before each replay.

    num_items  most pieces that the rows are divided into, at least one a row: `num_decode_items` of their lengths. A
               graph launches as many programs per kv head, those without work included; hence bucket it as the rows
    A row of length 0 sees nothing and gives zeros: rows that fill up a bucket. A row's result has the same bits as
    under a plan of `plan_attention`, whatever the room. Raises ValueError for fewer items than rows.
    """
    device = torch.device(device)
    module = backend.implementation("paged_attention", device)
    plan = FixedPlan(range(num_rows + 1), [0] * num_rows, num_kv_heads, device, module)
    if num_items < num_rows:
        raise ValueError(f"every row takes an item; {num_items} are too few for {num_rows} rows")
    if hasattr(module, "fixed_plan"):
        plan.__dict__["work"] = module.fixed_plan(num_rows, num_items, device)
    plan.fill([0] * num_rows)
    return plan


@overload
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    window: int = ...,
    soft_cap: float = ...,
    sinks: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    plan: AttentionPlan | None = ...,
) -> Tensor: ...
@overload
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    window: int = ...,
    soft_cap: float = ...,
    sinks: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[True],
    plan: AttentionPlan | None = ...,
) -> tuple[Tensor, Tensor]: ...
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    plan: AttentionPlan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention of every row's new tokens over its cached slots.

    q             [T, H, D]             float; any strides, last dim contiguous
    k_cache       [NB, H_kv, BS, D]     float, float32 q or the type of q; any strides, last two dims contiguous
    v_cache       [NB, H_kv, BS, Dv]    type of k_cache
    block_table   [R, MB] int32         block of slots i*BS to (i+1)*BS - 1; or [R, H_kv, MB], each head its own, and
                                        then the caches may have one head only, which all tables share
    seq_lens      [R] int32             slots visible to the row's last query; or [R, H_kv]
    cu_seqlens_q  [R+1] int32           row r owns tokens cu_seqlens_q[r] to cu_seqlens_q[r+1]; covers all T
    scale         factor on q.k; soft_cap > 0 then makes it soft_cap * tanh(score / soft_cap)
    window        > 0: a query sees the last `window` slots only, its own included
    sinks         [H] float32           a further logit per head that takes part in the softmax without a value
    out           [T, H, Dv]            type of q, last dim contiguous; made when None
    plan          from `plan_attention` for the same rows and device; made when None

    Query i of a row with n queries sits at slot seq_len - n + i and sees the slots up to its own, or what the plan's
    `parents` say. Slots and table
    entries beyond a row's seq_len are never read. A query that sees nothing gives zeros (lse: its sink or -inf).
    Returns out, and with return_lse also the log of the softmax denominator, sinks included, [T, H] float32.
    A row's result does not depend on the other rows; in the C++ implementation it is bit for bit the same for every
    division of the row into chunks and every number of threads, and for a token of a tree that of its path alone.
    Raises ValueError when shapes or types disagree.
    """
    module = backend.implementation("paged_attention", q.device)
    if plan is None:
        plan = plan_attention(cu_seqlens_q, seq_lens, num_kv_heads=_num_kv_heads(k_cache, block_table), device=q.device)
    elif plan.module is not module:
        raise ValueError(f"the plan was made by {plan.module.__name__}, {module.__name__} runs")
    if out is None:
        out = torch.empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    tensors = q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q
    layout = tuple([(t.shape, t.stride(), t.dtype) for t in (*tensors, out)])
    if layout not in plan.checked:
        _check(*tensors, out, plan)
        plan.checked.add(layout)
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.dtype != torch.float32 or sinks.stride(0) != 1):
        raise ValueError(f"sinks is {list(sinks.shape)} {sinks.dtype}, need [{q.shape[1]}] float32, contiguous")
    if q.shape[0] > 0:
        module.paged_attention(
            *tensors,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            out=out,
            lse=lse,
            plan=plan,
            layout=layout,
        )
    return out if lse is None else (out, lse)


def _num_kv_heads(k_cache: Tensor, block_table: Tensor) -> int:
    return block_table.shape[1] if block_table.dim() == 3 else k_cache.shape[1]


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    out: Tensor,
    plan: AttentionPlan,
) -> None:
    num_kv_heads, num_rows = _num_kv_heads(k_cache, block_table), len(plan.rows)
    if q.dtype not in _FLOATS or k_cache.dtype not in _FLOATS or q.dtype not in (torch.float32, k_cache.dtype):
        raise ValueError(f"q is {q.dtype} and the cache {k_cache.dtype}; q must be float32 or of the cache's type")
    if v_cache.dtype != k_cache.dtype or v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"k_cache {list(k_cache.shape)} and v_cache {list(v_cache.shape)} differ in layout or type")
    if k_cache.shape[1] != num_kv_heads and k_cache.shape[1] != 1:
        raise ValueError(f"block_table has {num_kv_heads} heads, the cache {k_cache.shape[1]}; need as many, or one")
    if q.shape[1] % num_kv_heads != 0 or q.shape[2] != k_cache.shape[3] or q.stride(2) != 1:
        raise ValueError(f"q {list(q.shape)} (last dim contiguous) does not fit {num_kv_heads} kv heads of the cache")
    for cache in (k_cache, v_cache):
        if cache.stride(3) != 1 or cache.stride(2) != cache.shape[3]:
            raise ValueError(f"the last two dims of a cache must be contiguous, got strides {cache.stride()}")
    if block_table.shape[0] != num_rows or seq_lens.shape[0] != num_rows or cu_seqlens_q.shape[0] != num_rows + 1:
        raise ValueError(
            f"the plan has {num_rows} rows, block_table {block_table.shape[0]}, seq_lens {seq_lens.shape[0]} and "
            f"cu_seqlens_q {cu_seqlens_q.shape[0]} entries; need R, R, R and R+1"
        )
    if not block_table.dtype == seq_lens.dtype == cu_seqlens_q.dtype == torch.int32:
        raise ValueError("block_table, seq_lens and cu_seqlens_q must be int32")
    if cu_seqlens_q.stride(0) != 1 or block_table.stride(-1) != 1:
        raise ValueError("cu_seqlens_q and the rows of block_table must be contiguous")
    if seq_lens.dim() == 2 and seq_lens.shape[1] != num_kv_heads:
        raise ValueError(f"seq_lens {list(seq_lens.shape)} does not fit {num_kv_heads} kv heads")
    if plan.num_tokens != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} tokens, the plan {plan.num_tokens}")
    shape = (*q.shape[:2], v_cache.shape[3])
    if out.shape != shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(f"out is {list(out.shape)} {out.dtype}, need {list(shape)} {q.dtype}, last dim contiguous")
