"""Definition of the normalisation, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    x64 = x.double()
    out.copy_(x64 / torch.sqrt((x64 * x64).mean(-1, keepdim=True) + eps) * weight.double())


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    residual.copy_(residual.double() + x.double())
    rms_norm(residual, weight, eps, out)
