"""Keep the tokens that later queries will really attend to: the yardstick that no policy can beat on attention kept.

No server can have it. A measurement runs the request once with the full cache, takes the rotated queries of the tokens
that were generated (and their log-sum-exp, for exact probabilities), and runs it again with
`dataclasses.replace(Oracle(...), future=FutureQueries(...))` as the policy object of the request. Therefore it is
registered as offline: `create(..., offline=True)` finds it, requests do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from engine.compression.base import CompactionView
from engine.compression.options import Once, option
from engine.compression.registry import Hook, register
from engine.compression.scoring import ScoringPolicy, newest
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FutureQueries:
    """
    queries  [L, H, T, D] float32, rotated
    scale    of the logits
    lse      [L, H, T] float32: log-sum-exp of the scaled logits over all keys; None: over the keys at hand
    """

    queries: Tensor
    scale: float
    lse: Tensor | None = None

    def attention(self, layer: int, keys: Tensor) -> Tensor:
        """Sum of the probabilities of keys [H_kv, n, D] over queries and heads of a group: [H_kv, n] float32."""
        num_kv_heads = keys.shape[0]
        grouped = self.queries[layer].float().unflatten(0, (num_kv_heads, -1))  # [H_kv, G, T, D]
        logits = torch.einsum("hgtd,hnd->hgtn", grouped, keys) * self.scale
        if self.lse is None:
            return logits.softmax(-1).sum((1, 2))
        lse = self.lse[layer].float().unflatten(0, (num_kv_heads, -1))
        return (logits - lse.unsqueeze(-1)).exp().sum((1, 2))


@register("oracle", needs=(Hook.FUTURE,), offline=True)
@dataclass(frozen=True, kw_only=True)
class Oracle(ScoringPolicy, Once):
    """The tokens to which given future queries attend; for measurements only."""

    default_ratio: ClassVar[float | None] = 0.25

    num_recent: int = option(4, int, "newest tokens, always kept", at_least=0, at_most=4096)
    future: FutureQueries | None = field(default=None, compare=False)

    def importance(self, view: CompactionView) -> Tensor:
        """Raises ConfigError without future queries."""
        if self.future is None:
            raise ConfigError("oracle needs the queries of the tokens to come: set its field `future`")
        future = self.future
        return torch.stack([future.attention(layer, view.keys(layer)) for layer in range(view.positions.shape[0])])

    def protected(self, view: CompactionView) -> Tensor:
        return newest(view, self.num_recent)
