"""Whether a weight survives float16, whose range is far narrower than bfloat16's. Knows no layout."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_FLOAT16 = torch.finfo(torch.float16).max
MIN_NORMAL_FLOAT16 = torch.finfo(torch.float16).tiny

# Largest loss in elements below float16's normal range, as a share of the tensor's norm: that of one float32 rounding,
# so that the loss stays below what accumulating in float32 costs anyway.
MAX_UNDERFLOW_LOSS = 2.0**-23

_CHUNK_ELEMENTS = 1 << 22  # keeps the temporaries small beside a large weight


def float16_problem(weight: Tensor) -> str | None:
    """Why `weight` [N, K] cannot be held in float16, or None when it can.

    It cannot when an element is beyond 65504 (or not finite), or when the elements that float16 stores as subnormals
    or zero lose more than MAX_UNDERFLOW_LOSS of the tensor's norm. Ordinary rounding of a float32 weight is no problem.
    """
    total = loss = 0.0
    for chunk in weight.split(max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))):
        values = chunk.float()
        largest = values.abs().max().item() if values.numel() else 0.0
        if not largest <= MAX_FLOAT16:
            return f"its largest magnitude is {largest:g}, float16 ends at {MAX_FLOAT16:g}"
        tiny = values[values.abs() < MIN_NORMAL_FLOAT16].double()
        total += values.double().square().sum().item()
        loss += (tiny - tiny.to(torch.float16).double()).square().sum().item()
    if loss > MAX_UNDERFLOW_LOSS**2 * total:
        share = (loss / total) ** 0.5
        return f"float16 would lose {share:.1e} of its norm in tiny elements, the limit is {MAX_UNDERFLOW_LOSS:.1e}"
    return None
