"""The logits through the native library (kernel.cpp)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.native import DTYPE_CODES, FLOAT, INT, PTR


def attention_logits(
    q: Tensor, k_cache: Tensor, block_table: Tensor, rows: Tensor, visible: Tensor, channels: Tensor | None,
    out: Tensor, *, scale: float, soft_cap: float,
) -> None:  # fmt: skip
    """See `kernels.attention_logits.attention_logits`; of each token its row and how many slots it sees, [T] int32."""
    argtypes = *[PTR, INT, INT, INT] * 2, PTR, INT, *[PTR] * 3, INT, PTR, *[INT] * 7, FLOAT, FLOAT
    native.function("kvasir_attention_logits", *argtypes)(
        *(q.data_ptr(), q.stride(0), q.stride(1), DTYPE_CODES[q.dtype]),
        *(k_cache.data_ptr(), k_cache.stride(0), k_cache.stride(1), DTYPE_CODES[k_cache.dtype]),
        *(block_table.data_ptr(), block_table.stride(0)),
        *(rows.data_ptr(), visible.data_ptr()),
        *((None, q.shape[2]) if channels is None else (channels.data_ptr(), channels.shape[1])),
        out.data_ptr(),
        *q.shape[:2],
        *k_cache.shape[1:],
        out.shape[2],
        native.num_threads(),
        scale,
        soft_cap,
    )
