"""Mixture-of-experts feed-forward: a router picks top_k experts per token; tokens are grouped so that each expert's
matrices are read once per step. Scheme as in Mixtral (arXiv:2401.04088); optional shared expert as in Qwen2-MoE.

Shape letters: T tokens, C hidden size, E experts, I their intermediate size, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import kernels
from engine.models.config import MoEConfig
from engine.models.layers import FeedForward, Linear

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [T, C], weights [T, k], ids [T, k] int64 -> [T, C]


class MixtureOfExperts:
    """Weighted sum of the chosen experts' outputs, plus the gated shared expert where there is one."""

    def __init__(
        self,
        config: MoEConfig,
        *,
        router: Linear,
        experts: Experts,
        shared: FeedForward | None = None,
        shared_gate: Linear | None = None,
    ) -> None:
        self.config = config
        self.router = router
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate

    def __call__(self, x: Tensor) -> Tensor:  # [T, C] -> [T, C]
        out = self.experts(x, *self._route(x))
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


class SeparateExperts:
    """Experts one after the other, their matrices packed as those of every other linear: what runs on CPU, and on GPUs
    where a token's result must not depend on the batch.
    """

    def __init__(self, experts: Sequence[FeedForward]) -> None:
        self.experts = experts

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self._combine(self._run_experts(x, ids), weights)

    def _run_experts(self, x: Tensor, experts: Tensor) -> Tensor:
        """Output [T, k, C] of every chosen expert, in the order in which each token chose them."""
        by_expert = experts.view(-1).argsort(stable=True)  # [T * k] choices, those of one expert adjacent
        rows = x[by_expert // experts.shape[1]]  # [T * k, C]
        counts = experts.view(-1).bincount(minlength=len(self.experts)).tolist()
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


class GroupedExperts:
    """All experts in one call of `kernels.moe`: what runs on GPUs."""

    def __init__(self, gate_up: Tensor, down: Tensor, activation: str) -> None:
        """gate_up [E, 2I, C], down [E, C, I], contiguous, of the type of the activations."""
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return kernels.moe(x, self.gate_up, self.down, weights, ids, activation=self.activation)


def stack(matrices: Iterable[Tensor], count: int, device: torch.device) -> Tensor:
    """`count` matrices of one shape in one tensor on the device; each is let go of once it is there."""
    stacked: Tensor | None = None
    for index, matrix in enumerate(matrices):
        if stacked is None:
            stacked = torch.empty(count, *matrix.shape, dtype=matrix.dtype, device=device)
        stacked[index] = matrix
    assert stacked is not None, "a mixture has experts"
    return stacked
