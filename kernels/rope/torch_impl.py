"""Rotation by torch operations on whole tensors, in float32."""

from __future__ import annotations

from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=2)  # [T, 1, rot_dim / 2]
    rotated = x[..., : cos_sin.shape[1]]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=2)
    a, b = first.float(), second.float()
    new_first, new_second = a * cos - b * sin, b * cos + a * sin
    first.copy_(new_first)
    second.copy_(new_second)
