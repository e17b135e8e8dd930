"""The definition, one token and one choice after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.act_and_mul import reference


def moe(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, activation: str, out: Tensor
) -> None:
    for token, chosen in enumerate(experts.tolist()):
        total = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
        for choice, expert in enumerate(chosen):
            both = gate_up[expert].float() @ x[token].float()
            inner = torch.empty(1, both.shape[0] // 2, dtype=x.dtype, device=x.device)
            reference.act_and_mul(both.unsqueeze(0), activation, inner)
            result = (down[expert].float() @ inner[0].float()).to(x.dtype)
            total += weights[token, choice].float() * result.float()
        out[token] = total.to(x.dtype)
