"""Gated activations by torch's own functions, in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def act_and_mul(gate_up: Tensor, activation: str, out: Tensor) -> None:
    gate, up = gate_up.float().chunk(2, dim=1)
    if activation == "silu":
        value = F.silu(gate)
    else:
        value = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    out.copy_(value * up)
