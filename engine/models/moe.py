"""Mixture-of-experts feed-forward: a router picks top_k experts per token; tokens are grouped so that each expert's
matrices are read once per step. Scheme as in Mixtral (arXiv:2401.04088); optional shared expert as in Qwen2-MoE.

Shape letters: T tokens, C hidden size, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.models.config import MoEConfig
from engine.models.layers import FeedForward, Linear


class MixtureOfExperts:
    """Weighted sum of the chosen experts' outputs, plus the gated shared expert where there is one."""

    def __init__(
        self,
        config: MoEConfig,
        *,
        router: Linear,
        experts: Sequence[FeedForward],
        shared: FeedForward | None = None,
        shared_gate: Linear | None = None,
    ) -> None:
        self.config = config
        self.router = router
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate

    def __call__(self, x: Tensor) -> Tensor:  # [T, C] -> [T, C]
        weights, experts = self._route(x)
        out = self._combine(self._run_experts(x, experts), weights)
        if self.shared is not None and self.shared_gate is not None:
            out.addcmul_(self.shared_gate(x).sigmoid_(), self.shared(x))
        return out

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, k] in x's dtype and expert ids [T, k] int64."""
        probabilities = self.router(x).softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.config.top_k, dim=-1)
        if self.config.normalize_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), experts

    def _run_experts(self, x: Tensor, experts: Tensor) -> Tensor:
        """Output [T, k, C] of every chosen expert, in the order in which each token chose them."""
        by_expert = experts.view(-1).argsort(stable=True)  # [T * k] choices, those of one expert adjacent
        rows = x[by_expert // self.config.top_k]  # [T * k, C]
        counts = experts.view(-1).bincount(minlength=self.config.num_experts).tolist()
        out = torch.empty_like(rows)
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                out[by_expert[start : start + count]] = expert(rows[start : start + count])
                start += count
        return out.view(*experts.shape, -1)

    @staticmethod
    def _combine(outputs: Tensor, weights: Tensor) -> Tensor:
        """Sum over k, one choice after the other: a token's result must not depend on how many tokens there are."""
        total = outputs[:, 0] * weights[:, :1]
        for choice in range(1, weights.shape[1]):
            total.addcmul_(outputs[:, choice], weights[:, choice : choice + 1])
        return total
