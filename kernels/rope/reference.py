"""Definition of the rotation, in float64, pair by pair."""

from __future__ import annotations

from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    half = cos_sin.shape[1] // 2
    for token, position in enumerate(positions.tolist()):
        for i in range(half):
            cos, sin = cos_sin[position, i].double(), cos_sin[position, half + i].double()
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            a, b = x[token, :, first].double(), x[token, :, second].double()
            x[token, :, first] = (a * cos - b * sin).to(x.dtype)
            x[token, :, second] = (b * cos + a * sin).to(x.dtype)
