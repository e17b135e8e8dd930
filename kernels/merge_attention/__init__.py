"""Attention over parts of a cache, put together: the merge of two partial results, and the part of one virtual key.

Knows partial results with their softmax denominators; no caches, no policies.
Shape letters: T tokens, R rows (requests), H query heads, H_kv kv heads, D and Dv head dims.
Source of the virtual key: Tang et al. 2024, arXiv:2407.15891 (its "compensation token").
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Make out_a and lse_a the attention over both sets of keys, in place.

    out_a, out_b  [T, H, Dv] float, each of its own type; any strides, last dim contiguous
    lse_a, lse_b  [T, H] float32, contiguous: log of the part's softmax denominator, -inf where it saw nothing

    Where one part saw nothing the other one stays as it is, bit for bit (up to the type of out_a). A sink belongs into
    one of the parts only. Raises ValueError when shapes or types disagree.
    """
    for name, out in (("out_a", out_a), ("out_b", out_b)):
        if out.dim() != 3 or out.dtype not in _FLOATS or out.stride(2) != 1 or out.shape != out_a.shape:
            raise ValueError(f"{name} is {list(out.shape)} {out.dtype}, need {list(out_a.shape)}, last dim contiguous")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous():
            raise ValueError(
                f"{name} is {list(lse.shape)} {lse.dtype}, need {list(out_a.shape[:2])} float32, contiguous"
            )
    if out_a.numel():
        backend.implementation("merge_attention", out_a.device).merge_attention(out_a, lse_a, out_b, lse_b)


def virtual_key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of every row's tokens to one key that stands for e^log_count equal ones: out and lse to be merged.

    q             [T, H, D] float
    k, v          [R, H_kv, D], [R, H_kv, Dv] float32: the mean key and value of what they stand for
    log_count     [R, H_kv] float32, -inf for a key that stands for nothing
    cu_seqlens_q  [R+1] int32  row r owns tokens cu_seqlens_q[r] to cu_seqlens_q[r+1]; covers all T
    scale, soft_cap  as for `paged_attention`; log_count is added to the capped logit

    Returns out [T, H, Dv] float32, which is v (0 for a key of nothing), and lse [T, H] float32. One expression over
    T * H numbers, hence plain torch on every device. Raises ValueError when shapes or types disagree.
    """
    num_rows, num_kv_heads = log_count.shape
    if k.shape != (num_rows, num_kv_heads, q.shape[2]) or v.shape[:2] != k.shape[:2] or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} and log_count {list(log_count.shape)} do not fit"
        )
    if cu_seqlens_q.shape != (num_rows + 1,):
        raise ValueError(f"cu_seqlens_q has {len(cu_seqlens_q)} entries, need one more than the {num_rows} rows")
    row = torch.repeat_interleave(cu_seqlens_q.diff().long(), output_size=q.shape[0])  # [T]
    grouped = q.float().unflatten(1, (num_kv_heads, -1))  # [T, H_kv, G, D]
    x = (grouped * k[row].unsqueeze(2)).sum(-1) * scale
    if soft_cap > 0:
        x = soft_cap * torch.tanh(x / soft_cap)
    lse = (x + log_count[row].unsqueeze(2)).flatten(1)
    values = torch.where(log_count.unsqueeze(2) == -torch.inf, 0.0, v)
    return values[row].repeat_interleave(grouped.shape[2], dim=1), lse.contiguous()
