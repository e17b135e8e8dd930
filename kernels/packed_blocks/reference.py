"""The definition of packed blocks: codes by search among all that are allowed, attention in float64.

One unit (block, layer, kv head) at a time. Written without the bit tricks of the others, so that it can judge them.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from kernels.packed_blocks.layout import SCALE_BITS, VALUE_GROUP, Side, packed_layout
from kernels.paged_attention.plan import AttentionPlan, Row

# Magnitudes of the codes 0, 1, 2, ... without their sign.
_MAGNITUDES = {
    "int8": torch.arange(128, dtype=torch.float64),
    "fp8": torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double(),
}


def plan(rows: tuple[Row, ...], num_kv_heads: int, device: torch.device) -> None:
    """No work list: the definition walks over the rows."""


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
    layout = packed_layout(format, k_pool.shape[4], v_pool.shape[4], k_pool.shape[3], k_pool.dtype)
    sides = (k_pool, layout.keys), (v_pool, layout.values)
    for (pool, side), origin, source in zip(sides, origins, sources, strict=True):
        moves = list(zip(source.tolist(), destination.tolist(), places.tolist(), strict=True))
        for (src, dst, place), layer, head in product(moves, range(pool.shape[1]), range(pool.shape[2])):
            packed = _pack(origin[src, layer, head].float().cpu(), side)
            _unit(pool, dst, layer, head)[place * side.group_bytes :][: len(packed)] = packed


def unpack_blocks(
    k_pool: Tensor, v_pool: Tensor, blocks: Tensor, places: Tensor, format: str, k: Tensor, v: Tensor
) -> None:
    layout = packed_layout(format, k_pool.shape[4], v_pool.shape[4], k_pool.shape[3], k_pool.dtype)
    for pool, side, out in ((k_pool, layout.keys, k), (v_pool, layout.values, v)):
        for i, layer, head in product(range(len(blocks)), range(pool.shape[1]), range(pool.shape[2])):
            unit = _unit(pool, int(blocks[i]), layer, head)
            out[i, layer, head] = _unpack(unit[int(places[i]) * side.group_bytes :][: side.group_bytes], side)


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
    layout = packed_layout(format, k_pool.shape[4], v_pool.shape[4], k_pool.shape[3], k_pool.dtype)
    group = q.shape[1] // k_pool.shape[2]
    for row, head in product(range(len(plan.rows)), range(k_pool.shape[2])):
        length = int(packed_lens[row])
        k, v = (
            _row(pool, side, packed_table[row], layout.places, length, layer, head).to(q.device)
            for pool, side in ((k_pool, layout.keys), (v_pool, layout.values))
        )
        for token in range(int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1])):
            heads = slice(head * group, (head + 1) * group)
            scores = q[token, heads].double() @ k.T * scale
            if soft_cap > 0:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            out[token, heads] = (scores.softmax(1) @ v).to(out.dtype)
            lse[token, heads] = scores.logsumexp(1).float() if length else -math.inf


def _row(pool: Tensor, side: Side, table: Tensor, places: int, length: int, layer: int, head: int) -> Tensor:
    """The row's tokens of one kv head, [length, dim] float64."""
    groups = [torch.empty(0, side.dim)]
    for group in range(-(-length // side.block_size)):
        unit = _unit(pool, int(table[group // places]), layer, head)
        groups.append(_unpack(unit[group % places * side.group_bytes :][: side.group_bytes], side))
    return torch.cat(groups)[:length].double()


def _unit(pool: Tensor, block: int, layer: int, head: int) -> Tensor:
    """The bytes of one unit, a view."""
    return pool[block, layer, head].view(torch.uint8).view(-1)


# ---- int8 and fp8: sign and magnitude, and a scale in the lowest bits of the first codes ----


def _pack(x: Tensor, side: Side) -> Tensor:
    """x [BS, dim] float32 -> the bytes of the group."""
    if side.coding == "int8":
        return torch.cat([_pack_scaled(token, "int8") for token in x])
    if side.coding == "fp8":
        return _pack_scaled(x.flatten(), "fp8")
    return _pack_uniform(x, side)


def _unpack(packed: Tensor, side: Side) -> Tensor:
    """The bytes of a group -> [BS, dim] float32."""
    packed = packed.cpu()
    if side.coding == "int8":
        return torch.stack([_unpack_scaled(token, "int8") for token in packed.view(-1, side.dim)])
    if side.coding == "fp8":
        return _unpack_scaled(packed, "fp8").view(-1, side.dim)
    return _unpack_uniform(packed, side)


def _scales(kind: str) -> Tensor:
    """The scales that the 8 bits stand for, ascending; the last one says that a value was not finite."""
    code = torch.arange(255, dtype=torch.float64)
    if kind == "fp8":
        return 2.0 ** (code - 127)
    return (1 + (code % 8) / 8) * 2.0 ** (code // 8 - 23)


def _pack_scaled(x: Tensor, kind: str) -> Tensor:
    """x [n] float32 -> [n] bytes that share a scale."""
    largest = x.abs().max() / (127 if kind == "int8" else 448)
    scales = _scales(kind)
    first = 1 if kind == "fp8" else 0  # 2^-127 is no normal float
    if x.isfinite().all():
        number = min(254, max(first, int(torch.searchsorted(scales, largest.double()))))
        target = (x / scales[number].float()).abs()
    else:
        number, target = 255, torch.zeros_like(x)
    magnitudes = _MAGNITUDES[kind]
    target = target.double().clamp_max(float(magnitudes[-1]))
    codes = _nearest(target, magnitudes)
    for i in range(SCALE_BITS):  # these carry a bit of the scale's number: the next code on the side of the value
        if codes[i] % 2 != number >> i & 1:
            codes[i] += 1 if target[i] > magnitudes[codes[i]] or codes[i] == 0 else -1
    is_negative = torch.signbit(x)
    if kind == "int8":
        return torch.where(is_negative, -codes, codes).to(torch.int8).view(torch.uint8)
    return (codes + 128 * is_negative).to(torch.uint8)


def _nearest(y: Tensor, magnitudes: Tensor) -> Tensor:
    """The codes nearest to y [n] >= 0, ties to even ones."""
    distance = (magnitudes - y[:, None]).abs()  # [n, codes]
    is_nearest = distance == distance.amin(1, keepdim=True)
    is_even = torch.arange(len(magnitudes)) % 2 == 0
    return (is_nearest.int() + (is_nearest & is_even).int()).argmax(1)


def _unpack_scaled(packed: Tensor, kind: str) -> Tensor:
    number = sum((int(packed[i]) & 1) << i for i in range(SCALE_BITS))
    if number == 255:
        return torch.full(packed.shape, math.nan)
    values = packed.view(torch.int8).double() if kind == "int8" else packed.view(torch.float8_e4m3fn).double()
    return (values * _scales(kind)[number]).float()


# ---- kivi: code * scale + zero ----


def _pack_uniform(x: Tensor, side: Side) -> Tensor:
    levels = 2**side.bits - 1
    codes = torch.zeros(x.shape, dtype=torch.int64)
    scales, zeros = [], []
    for where in _shared(side):
        values = x[where].flatten()
        zero = values.min().clamp(-65504, 65504).half() + 0.0  # a zero without sign
        scale = ((values.max() - zero.float()).clamp_min(0) / levels).clamp_max(65504).half()
        if not values.isfinite().all():
            zero = torch.tensor(math.nan).half()
        y = ((x[where] - zero.float()) / scale.float()).nan_to_num(0, 0, 0) if scale > 0 else torch.zeros(())
        codes[where] = y.clamp(0, levels).round().long()  # torch rounds ties to even
        scales.append(scale)
        zeros.append(zero)
    parts = 8 // side.bits  # byte j holds channels j, j + dim / parts, ... from its low bits up
    shifts = torch.arange(parts)[:, None] * side.bits
    packed = (codes.view(len(x), parts, -1) << shifts).sum(1).to(torch.uint8)
    return torch.cat([torch.stack(scales + zeros).view(torch.uint8), packed.flatten()])


def _unpack_uniform(packed: Tensor, side: Side) -> Tensor:
    scales, zeros = packed[: side.num_scales * 4].view(torch.float16).float().chunk(2)
    rows = packed[side.num_scales * 4 :][: side.block_size * side.row_bytes].view(side.block_size, -1)
    shifts = range(0, 8, side.bits)
    codes = torch.cat([rows >> shift & (2**side.bits - 1) for shift in shifts], dim=1)
    x = codes.float()
    for where, scale, zero in zip(_shared(side), scales, zeros, strict=True):
        x[where] = (codes[where].double() * scale + zero).float()
    return x


def _shared(side: Side) -> list[tuple[slice, slice]]:
    """The parts of a group that have one scale and one zero: a channel of all tokens, or 32 channels of one token."""
    if side.coding == "channel":
        return [(slice(None), slice(channel, channel + 1)) for channel in range(side.dim)]
    starts = range(0, side.dim, VALUE_GROUP)
    return [
        (slice(token, token + 1), slice(start, start + VALUE_GROUP))
        for token, start in product(range(side.block_size), starts)
    ]
