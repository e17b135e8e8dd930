"""Sampling in Triton: one pass over the logits that makes the noise on the fly, then a small merge per row.

One program of the first kernel takes one tile of one row and leaves the tile's best noised logit; one program of the
second merges a row's tiles. Bound by reading the logits once (and by Philox, ten rounds for four tokens, in sampled
rows). Where filters are on, plain torch operations set the dropped logits to -inf before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import torch_impl
from kernels.sampling.torch_impl import log_probs_of
from kernels.sampling.types import GREEDY_BELOW

__all__ = ["apply_penalties", "apply_token_bitmask", "log_probs_of", "random_bits", "sample"]

_TILE = 1024  # tokens per program: enough programs for a GPU already at one row


@triton.jit
def philox(counter, k0, k1):
    """Four words of Philox4x32-10 for uint32 counters (counter, 0, 0, 0)."""
    c0 = counter
    c1 = tl.zeros_like(counter)
    c2 = tl.zeros_like(counter)
    c3 = tl.zeros_like(counter)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        low0 = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        low1 = c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = (k0 + 0x9E3779B9).to(tl.uint32)
        k1 = (k1 + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _tile_words(first, key, TILE: tl.constexpr):
    """Words of the tokens [first, first + TILE) in token order; first is a multiple of 4."""
    counter = (first // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2, c3 = philox(counter, k0, k1)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def _log_reduced(t, exponent):
    """ln(1 + t) + exponent * ln 2, t in [sqrt(1/2) - 1, sqrt(2) - 1]: noise.h explains why not tl.log."""
    p = 7.0376836292e-2
    p = p * t - 1.1514610310e-1
    p = p * t + 1.1676998740e-1
    p = p * t - 1.2420140846e-1
    p = p * t + 1.4249322787e-1
    p = p * t - 1.6668057665e-1
    p = p * t + 2.0000714765e-1
    p = p * t - 2.4999993993e-1
    p = p * t + 3.3333331174e-1
    square = t * t
    p = p * t * square - exponent * 2.12194440e-4 - 0.5 * square
    return t + p + exponent * 0.693359375


@triton.jit
def _split_exponent(x):
    """m - 1 and e of x = m * 2^e with sqrt(1/2) <= m < sqrt(2)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return mantissa - 1.0, exponent.to(tl.float32)


@triton.jit
def gumbel(word):
    """-ln(-ln u), u = (word + 0.5) / 2^32, exact where u is next to 1 (as in noise.h)."""
    is_high = word >= 0xB504F334
    distance = tl.where(is_high, word ^ 0xFFFFFFFF, word).to(tl.uint32)
    part = (distance.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    reduced, exponent = _split_exponent(part)
    minus_log = -_log_reduced(tl.where(is_high, -part, reduced), tl.where(is_high, 0.0, exponent))
    reduced, exponent = _split_exponent(minus_log)
    return -_log_reduced(reduced, exponent)


@triton.jit
def _tile_best_kernel(
    logits_ptr,  # [N, V] float32
    temperature_ptr,  # [N] float32
    key_ptr,  # [N] int64
    best_ptr,  # [N, num_tiles] float32 out: best of (logit - top) / temperature + noise
    best_id_ptr,  # [N, num_tiles] int32 out
    top_ptr,  # [N, num_tiles] float32 out: largest logit; +inf when one is NaN or +inf
    num_tokens,
    num_tiles,
    stride,  # elements between rows of logits
    IS_GREEDY: tl.constexpr,
    GREEDY_BELOW: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    first = tile * TILE
    token = first + tl.arange(0, TILE)  # [TILE]
    x = tl.load(logits_ptr + row * stride + token, mask=token < num_tokens, other=float("-inf"))
    is_unfit = tl.max((~(x < float("inf"))).to(tl.int32), axis=0) > 0
    top = tl.max(x, axis=0)
    shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    z = x - shift  # differences to the tile's best: precise also at small temperatures
    if not IS_GREEDY:
        temperature = tl.load(temperature_ptr + row)
        if temperature >= GREEDY_BELOW:
            z = z / temperature + gumbel(_tile_words(first, tl.load(key_ptr + row), TILE))
    z = tl.where(x > float("-inf"), z, float("-inf"))
    best = tl.max(z, axis=0)
    best_id = tl.min(tl.where(z == best, token, 0x7FFFFFFF), axis=0)
    at = row * num_tiles + tile
    tl.store(best_ptr + at, best)
    tl.store(best_id_ptr + at, best_id)
    tl.store(top_ptr + at, tl.where(is_unfit, float("inf"), top))


@triton.jit
def _merge_tiles_kernel(
    best_ptr,
    best_id_ptr,
    top_ptr,
    temperature_ptr,
    out_ptr,  # [N] int64
    num_tiles,
    IS_GREEDY: tl.constexpr,
    GREEDY_BELOW: tl.constexpr,
    TILES: tl.constexpr,  # num_tiles rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    mask = tile < num_tiles
    top = tl.load(top_ptr + row * num_tiles + tile, mask=mask, other=float("-inf"))
    value = tl.load(best_ptr + row * num_tiles + tile, mask=mask, other=float("-inf"))
    token = tl.load(best_id_ptr + row * num_tiles + tile, mask=mask, other=0x7FFFFFFF)
    row_top = tl.max(top, axis=0)
    scale = 1.0
    if not IS_GREEDY:
        temperature = tl.load(temperature_ptr + row)
        scale = tl.where(temperature >= GREEDY_BELOW, 1.0 / tl.maximum(temperature, GREEDY_BELOW), 1.0)
    is_fit = tl.abs(row_top) < float("inf")
    value = value + (top - tl.where(is_fit, row_top, 0.0)) * scale
    best = tl.max(value, axis=0)
    chosen = tl.min(tl.where(value == best, token, 0x7FFFFFFF), axis=0)
    tl.store(out_ptr + row, tl.where(is_fit, chosen, -1).to(tl.int64))


@triton.jit
def _random_bits_kernel(key_ptr, out_ptr, num_tokens, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE
    token = first + tl.arange(0, TILE)
    words = _tile_words(first, tl.load(key_ptr + row), TILE)
    tl.store(out_ptr + row * num_tokens + token, words.to(tl.int64), mask=token < num_tokens)


@triton.jit
def _penalties_kernel(
    logits_ptr,
    row_ptr,
    slot_ptr,
    count_ptr,  # [P, V] int32
    prompt_ptr,  # [P, V] uint8
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    num_tokens,
    stride,
    TILE: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = token < num_tokens
    at = logits_ptr + tl.load(row_ptr + item) * stride + token
    counts_at = tl.load(slot_ptr + item) * num_tokens + token
    repetition = tl.load(repetition_ptr + item)
    x = tl.load(at, mask=mask, other=0.0)
    count = tl.load(count_ptr + counts_at, mask=mask, other=0)
    in_prompt = tl.load(prompt_ptr + counts_at, mask=mask, other=0)
    repeated = tl.where(x > 0, x / repetition, x * repetition)
    x = tl.where((count > 0) | (in_prompt > 0), repeated, x)
    penalty = tl.load(frequency_ptr + item) * count.to(tl.float32) + tl.load(presence_ptr + item)
    tl.store(at, tl.where(count > 0, x - penalty, x), mask=mask)


@triton.jit
def _bitmask_kernel(logits_ptr, mask_ptr, num_tokens, num_words, stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = token < num_tokens
    word = tl.load(mask_ptr + row * num_words + token // 32, mask=mask, other=-1)
    at = logits_ptr + row * stride + token
    x = tl.load(at, mask=mask, other=0.0)
    # Adding keeps NaN visible.
    tl.store(at, x + tl.where(((word >> (token % 32)) & 1) != 0, 0.0, float("-inf")), mask=mask)


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
    keys: Tensor | None,
) -> Tensor:
    num_rows, num_tokens = logits.shape
    chosen = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return chosen
    is_greedy = temperature is None
    if temperature is not None:
        logits = torch_impl.keep_filtered(logits, temperature, top_k, top_p, min_p, typical_p)
    num_tiles = triton.cdiv(num_tokens, _TILE)
    best = torch.empty(num_rows, num_tiles, device=logits.device)
    best_id = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=logits.device)
    top = torch.empty_like(best)
    _tile_best_kernel[(num_rows, num_tiles)](
        logits,
        temperature,
        keys,
        best,
        best_id,
        top,
        num_tokens,
        num_tiles,
        logits.stride(0),
        IS_GREEDY=is_greedy,
        GREEDY_BELOW=GREEDY_BELOW,
        TILE=_TILE,
    )
    _merge_tiles_kernel[(num_rows,)](
        best,
        best_id,
        top,
        temperature,
        chosen,
        num_tiles,
        IS_GREEDY=is_greedy,
        GREEDY_BELOW=GREEDY_BELOW,
        TILES=triton.next_power_of_2(num_tiles),
    )
    return chosen


def random_bits(keys: Tensor, num_tokens: int) -> Tensor:
    words = torch.empty(keys.shape[0], num_tokens, dtype=torch.int64, device=keys.device)
    if words.numel():
        _random_bits_kernel[(keys.shape[0], triton.cdiv(num_tokens, _TILE))](keys, words, num_tokens, TILE=_TILE)
    return words


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    num_tokens = logits.shape[1]
    if rows.shape[0]:
        _penalties_kernel[(rows.shape[0], triton.cdiv(num_tokens, _TILE))](
            logits,
            rows,
            slots,
            output_counts,
            prompt_mask,
            repetition,
            presence,
            frequency,
            num_tokens,
            logits.stride(0),
            TILE=_TILE,
        )


def apply_token_bitmask(logits: Tensor, mask: Tensor) -> None:
    num_rows, num_tokens = logits.shape
    if num_rows:
        _bitmask_kernel[(num_rows, triton.cdiv(num_tokens, _TILE))](
            logits, mask, num_tokens, mask.shape[1], logits.stride(0), TILE=_TILE
        )
