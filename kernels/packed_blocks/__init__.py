"""Packed blocks: ordinary blocks of the KV pool whose bytes hold several groups of BS tokens as short codes.

Knows block ids, places and lengths; no requests. A row's packed table is [MBp] block ids, and its g-th group of BS
tokens is place g % m of block g // m, where m is `packed_places`.
Shape letters: NB blocks, L layers, H_kv kv heads, BS slots of a block, D and Dv head dims, T tokens, R rows, H heads.

Formats; every rounding is to the nearest, ties to even, and all implementations write the same bytes:
  int8   a token of a head has codes -127..127 times one scale with 3 mantissa bits, no less than its largest / 127
  fp8    e4m3 codes times a power of two for the BS tokens of a head, by which its largest value fits into 448
  kivi4, kivi2  code * scale + zero with scale = (max - zero) / (2^bits - 1) and zero = min, both fp16: keys per channel
         over the BS tokens of the group, values per token over 32 channels. (z, s of the source, in its storage type.)
The scale of int8 and fp8 takes no room: its 8 bits are the lowest bits of the first 8 codes (of the token; of the
group). Of these, a code with the wrong bit moves to the next one on the side of the value (at a tie, to the smaller
magnitude). So a block holds exactly 2 (16-bit pools) or 4 (float32) groups; with scales beside the codes a 16-bit pool
would hold one, and int8 would save nothing.
A token or group with a value that is not finite comes back as NaN. int8 saturates at 56,896, kivi at 65,504.
  kivi4_rotated, kivi2_rotated  the same, with keys that went through `hadamard` before, as queries then do, so that the
         error of a channel with a wide range is shared by all
Source of kivi: Liu et al. 2024, arXiv:2402.02750; differs: groups of BS tokens, and values are packed with their keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend
from kernels.hadamard import hadamard, hadamard_size
from kernels.packed_blocks.layout import FORMATS, PackedFormat, packed_bits_per_value, packed_layout, packed_places
from kernels.paged_attention.plan import AttentionPlan, Extents

__all__ = [
    "FORMATS",
    "PackedFormat",
    "packed_attention",
    "packed_bits_per_value",
    "packed_places",
    "plan_packed_attention",
    "seal_blocks",
    "seal_groups",
    "unpack_blocks",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def seal_blocks(
    k_pool: Tensor, v_pool: Tensor, source: Tensor, destination: Tensor, places: Tensor, *, format: str
) -> None:
    """Write block source[i], all layers and heads, packed into place places[i] of block destination[i].

    k_pool, v_pool  [NB, L, H_kv, BS, D], [NB, L, H_kv, BS, Dv]  float, one type, contiguous
    source, destination, places  [n] int64, on any device; every slot of a source is filled; no block is both source and
                                 destination; (destination, place) are unique and places below `packed_places`
    Nothing else of a destination changes. Ids and places are not checked. Raises ValueError when shapes, types or the
    format do not fit.
    """
    _check_pools(k_pool, v_pool, format)
    for name, found in (("source", source), ("destination", destination), ("places", places)):
        _check_ids(name, found, source.shape[0])
    if source.shape[0]:
        source, destination, places = (x.to(k_pool.device).contiguous() for x in (source, destination, places))
        k_from, k_source = k_pool, source
        if _is_rotated(k_pool, v_pool, format):  # the source may be shared, so what is coded is a copy
            k_from, k_source = hadamard(k_pool[source].float()), torch.arange(len(source), device=source.device)
        module = backend.implementation("packed_blocks", k_pool.device)
        module.seal_blocks(k_pool, v_pool, (k_from, v_pool), (k_source, source), destination, places, format)


def seal_groups(
    k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor, destination: Tensor, places: Tensor, *, format: str
) -> None:
    """As `seal_blocks`, of tokens that are in no block.

    k, v  [n, L, H_kv, BS, D], [n, L, H_kv, BS, Dv]  of the pools' type, contiguous
    """
    _check_pools(k_pool, v_pool, format)
    for pool, tokens in ((k_pool, k), (v_pool, v)):
        expected = (len(destination), *pool.shape[1:])
        if tokens.shape != expected or tokens.dtype != pool.dtype or not tokens.is_contiguous():
            raise ValueError(f"tokens are {list(tokens.shape)} {tokens.dtype}, need {list(expected)} {pool.dtype}")
    for name, found in (("destination", destination), ("places", places)):
        _check_ids(name, found, k.shape[0])
    if k.shape[0]:
        k_from = hadamard(k.float()) if _is_rotated(k_pool, v_pool, format) else k
        source = torch.arange(k.shape[0], device=k.device)
        destination, places = (x.to(k.device).contiguous() for x in (destination, places))
        module = backend.implementation("packed_blocks", k_pool.device)
        module.seal_blocks(k_pool, v_pool, (k_from, v), (source, source), destination, places, format)


def unpack_blocks(
    k_pool: Tensor, v_pool: Tensor, blocks: Tensor, places: Tensor, *, format: str
) -> tuple[Tensor, Tensor]:
    """What place places[i] of block blocks[i] holds: [n, L, H_kv, BS, D] and [n, L, H_kv, BS, Dv] float32.

    Arguments as for `seal_blocks`.
    """
    _check_pools(k_pool, v_pool, format)
    for name, found in (("blocks", blocks), ("places", places)):
        _check_ids(name, found, blocks.shape[0])
    k, v = (torch.empty(blocks.shape[0], *x.shape[1:], device=x.device) for x in (k_pool, v_pool))
    if blocks.shape[0]:
        ids = [x.to(k_pool.device).contiguous() for x in (blocks, places)]
        backend.implementation("packed_blocks", k_pool.device).unpack_blocks(k_pool, v_pool, *ids, format, k, v)
    if _is_rotated(k_pool, v_pool, format):
        k = hadamard(k, scale=1 / hadamard_size(k.shape[-1]))
    return k, v


def plan_packed_attention(
    cu_seqlens_q: Extents, packed_lens: Extents, *, num_kv_heads: int = 1, device: torch.device | str = "cpu"
) -> AttentionPlan:
    """Divide a step's `packed_attention` into work items, once per step for all layers; see `plan_attention`."""
    device = torch.device(device)
    module = backend.implementation("packed_blocks", device)
    return AttentionPlan(cu_seqlens_q, packed_lens, num_kv_heads, device, module)


def packed_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    packed_table: Tensor,
    packed_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    layer: int,
    scale: float,
    format: str,
    soft_cap: float = 0.0,
    out: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over all packed tokens of its row, to be merged with that over its other tokens.

    q             [T, H, D]           float32 or the type of the pools; any strides, last dim contiguous
    k_pool, v_pool  as for `seal_blocks`; `layer` of them is read
    packed_table  [R, MBp] int32      the row's packed blocks in order
    packed_lens   [R] int32           tokens in them; 0: the row has none and gets zeros and -inf
    cu_seqlens_q  [R+1] int32         row r owns tokens cu_seqlens_q[r] to cu_seqlens_q[r+1]; covers all T
    scale, soft_cap, plan             as for `paged_attention`; `plan` from `plan_packed_attention`
    out           [T, H, Dv]          type of q, last dim contiguous; made when None

    Every packed token lies before every query, so there is no causal mask; there is no sliding window either: layers
    that have one keep their tokens unpacked. Sinks belong to the other part, where they are counted once.
    Bytes beyond a row's length and table entries beyond it are never read.
    Returns out and the log of the softmax denominator [T, H] float32. A row's result does not depend on the other rows;
    in the C++ implementation it is bit for bit the same for every division into chunks and every number of threads.
    Raises ValueError when shapes, types or the format do not fit.
    """
    module = backend.implementation("packed_blocks", q.device)
    if plan is None:
        plan = plan_packed_attention(cu_seqlens_q, packed_lens, num_kv_heads=k_pool.shape[2], device=q.device)
    elif plan.module is not module:
        raise ValueError(f"the plan was made by {plan.module.__name__}, {module.__name__} runs")
    if out is None:
        out = torch.empty((*q.shape[:2], v_pool.shape[4]), dtype=q.dtype, device=q.device)
    tensors = q, k_pool, v_pool, packed_table, packed_lens, cu_seqlens_q
    layout = (format, *[(t.shape, t.stride(), t.dtype) for t in (*tensors, out)])
    if layout not in plan.checked:
        _check_attention(*tensors, out, plan, format)
        plan.checked.add(layout)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.shape[0] > 0:
        if _is_rotated(k_pool, v_pool, format):
            q = hadamard(q, scale=1 / hadamard_size(q.shape[-1]))
        module.packed_attention(
            *(q, *tensors[1:]), layer=layer, scale=scale, soft_cap=soft_cap, format=format, out=out, lse=lse, plan=plan
        )
    return out, lse


def _is_rotated(k_pool: Tensor, v_pool: Tensor, format: str) -> bool:
    layout = packed_layout(format, k_pool.shape[4], v_pool.shape[4], k_pool.shape[3], k_pool.dtype)
    return layout.is_rotated


def _check_pools(k_pool: Tensor, v_pool: Tensor, format: str) -> None:
    if k_pool.ndim != 5 or k_pool.shape[:4] != v_pool.shape[:4] or k_pool.dtype != v_pool.dtype:
        raise ValueError(f"pools {list(k_pool.shape)} and {list(v_pool.shape)} must be [NB, L, H_kv, BS, D], alike")
    if k_pool.dtype not in _FLOATS or not (k_pool.is_contiguous() and v_pool.is_contiguous()):
        raise ValueError(f"pools must be contiguous and of a float type, got {k_pool.dtype}")
    if packed_places(format, k_pool.shape[4], v_pool.shape[4], k_pool.shape[3], k_pool.dtype) < 1:
        raise ValueError(f"{format} of {k_pool.shape[3]} tokens does not fit into a block of {k_pool.dtype}")


def _check_ids(name: str, ids: Tensor, count: int) -> None:
    if ids.shape != (count,) or ids.dtype != torch.int64:
        raise ValueError(f"{name} must be [{count}] int64, got {list(ids.shape)} {ids.dtype}")


def _check_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    packed_table: Tensor,
    packed_lens: Tensor,
    cu_seqlens_q: Tensor,
    out: Tensor,
    plan: AttentionPlan,
    format: str,
) -> None:
    _check_pools(k_pool, v_pool, format)
    num_rows = len(plan.rows)
    if q.dtype not in (torch.float32, k_pool.dtype):
        raise ValueError(f"q is {q.dtype} and the pools {k_pool.dtype}; q must be float32 or of the pools' type")
    if q.shape[1] % k_pool.shape[2] != 0 or q.shape[2] != k_pool.shape[4] or q.stride(2) != 1:
        raise ValueError(f"q {list(q.shape)} (last dim contiguous) does not fit pools {list(k_pool.shape)}")
    if not packed_table.dtype == packed_lens.dtype == cu_seqlens_q.dtype == torch.int32:
        raise ValueError("packed_table, packed_lens and cu_seqlens_q must be int32")
    if packed_table.shape[0] != num_rows or packed_lens.shape != (num_rows,) or len(cu_seqlens_q) != num_rows + 1:
        raise ValueError(
            f"the plan has {num_rows} rows, packed_table {packed_table.shape[0]}, packed_lens {len(packed_lens)} and "
            f"cu_seqlens_q {len(cu_seqlens_q)} entries; need R, R, R and R+1"
        )
    if cu_seqlens_q.stride(0) != 1 or packed_lens.stride(0) != 1 or packed_table.stride(1) != 1:
        raise ValueError("cu_seqlens_q, packed_lens and the rows of packed_table must be contiguous")
    if plan.num_tokens != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} tokens, the plan {plan.num_tokens}")
    shape = (*q.shape[:2], v_pool.shape[4])
    if out.shape != shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(f"out is {list(out.shape)} {out.dtype}, need {list(shape)} {q.dtype}, last dim contiguous")
