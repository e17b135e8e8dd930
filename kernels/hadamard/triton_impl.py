"""The transform on GPUs. One program transforms a tile of rows in registers; bound by memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 2048


@triton.jit
def _mix(y, ROWS: tl.constexpr, SIZE: tl.constexpr, DISTANCE: tl.constexpr):
    """Sums and differences of the entries that lie `DISTANCE` apart."""
    pairs = tl.permute(tl.reshape(y, [ROWS, SIZE // (2 * DISTANCE), 2, DISTANCE]), [0, 1, 3, 2])
    first, second = tl.split(pairs)
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(pairs, [0, 1, 3, 2]), [ROWS, SIZE])


@triton.jit
def _hadamard_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    scale,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # of the tile
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offset = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = (row < num_rows)[:, None]
    y = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    for log_distance in tl.static_range(LOG_SIZE):
        y = _mix(y, ROWS, SIZE, 1 << log_distance)
    tl.store(out_ptr + offset, (y * scale).to(out_ptr.dtype.element_ty), mask=mask)


def hadamard(x: Tensor, scale: float, out: Tensor) -> None:
    """x, out [N, size]."""
    num_rows, size = x.shape
    rows = max(1, min(TILE_ELEMENTS // size, triton.next_power_of_2(num_rows)))
    _hadamard_kernel[(triton.cdiv(num_rows, rows),)](
        x, out, num_rows, scale, SIZE=size, LOG_SIZE=size.bit_length() - 1, ROWS=rows
    )
