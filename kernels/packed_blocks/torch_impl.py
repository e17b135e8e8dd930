"""Packed blocks in plain torch: all units of a pool at once, codes by arithmetic on the bits of floats."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packed_blocks.layout import SCALE_BITS, VALUE_GROUP, Side, packed_layout, packed_places
from kernels.paged_attention.plan import AttentionPlan, Row

HALF_MAX = 65504.0


def plan(rows: tuple[Row, ...], num_kv_heads: int, device: torch.device) -> None:
    """No work list: rows run one after the other."""


def seal_blocks(
    k_pool: Tensor,
    v_pool: Tensor,
    origins: tuple[Tensor, Tensor],
    sources: tuple[Tensor, Tensor],
    destination: Tensor,
    places: Tensor,
    format: str,
) -> None:
    """origins, sources: of keys and of values, where block sources[i] of origins is read."""
    for (pool, side), origin, source in zip(_sides(k_pool, v_pool, format), origins, sources, strict=True):
        packed = _pack(origin[source].float(), side)  # [n, L, H_kv, bytes]
        offsets = places[:, None] * side.group_bytes + torch.arange(packed.shape[3], device=pool.device)
        # the indexed dims stand apart, so they come first: [n, bytes, L, H_kv]
        _units(pool)[destination[:, None], :, :, offsets] = packed.permute(0, 3, 1, 2)


def unpack_blocks(
    k_pool: Tensor, v_pool: Tensor, blocks: Tensor, places: Tensor, format: str, k: Tensor, v: Tensor
) -> None:
    for (pool, side), out in zip(_sides(k_pool, v_pool, format), (k, v), strict=True):
        offsets = places[:, None] * side.group_bytes + torch.arange(side.group_bytes, device=pool.device)
        packed = _units(pool)[blocks[:, None], :, :, offsets]  # [n, bytes, L, H_kv]
        out.copy_(_unpack(packed.permute(0, 2, 3, 1), side))


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
    soft_cap: float,
    format: str,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
) -> None:
    """See `kernels.packed_blocks.packed_attention`; writes out [T, H, Dv] and lse [T, H]."""
    num_kv_heads = k_pool.shape[2]
    places = packed_places(format, k_pool.shape[4], v_pool.shape[4], k_pool.shape[3], k_pool.dtype)
    start = 0
    for index, row in enumerate(plan.rows):
        tokens = slice(start, start + row.num_queries)
        start = tokens.stop
        length = int(packed_lens[index])
        if row.num_queries == 0:
            continue
        if length == 0:
            out[tokens], lse[tokens] = 0.0, -torch.inf
            continue
        keys, values = (
            _row(pool, side, packed_table[index], places, length, layer)
            for pool, side in _sides(k_pool, v_pool, format)
        )
        queries = q[tokens].float().unflatten(1, (num_kv_heads, -1))  # [n, H_kv, G, D]
        scores = torch.einsum("nhgd,hsd->hgns", queries, keys) * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        out[tokens] = torch.einsum("hgns,hsd->nhgd", scores.softmax(-1), values).flatten(1, 2).to(out.dtype)
        lse[tokens] = scores.logsumexp(-1).permute(2, 0, 1).flatten(1)


def _sides(k_pool: Tensor, v_pool: Tensor, format: str) -> list[tuple[Tensor, Side]]:
    layout = packed_layout(format, k_pool.shape[4], v_pool.shape[4], k_pool.shape[3], k_pool.dtype)
    return [(k_pool, layout.keys), (v_pool, layout.values)]


def _units(pool: Tensor) -> Tensor:
    """The pool as bytes, [NB, L, H_kv, unit_bytes]."""
    return pool.view(torch.uint8).flatten(3)


def _row(pool: Tensor, side: Side, table: Tensor, places: int, length: int, layer: int) -> Tensor:
    """A row's packed tokens of one layer, [H_kv, length, dim] float32."""
    count = -(-length // side.block_size)
    units = _units(pool)[table[: -(-count // places)].long(), layer]  # [blocks, H_kv, unit_bytes]
    groups = units[..., : places * side.group_bytes].unflatten(2, (places, -1)).transpose(1, 2).flatten(0, 1)[:count]
    return _unpack(groups, side).transpose(0, 1).flatten(1, 2)[:, :length]


def _pack(x: Tensor, side: Side) -> Tensor:
    """x [..., BS, dim] float32 -> [..., bytes] uint8."""
    if side.coding == "int8":
        return _pack_int8(x).flatten(-2)
    if side.coding == "fp8":
        return _pack_fp8(x.flatten(-2))
    return _pack_uniform(x, side)


def _unpack(packed: Tensor, side: Side) -> Tensor:
    """packed [..., group_bytes] uint8 -> [..., BS, dim] float32."""
    if side.coding == "int8":
        codes = packed.unflatten(-1, (side.block_size, side.dim)).contiguous()
        number = _number_in(codes)
        scale = ((number + 832) << 20).view(torch.float32).masked_fill(number == 255, torch.nan)
        return codes.view(torch.int8).float() * scale
    if side.coding == "fp8":
        codes = packed.contiguous()
        number = _number_in(codes)
        scale = (number << 23).view(torch.float32).masked_fill(number == 255, torch.nan)
        return (codes.view(torch.float8_e4m3fn).float() * scale).unflatten(-1, (side.block_size, side.dim))
    return _unpack_uniform(packed, side)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _poison(x: Tensor, dim: int) -> Tensor:
    """0 where all values along dim are finite, else NaN."""
    return (x - x).sum(dim, keepdim=True)


# ---- int8 and fp8: 8 bits of scale in the lowest bits of the first 8 codes ----


def _pack_int8(x: Tensor) -> Tensor:
    """x [..., n] that share a scale of 3 mantissa bits -> [..., n] uint8."""
    largest = x.abs().amax(-1, keepdim=True) / 127
    number = (((_bits(largest) + 0xFFFFF) >> 20) - 832).clamp(0, 254)
    y = (x.abs() / ((number + 832) << 20).view(torch.float32)).clamp_max(127)
    magnitude = y.nan_to_num(0).round().int()
    magnitude = _with_number(magnitude, number.masked_fill(_poison(x, -1).isnan(), 255), y, magnitude.float())
    return torch.where(torch.signbit(x), -magnitude, magnitude).to(torch.int8).view(torch.uint8)


def _pack_fp8(x: Tensor) -> Tensor:
    """x [..., n] that share a power of two -> [..., n] uint8."""
    largest = x.abs().amax(-1, keepdim=True) / 448
    number = ((_bits(largest) + 0x7FFFFF) >> 23).clamp(1, 253)
    y = (x.abs() * ((254 - number) << 23).view(torch.float32)).clamp_max(448)
    code = y.to(torch.float8_e4m3fn)
    number = number.masked_fill(_poison(x, -1).isnan(), 255)
    magnitude = _with_number(code.view(torch.uint8).int(), number, y, code.float())
    return (magnitude + 128 * torch.signbit(x)).to(torch.uint8)


def _with_number(magnitude: Tensor, number: Tensor, y: Tensor, value: Tensor) -> Tensor:
    """Moves the first 8 codes where their lowest bit is wrong: to the neighbour towards y, at a tie the smaller one."""
    wanted = number >> torch.arange(SCALE_BITS, device=number.device, dtype=torch.int32) & 1
    first, rest = magnitude[..., :SCALE_BITS], magnitude[..., SCALE_BITS:]
    is_up = (y[..., :SCALE_BITS] > value[..., :SCALE_BITS]) | (first == 0)
    moved = torch.where((first & 1) == wanted, first, torch.where(is_up, first + 1, first - 1))
    return torch.cat([moved, rest], dim=-1)


def _number_in(codes: Tensor) -> Tensor:
    """codes [..., n] uint8 -> [..., 1] int32."""
    shifts = torch.arange(SCALE_BITS, device=codes.device, dtype=torch.int32)
    return ((codes[..., :SCALE_BITS].int() & 1) << shifts).sum(-1, keepdim=True, dtype=torch.int32)


# ---- kivi: code * scale + zero ----


def _grouped(x: Tensor, side: Side) -> Tensor:
    """x [..., BS, dim] -> [..., BS, groups, 32], short groups filled up with their own last value."""
    missing = side.num_value_groups * VALUE_GROUP - side.dim
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)
    return x.unflatten(-1, (side.num_value_groups, VALUE_GROUP))


def _pack_uniform(x: Tensor, side: Side) -> Tensor:
    levels = 2**side.bits - 1
    y, dim = (x, -2) if side.coding == "channel" else (_grouped(x, side), -1)
    zero = y.amin(dim, keepdim=True).clamp(-HALF_MAX, HALF_MAX).half()
    scale = ((y.amax(dim, keepdim=True) - zero.float()).clamp_min(0) / levels).clamp_max(HALF_MAX).half()
    codes = ((y - zero.float()) / scale.float()).where(scale > 0, 0).nan_to_num(0).clamp(0, levels).round().int()
    zero = zero + _poison(y, dim).half()
    if side.coding == "token":
        codes = codes.flatten(-2)[..., : side.dim]
    parts = 8 // side.bits
    shifts = torch.arange(parts, device=x.device, dtype=torch.int32)[:, None] * side.bits
    rows = (codes.unflatten(-1, (parts, side.row_bytes)) << shifts).sum(-2).to(torch.uint8)  # [..., BS, row_bytes]
    lead = x.shape[:-2]
    scales = torch.cat([scale.reshape(*lead, -1), zero.reshape(*lead, -1)], dim=-1).view(torch.uint8)
    return torch.cat([scales, rows.flatten(-2)], dim=-1)


def _unpack_uniform(packed: Tensor, side: Side) -> Tensor:
    num_bytes = side.num_scales * 4
    # a copy, for a view of another size needs true strides even in dims of one
    scales = packed[..., :num_bytes].clone(memory_format=torch.contiguous_format).view(torch.float16)
    scale, zero = scales.float().chunk(2, dim=-1)
    rows = packed[..., num_bytes : num_bytes + side.block_size * side.row_bytes].unflatten(-1, (side.block_size, -1))
    codes = torch.cat([rows >> shift & (2**side.bits - 1) for shift in range(0, 8, side.bits)], dim=-1).float()
    if side.coding == "channel":
        return codes * scale.unsqueeze(-2) + zero.unsqueeze(-2)
    scale, zero = (
        each.unflatten(-1, (side.block_size, -1)).repeat_interleave(VALUE_GROUP, -1)[..., : side.dim]
        for each in (scale, zero)
    )
    return codes * scale + zero
