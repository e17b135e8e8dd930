"""The choice through the native library (kernel.cpp)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.native import INT, PTR


def top_slots(scores: Tensor, num_kept: Tensor, lengths: Tensor, index: Tensor) -> None:
    """See `kernels.top_slots.top_slots`; writes index [N, K]."""
    num_kept, lengths = num_kept.contiguous(), lengths.contiguous()
    native.function("kvasir_top_slots", PTR, INT, PTR, PTR, PTR, INT, INT, INT, INT)(
        scores.data_ptr(),
        scores.stride(0),
        num_kept.data_ptr(),
        lengths.data_ptr(),
        index.data_ptr(),
        index.shape[1],
        *scores.shape,
        native.num_threads(),
    )
