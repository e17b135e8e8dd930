"""The choice on GPUs, in Triton: one program takes one row and finds the last kept key by bisection over its bits.

Each of the 32 steps counts the row's scores that are at least a candidate; then equal scores are settled from the
latest slot down, and a running count gives every kept slot its place. Bound by reading the row some 35 times, from
cache. No sort, so rows of any length fit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024


@triton.jit
def _ordered(scores):
    """Integers in int64 from 0 that order as the floats do, NaN lowest."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2147483648
    return tl.where(scores != scores, 0, ordered)


@triton.jit
def _top_slots_kernel(
    scores_ptr,
    kept_ptr,
    lengths_ptr,
    index_ptr,
    stride,  # elements between rows
    width,  # of a row of index
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * stride
    index_ptr += row * width
    length = tl.load(lengths_ptr + row)
    count = tl.minimum(tl.load(kept_ptr + row), length)

    # The largest threshold that at least `count` scores reach.
    threshold = tl.zeros([], tl.int64)
    for step in range(0, 32):
        candidate = threshold + (tl.full([], 2147483648, tl.int64) >> step)
        reached = tl.zeros([], tl.int64)
        for first in range(0, length, TILE):
            slot = first + tl.arange(0, TILE)
            keys = _ordered(tl.load(scores_ptr + slot, mask=slot < length, other=0.0))
            reached += tl.sum(((keys >= candidate) & (slot < length)).to(tl.int64))
        threshold = tl.where(reached >= count, candidate, threshold)

    above = tl.zeros([], tl.int64)
    equal = tl.zeros([], tl.int64)
    for first in range(0, length, TILE):
        slot = first + tl.arange(0, TILE)
        keys = _ordered(tl.load(scores_ptr + slot, mask=slot < length, other=0.0))
        above += tl.sum(((keys > threshold) & (slot < length)).to(tl.int64))
        equal += tl.sum(((keys == threshold) & (slot < length)).to(tl.int64))
    skipped = equal - (count - above)  # of the equal ones, the earliest

    num_equal = tl.zeros([], tl.int64)
    num_kept = tl.zeros([], tl.int64)
    for first in range(0, length, TILE):
        slot = first + tl.arange(0, TILE)
        keys = _ordered(tl.load(scores_ptr + slot, mask=slot < length, other=0.0))
        is_equal = (keys == threshold) & (slot < length)
        equal_before = num_equal + tl.cumsum(is_equal.to(tl.int64)) - is_equal.to(tl.int64)
        is_kept = ((keys > threshold) & (slot < length)) | (is_equal & (equal_before >= skipped))
        place = num_kept + tl.cumsum(is_kept.to(tl.int64)) - 1
        tl.store(index_ptr + place, slot.to(tl.int64), mask=is_kept & (count > 0))
        num_equal += tl.sum(is_equal.to(tl.int64))
        num_kept += tl.sum(is_kept.to(tl.int64))
    for first in range(0, width, TILE):
        place = first + tl.arange(0, TILE)
        tl.store(index_ptr + place, tl.full([TILE], -1, tl.int64), mask=(place >= count) & (place < width))


def top_slots(scores: Tensor, num_kept: Tensor, lengths: Tensor, index: Tensor) -> None:
    """See `kernels.top_slots.top_slots`; writes index [N, K]."""
    tile = min(_TILE, triton.next_power_of_2(scores.shape[1]))
    _top_slots_kernel[(scores.shape[0],)](
        scores, num_kept.contiguous(), lengths.contiguous(), index, scores.stride(0), index.shape[1], TILE=tile
    )
