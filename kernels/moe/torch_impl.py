"""Experts one after the other, each with all of its tokens, so that it is read once. The host reads the counts."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.act_and_mul import torch_impl


def moe(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, activation: str, out: Tensor
) -> None:
    top_k = experts.shape[1]
    by_expert = experts.view(-1).argsort(stable=True)  # [T * k] choices, those of one expert adjacent
    counts = experts.view(-1).bincount(minlength=down.shape[0]).tolist()
    results = torch.empty(by_expert.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        choices = by_expert[start : start + count]
        both = x[choices // top_k] @ gate_up[expert].t()
        inner = torch.empty(count, down.shape[2], dtype=x.dtype, device=x.device)
        torch_impl.act_and_mul(both, activation, inner)
        results[choices] = inner @ down[expert].t()
        start += count
    # one choice after the other: a token's sum must not depend on how many tokens there are
    total = torch.zeros_like(x, dtype=torch.float32)
    for choice, result in enumerate(results.view(x.shape[0], top_k, -1).unbind(1)):
        total.addcmul_(result.float(), weights[:, choice : choice + 1].float())
    out.copy_(total)
