"""Modifier: attention times the size of the value, so that tokens that change nothing do not stay.

Source: Guo et al. 2024, arXiv:2406.12335; importance_k = score_k * |v_k|_1. The first tokens stay whatever they score:
as attention sinks they have much attention and tiny values.
Decided: with a base that smooths scores the norm multiplies the smoothed ones. The first tokens take at most half of
the room that the base's own protection leaves. Scissorhands is no base: its score is a count of being ignored, with
which the product would do the opposite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compression.base import CompactionView
from engine.compression.modifier import Modifier
from engine.compression.options import option
from engine.compression.registry import register
from engine.compression.scoring import first_tokens


@register("vatp", bases=("h2o", "a2sf", "keyformer", "pyramidkv", "snapkv", "tova"))
@dataclass(frozen=True, kw_only=True)
class VATP(Modifier):
    """Modifier: scores of `base` times the L1 norm of each token's value; the first tokens stay."""

    num_first: int = option(20, int, "first tokens, always kept", at_least=0, at_most=4096)

    def importance(self, view: CompactionView) -> Tensor:
        return self.base.importance(view) * value_norms(view)

    def protected(self, view: CompactionView) -> Tensor:
        protected = self.base.protected(view)
        room = (view.num_kept - protected.sum(-1)).clamp(min=0)
        return protected | first_tokens(view, (room // 2).clamp(max=self.num_first))


def value_norms(view: CompactionView) -> Tensor:
    """[L, H_kv, n] float32: the L1 norm of every value."""
    return torch.stack([view.values(layer).abs().sum(-1) for layer in range(view.positions.shape[0])])
