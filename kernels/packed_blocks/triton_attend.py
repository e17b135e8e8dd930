"""Attention over packed blocks in Triton for heads and blocks whose sizes are powers of two; bound by memory.

One program holds a tile of queries of one row times the heads that share a kv head, and walks over a split of the row's
packed tokens, several groups at a time. Codes come as 32-bit words and leave them by shifts. In a word, channels stand
in another order than in a head, so queries are read and results are written in the order of the words. What scales all
channels of a token alike (int8, fp8) scales the token's score, and its weight, instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.packed_blocks.layout import Side
from kernels.packed_blocks.triton_seal import as_float

MAX_BLOCK_N = 64  # tokens at a time
TILE_ELEMENTS = 8 * 1024  # of keys or values, where these are multiplied in 16 bits
_LOG2_E = tl.constexpr(1.4426950408889634)
_NOT_FINITE = tl.constexpr(255)  # the number of a scale, as in __init__.py
VALUE_GROUP = tl.constexpr(32)  # as in layout.py


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _channels(DIM: tl.constexpr, BITS: tl.constexpr):
    """[DIM]: the channel of each code, in the order of words and of their bits."""
    IN_BYTE: tl.constexpr = 8 // BITS
    code = tl.arange(0, DIM)
    in_word = code % (4 * IN_BYTE)
    return in_word % IN_BYTE * (DIM // IN_BYTE) + code // (4 * IN_BYTE) * 4 + in_word // IN_BYTE


@triton.jit
def _load_codes(words_ptr, row, mask, DIM: tl.constexpr, BITS: tl.constexpr):
    """[G * BS, DIM] int32, each code in the low bits; row [G, BS] is the token's first word."""
    ROW_WORDS: tl.constexpr = DIM * BITS // 32
    j = tl.arange(0, ROW_WORDS)
    x = tl.load(words_ptr + row[:, :, None] + j[None, None, :], mask=mask[:, :, None], other=0)
    x = tl.join(x, x >> 16)
    x = tl.join(x, x >> 8)
    if BITS <= 4:
        x = tl.join(x, x >> 4)
    if BITS == 2:
        x = tl.join(x, x >> 2)
    return tl.reshape(x, [row.shape[0] * row.shape[1], DIM])


@triton.jit
def _whole(codes, CODING: tl.constexpr, dtype: tl.constexpr):
    """The codes of int8 and fp8 as numbers; float16 and bfloat16 hold them exactly."""
    low = (codes & 255).to(tl.uint8)
    if CODING == "int8":
        return low.to(tl.int8, bitcast=True).to(dtype)
    return low.to(tl.float8e4nv, bitcast=True).to(dtype)


@triton.jit
def _load_scale(words_ptr, first, mask, CODING: tl.constexpr):
    """[G * BS] float32: a scale is the low bits of the first 8 codes; first [G, BS] is their first word."""
    low = tl.load(words_ptr + first, mask=mask, other=0)
    high = tl.load(words_ptr + first + 1, mask=mask, other=0)
    number = tl.zeros_like(low)
    for bit in tl.static_range(4):
        number |= ((low >> (8 * bit)) & 1) << bit
        number |= ((high >> (8 * bit)) & 1) << (4 + bit)
    scale = as_float((number + 832) << 20 if CODING == "int8" else number << 23)
    return tl.reshape(tl.where(number == _NOT_FINITE, float("nan"), scale), [first.shape[0] * first.shape[1]])


@triton.jit
def _fraction(codes, BITS: tl.constexpr):
    """1 + code / 2^BITS in float32, made of its bits: cheaper than a conversion, and as exact."""
    SHIFT: tl.constexpr = 23 - BITS
    return as_float(((codes << SHIFT) & (((1 << BITS) - 1) << SHIFT)) | 0x3F800000)


@triton.jit
def _channel_scales(halves_ptr, group, mask, DIM: tl.constexpr, BITS: tl.constexpr):
    """Keys of kivi: two [G, 1, DIM] float32, by which a fraction is multiplied and what is then added."""
    IN_BYTE: tl.constexpr = 8 // BITS
    NUM_GROUPS: tl.constexpr = group.shape[0]
    d = tl.arange(0, DIM)
    index = (group * 2)[:, None] + d[None, :]
    scale = tl.load(halves_ptr + index, mask=mask[:, None], other=0.0)
    zero = tl.load(halves_ptr + DIM + index, mask=mask[:, None], other=0.0)
    scale = tl.permute(tl.reshape(scale, [NUM_GROUPS, IN_BYTE, DIM // (4 * IN_BYTE), 4]), [0, 2, 3, 1])
    zero = tl.permute(tl.reshape(zero, [NUM_GROUPS, IN_BYTE, DIM // (4 * IN_BYTE), 4]), [0, 2, 3, 1])
    factor = tl.reshape(scale, [NUM_GROUPS, 1, DIM]).to(tl.float32) * (1 << BITS)
    return factor, tl.reshape(zero, [NUM_GROUPS, 1, DIM]).to(tl.float32) - factor


@triton.jit
def _token_scales(halves_ptr, group, t, mask, DIM: tl.constexpr, BITS: tl.constexpr):
    """Values of kivi: the same, [N, PARTS, 1, IN_BYTE], of VALUE_GROUP channels each."""
    IN_BYTE: tl.constexpr = 8 // BITS
    PARTS: tl.constexpr = max(1, DIM // IN_BYTE // VALUE_GROUP)  # of the channels that lie alike in their bytes
    PER_TOKEN: tl.constexpr = DIM // VALUE_GROUP
    SHAPE: tl.constexpr = [group.shape[0] * t.shape[0], PARTS, 1, IN_BYTE]
    part, in_byte = tl.arange(0, PARTS)[:, None], tl.arange(0, IN_BYTE)[None, :]
    c = in_byte * (DIM // IN_BYTE) // VALUE_GROUP + part
    index = ((group * 2)[:, None] + t[None, :] * PER_TOKEN)[:, :, None, None] + c[None, None, :, :]
    mask4 = mask[:, :, None, None] & (c >= 0)[None, None, :, :]
    scale = tl.load(halves_ptr + index, mask=mask4, other=0.0)
    zero = tl.load(halves_ptr + t.shape[0] * PER_TOKEN + index, mask=mask4, other=0.0)
    factor = tl.reshape(scale, SHAPE).to(tl.float32) * (1 << BITS)
    return factor, tl.reshape(zero, SHAPE).to(tl.float32) - factor


@triton.jit
def attend_words_kernel(
    q_ptr, k_words_ptr, k_halves_ptr, v_words_ptr, v_halves_ptr, table_ptr, lens_ptr, starts_ptr, acc_ptr, stats_ptr,
    item_ptr,
    scale, soft_cap,
    q_stride_t, q_stride_h, table_stride_r,                    # elements
    k_block_words, k_unit_words, k_first_word,                 # k_first_word: of the layer in its block
    v_block_words, v_unit_words, v_first_word,
    PLACES: tl.constexpr, BS: tl.constexpr, BITS: tl.constexpr,
    D: tl.constexpr, K_CODING: tl.constexpr, K_GROUP_WORDS: tl.constexpr,
    DV: tl.constexpr, V_CODING: tl.constexpr, V_GROUP_WORDS: tl.constexpr,
    GROUP: tl.constexpr,                                       # query heads of one kv head
    NUM_QUERIES: tl.constexpr,                                 # of a tile
    BLOCK_M: tl.constexpr,                                     # at least NUM_QUERIES * GROUP
    NUM_GROUPS: tl.constexpr, HAS_CAP: tl.constexpr,           # NUM_GROUPS: of BS tokens, at a time
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.load(item_ptr + item * 4).to(tl.int64)
    first_query = tl.load(item_ptr + item * 4 + 1)
    begin = tl.load(item_ptr + item * 4 + 2)
    end = tl.minimum(tl.load(item_ptr + item * 4 + 3), tl.load(lens_ptr + row))
    start = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - start

    m = tl.arange(0, BLOCK_M)
    query = first_query + m // GROUP
    token = (start + query).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    row_mask = (m < NUM_QUERIES * GROUP) & (query < num_queries)
    q_offset = token[:, None] * q_stride_t + head[:, None] * q_stride_h + _channels(D, BITS)[None, :]
    q = tl.load(q_ptr + q_offset, mask=row_mask[:, None], other=0.0)

    BLOCK_N: tl.constexpr = NUM_GROUPS * BS
    K_CODES: tl.constexpr = K_GROUP_WORDS - BS * D * BITS // 32  # words before the codes
    V_CODES: tl.constexpr = V_GROUP_WORDS - BS * DV * BITS // 32
    IN_BYTE: tl.constexpr = 8 // BITS
    PARTS: tl.constexpr = max(1, DV // IN_BYTE // VALUE_GROUP)
    g = tl.arange(0, NUM_GROUPS)
    t = tl.arange(0, BS)
    k_words_ptr += k_first_word + kv_head * k_unit_words
    k_halves_ptr += (k_first_word + kv_head * k_unit_words) * 2
    v_words_ptr += v_first_word + kv_head * v_unit_words
    v_halves_ptr += (v_first_word + kv_head * v_unit_words) * 2
    table_ptr += row * table_stride_r

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    for tile in range(begin, end, BLOCK_N):
        in_range = tile + tl.arange(0, BLOCK_N) < end
        index = tile // BS + g
        is_group = index * BS < end
        mask = (index * BS)[:, None] + t[None, :] < end
        block = tl.load(table_ptr + index // PLACES, mask=is_group, other=0).to(tl.int64)
        place = index % PLACES

        group = block * k_block_words + place * K_GROUP_WORDS
        k_row = group[:, None] + K_CODES + t[None, :] * (D * BITS // 32)
        codes = _load_codes(k_words_ptr, k_row, mask, D, BITS)
        if K_CODING == "channel":
            factor, offset = _channel_scales(k_halves_ptr, group, is_group, D, BITS)
            k = tl.reshape(_fraction(codes, BITS), [NUM_GROUPS, BS, D]) * factor + offset
            k = tl.reshape(k.to(q.dtype), [BLOCK_N, D])
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        else:
            first = k_row if K_CODING == "int8" else group[:, None] + tl.zeros_like(k_row)
            k_scale = _load_scale(k_words_ptr, first, mask, K_CODING)
            k = _whole(codes, K_CODING, q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (k_scale * scale)[None, :]
        if HAS_CAP:
            scores = soft_cap * (1.0 - 2.0 / (_exp(2.0 * scores / soft_cap) + 1.0))  # tanh
        scores = tl.where(in_range[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = _exp(scores - base[:, None])
        decay = _exp(largest - base)
        total = total * decay + tl.sum(weights, axis=1)
        largest = now

        group = block * v_block_words + place * V_GROUP_WORDS
        v_row = group[:, None] + V_CODES + t[None, :] * (DV * BITS // 32)
        codes = _load_codes(v_words_ptr, v_row, mask, DV, BITS)
        if V_CODING == "token":
            factor, offset = _token_scales(v_halves_ptr, group, t, mask, DV, BITS)
            v = tl.reshape(_fraction(codes, BITS), [BLOCK_N, PARTS, DV // (PARTS * IN_BYTE), IN_BYTE])
            v = tl.reshape((v * factor + offset).to(q.dtype), [BLOCK_N, DV])
        else:
            first = v_row if V_CODING == "int8" else group[:, None] + tl.zeros_like(v_row)
            v_scale = _load_scale(v_words_ptr, first, mask, V_CODING)
            if q.dtype == tl.float16:  # whose range is too small for a weight times a scale
                v = (_whole(codes, V_CODING, tl.float32) * v_scale[:, None]).to(q.dtype)
            else:
                v = _whole(codes, V_CODING, q.dtype)
                weights = weights * v_scale[None, :]
        acc = tl.dot(weights.to(q.dtype), v, acc * decay[:, None], input_precision="ieee")

    partial = (item * tl.num_programs(1) + kv_head) * BLOCK_M + m
    tl.store(acc_ptr + partial[:, None] * DV + _channels(DV, BITS)[None, :], acc)
    tl.store(stats_ptr + partial * 2, largest)
    tl.store(stats_ptr + partial * 2 + 1, total)


def suits_words(side: Side) -> bool:
    """Whether `attend_words_kernel` takes these keys or values."""
    return side.dim >= 32 and _is_power(side.dim) and side.block_size >= 4 and _is_power(side.block_size)


def words_options(keys: Side, values: Side, itemsize: int, block_m: int) -> dict[str, int]:
    """Groups at a time and registers: what compiles for sm_90 without spilling, in 16 bits at 64 and 128 channels.

    itemsize: bytes of a query's element. block_m: of the kernel.
    """
    elements = TILE_ELEMENTS if itemsize == 2 else TILE_ELEMENTS // 4  # products in float32 hold far more registers
    tokens = max(16, min(MAX_BLOCK_N, elements // max(keys.dim, values.dim)))
    options = {"NUM_GROUPS": max(1, tokens // keys.block_size)}
    if keys.num_scales == 0 and block_m <= 32:  # otherwise the compiler spills to reach 128
        options["maxnreg"] = 168
    return options


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0
