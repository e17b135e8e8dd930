"""The transform by torch's own functions: all pairs of one distance at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor, scale: float, out: Tensor) -> None:
    """x, out [N, size]."""
    size = x.shape[1]
    y = x.float()
    distance = 1
    while distance < size:
        first, second = y.view(-1, size // (2 * distance), 2, distance).unbind(2)
        y = torch.stack([first + second, first - second], dim=2)
        distance *= 2
    out.copy_(y.view_as(x) * scale)
