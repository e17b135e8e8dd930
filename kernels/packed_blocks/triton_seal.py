"""Sealing of packed blocks in Triton: one program per unit (block, layer, kv head); bound by memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed_blocks.layout import SCALE_BITS, VALUE_GROUP, Side, packed_layout

_SCALE_BITS = tl.constexpr(SCALE_BITS)
_NOT_FINITE = tl.constexpr(255)  # the number of a scale, as in __init__.py
_HALF_MAX = tl.constexpr(65504.0)


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def as_float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def fp8_value(magnitude):
    return tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, as_float((magnitude + 960) << 20))


@triton.jit
def _nearest_fp8(y):
    bits = y.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (y + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # the bits of 16384.0
    return tl.where(y < 0.015625, small, rounded)


@triton.jit
def _with_bit(magnitude, bit, y, value):
    """The neighbour of a code that has the wrong lowest bit: towards y, at a tie the smaller one."""
    moved = tl.where((y > value) | (magnitude == 0), magnitude + 1, magnitude - 1)
    return tl.where((magnitude & 1) == bit, magnitude, moved)


@triton.jit
def unit_offset(id_ptr, units):
    """Place of this program in the list of blocks, and its unit of that block."""
    program = tl.program_id(0).to(tl.int64)
    return tl.load(id_ptr + program // units) * units + program % units


@triton.jit
def _seal_scaled_kernel(
    pool_ptr, bytes_ptr, source_ptr, destination_ptr, place_ptr,
    units, unit_bytes,
    BS: tl.constexpr, DIM: tl.constexpr, CODING: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_S)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (t < BS) & (d < DIM)
    x = tl.load(pool_ptr + unit_offset(source_ptr, units) * (BS * DIM) + t * DIM + d, mask=mask, other=0.0)
    x = x.to(tl.float32)
    is_finite = tl.abs(x) < float("inf")
    x = tl.where(is_finite, x, 0.0)
    largest = tl.max(tl.abs(x), axis=1)[:, None]  # [BLOCK_S, 1]
    num_bad = tl.sum((~is_finite).to(tl.int32), axis=1)[:, None]
    if CODING == "int8":
        bits = tl.div_rn(largest, tl.full([BLOCK_S, 1], 127.0, tl.float32)).to(tl.int32, bitcast=True)
        number = tl.minimum(tl.maximum(((bits + 0xFFFFF) >> 20) - 832, 0), 254)
        scale = as_float((number + 832) << 20)
        y = tl.minimum(tl.div_rn(tl.abs(x), scale + tl.zeros([BLOCK_S, BLOCK_D], tl.float32)), 127.0)
        magnitude = _round(y).to(tl.int32)
        value = magnitude.to(tl.float32)
        is_first = d < _SCALE_BITS
    else:
        largest = tl.max(largest, axis=0)[None, :]  # [1, 1]
        num_bad = tl.sum(num_bad, axis=0)[None, :]
        bits = tl.div_rn(largest, tl.full([1, 1], 448.0, tl.float32)).to(tl.int32, bitcast=True)
        number = tl.minimum(tl.maximum((bits + 0x7FFFFF) >> 23, 1), 253)
        y = tl.minimum(tl.abs(x) * as_float((254 - number) << 23), 448.0)
        magnitude = _nearest_fp8(y)
        value = fp8_value(magnitude)
        is_first = (d < _SCALE_BITS) & (t == 0)
    number = tl.where(num_bad == 0, number, _NOT_FINITE)
    bit = (number >> tl.minimum(d, _SCALE_BITS - 1)) & 1
    magnitude = tl.where(is_first, _with_bit(magnitude, bit, y, value), magnitude)
    is_negative = x.to(tl.int32, bitcast=True) < 0
    if CODING == "int8":
        code = tl.where(is_negative, -magnitude, magnitude)
    else:
        code = tl.where(is_negative, magnitude + 128, magnitude)
    group = unit_offset(destination_ptr, units) * unit_bytes
    group += tl.load(place_ptr + tl.program_id(0) // units) * (BS * DIM)
    tl.store(bytes_ptr + group + t * DIM + d, (code & 255).to(tl.uint8), mask=mask)


@triton.jit
def _seal_scales_kernel(
    pool_ptr, halves_ptr, source_ptr, destination_ptr, place_ptr,
    units, unit_bytes, group_bytes,
    BS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, NUM_SCALES: tl.constexpr,
    IS_CHANNEL: tl.constexpr,                                  # else per token and group of channels
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,              # of one group of values, for them
):  # fmt: skip
    unit_ptr = pool_ptr + unit_offset(source_ptr, units) * (BS * DIM)
    group = unit_offset(destination_ptr, units) * unit_bytes
    group += tl.load(place_ptr + tl.program_id(0) // units) * group_bytes
    scale_ptr = halves_ptr + group // 2
    t = tl.arange(0, BLOCK_S)
    first = tl.program_id(1) * BLOCK_D
    d = first + tl.arange(0, BLOCK_D)
    mask = (t < BS)[:, None] & (d < DIM)[None, :]
    x = tl.load(unit_ptr + t[:, None] * DIM + d[None, :], mask=mask, other=0.0).to(tl.float32)
    axis: tl.constexpr = 0 if IS_CHANNEL else 1
    is_finite = tl.abs(x) < float("inf")
    x = tl.where(is_finite, x, 0.0)
    num_bad = tl.sum((~is_finite).to(tl.int32), axis=axis)
    low = tl.min(tl.where(mask, x, float("inf")), axis=axis)
    high = tl.max(tl.where(mask, x, float("-inf")), axis=axis)
    zero = tl.minimum(tl.maximum(low, -_HALF_MAX), _HALF_MAX).to(tl.float16).to(tl.float32)
    span = tl.maximum(high - zero, 0.0)
    scale = tl.minimum(tl.div_rn(span, tl.full(span.shape, LEVELS, tl.float32)), _HALF_MAX)
    zero = tl.where(num_bad == 0, zero + 0.0, float("nan"))  # a zero without sign
    if IS_CHANNEL:
        index = d
        is_real = d < DIM
    else:
        index = t * tl.num_programs(1) + tl.program_id(1)
        is_real = t < BS
    tl.store(scale_ptr + index, scale.to(tl.float16), mask=is_real)
    tl.store(scale_ptr + NUM_SCALES + index, zero.to(tl.float16), mask=is_real)


@triton.jit
def _seal_codes_kernel(
    pool_ptr, bytes_ptr, halves_ptr, source_ptr, destination_ptr, place_ptr,
    units, unit_bytes, group_bytes,
    BS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, NUM_SCALES: tl.constexpr,
    PER_TOKEN: tl.constexpr, CHANNELS: tl.constexpr,           # the scale of (t, d) is t * PER_TOKEN + d // CHANNELS
    BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr,              # BLOCK_J: bytes of a token, rounded up
):  # fmt: skip
    ROW_BYTES: tl.constexpr = DIM * BITS // 8
    unit_ptr = pool_ptr + unit_offset(source_ptr, units) * (BS * DIM)
    group = unit_offset(destination_ptr, units) * unit_bytes
    group += tl.load(place_ptr + tl.program_id(0) // units) * group_bytes
    t = tl.arange(0, BLOCK_S)[:, None]
    j = tl.arange(0, BLOCK_J)[None, :]
    mask = (t < BS) & (j < ROW_BYTES)
    packed = tl.zeros([BLOCK_S, BLOCK_J], tl.int32)
    for part in tl.static_range(8 // BITS):
        d = part * ROW_BYTES + j
        x = tl.load(unit_ptr + t * DIM + d, mask=mask, other=0.0).to(tl.float32)
        index = group // 2 + t * PER_TOKEN + d // CHANNELS
        scale = tl.load(halves_ptr + index, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(halves_ptr + NUM_SCALES + index, mask=mask, other=0.0).to(tl.float32)
        y = tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0))
        y = tl.where((scale > 0) & (tl.abs(y) < float("inf")), y, 0.0)
        y = tl.minimum(tl.maximum(y, 0.0), (1 << BITS) - 1)
        packed |= _round(y).to(tl.int32) << (part * BITS)
    tl.store(bytes_ptr + group + NUM_SCALES * 4 + t * ROW_BYTES + j, packed.to(tl.uint8), mask=mask)


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
    units = k_pool.shape[1] * k_pool.shape[2]
    programs = len(destination) * units
    sides = (k_pool, layout.keys), (v_pool, layout.values)
    for (pool, side), origin, source in zip(sides, origins, sources, strict=True):
        ids = source, destination, places
        unit_bytes = side.block_size * side.dim * pool.element_size()
        codes, halves = pool.view(torch.uint8), pool.view(torch.float16)
        sizes: dict[str, Any] = {
            "BS": side.block_size,
            "DIM": side.dim,
            "BLOCK_S": triton.next_power_of_2(side.block_size),
        }
        block_d = triton.next_power_of_2(side.dim)
        if side.num_scales == 0:
            _seal_scaled_kernel[(programs,)](
                origin, codes, *ids, units, unit_bytes, CODING=side.coding, BLOCK_D=block_d, **sizes
            )
            continue
        is_channel = side.coding == "channel"
        strides = units, unit_bytes, side.group_bytes
        _seal_scales_kernel[(programs, 1 if is_channel else side.num_value_groups)](
            *(origin, halves, *ids),
            *strides,
            LEVELS=2**side.bits - 1,
            NUM_SCALES=side.num_scales,
            IS_CHANNEL=is_channel,
            BLOCK_D=block_d if is_channel else VALUE_GROUP,
            **sizes,
        )
        _seal_codes_kernel[(programs,)](
            *(origin, codes, halves, *ids),
            *strides,
            BLOCK_J=triton.next_power_of_2(side.row_bytes),
            **scale_places(side),
            **sizes,
        )


def scale_places(side: Side) -> dict[str, int]:
    is_channel = side.coding == "channel"
    return {
        "BITS": side.bits,
        "NUM_SCALES": side.num_scales,
        "PER_TOKEN": 0 if is_channel else side.num_value_groups,
        "CHANNELS": 1 if is_channel else VALUE_GROUP,
    }
