"""Which slots of each row have the highest scores: the choice of a cache policy, in the order of the slots.

Knows rows of scores; no layers, heads or policies. Shape letters: N rows, n slots of the longest, K slots kept at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend


def top_slots(scores: Tensor, num_kept: Tensor, lengths: Tensor) -> Tensor:
    """The min(num_kept, length) highest of each row's first `length` scores: [N, K] int64, ascending, then -1.

    scores    [N, n] float32, last dim contiguous; NaN is below everything, -0.0 equals 0.0
    num_kept  [N] int32 or int64, not negative; K is the largest of them, or n if that is less
    lengths   [N] int32 or int64, from 0 to n

    Equal scores: the later slot comes first. All implementations choose the same slots.
    Reads the largest num_kept on the host. Raises ValueError when shapes or types disagree.
    """
    if scores.dim() != 2 or scores.dtype != torch.float32 or scores.stride(1) != 1:
        raise ValueError(f"scores is {list(scores.shape)} {scores.dtype}, need [N, n] float32, last dim contiguous")
    for name, values in (("num_kept", num_kept), ("lengths", lengths)):
        if values.shape != scores.shape[:1] or values.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {list(values.shape)} {values.dtype}, need [{scores.shape[0]}] int32 or int64")
    width = min(int(num_kept.max()), scores.shape[1]) if num_kept.numel() else 0
    index = torch.empty(scores.shape[0], width, dtype=torch.int64, device=scores.device)
    if index.numel():
        implementation = backend.implementation("top_slots", scores.device)
        implementation.top_slots(scores, num_kept.long(), lengths.long(), index)
    return index
