"""Definition of the gated activations, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def act_and_mul(gate_up: Tensor, activation: str, out: Tensor) -> None:
    gate, up = gate_up.double().chunk(2, dim=1)
    if activation == "silu":
        value = gate / (1 + torch.exp(-gate))
    elif activation == "gelu":
        value = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    else:
        value = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    out.copy_(value * up)
