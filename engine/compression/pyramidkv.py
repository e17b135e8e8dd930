"""SnapKV with more tokens in the lower layers and fewer in the upper ones.

Source: Cai et al. 2024, arXiv:2406.02069. With B the budget, w the window, n prompt tokens, L layers and beta the
steepness: b_min = (B - w) // beta, b_max = 2 (B - w) - b_min; where b_max would exceed n - w, b_max = n - w and
b_min = 2 (B - w) - b_max; layer l keeps b_max - l * ((b_max - b_min) // (L - 1)) + w. A prompt of fewer than 2 (B - w)
tokens is compressed to B in every layer.
Differs: nothing in the numbers, floor and all: the layers' mean may exceed B by a few tokens. A single layer keeps B.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.compression.base import CacheShape
from engine.compression.options import Once, option, slots_plan
from engine.compression.registry import register
from engine.compression.snapkv import ObservationWindow
from engine.scheduling.compression import CachePlan, Realisation


@register("pyramidkv")
@dataclass(frozen=True, kw_only=True)
class PyramidKV(ObservationWindow, Once):
    """SnapKV with a budget that falls from layer to layer; `budget` is the layers' mean."""

    beta: int = option(20, int, "steepness: the last layer keeps a beta-th of the mean", at_least=1, at_most=1000)

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        budget = self.budget_for(num_prompt_tokens)
        first_point = num_prompt_tokens if num_prompt_tokens > budget else None
        kept = self.kept_per_layer(num_prompt_tokens, budget, shape.num_layers)
        if len(set(kept)) == 1:
            return slots_plan(self, num_prompt_tokens, kept[0], first_point, 0)
        num_queries = self.num_queries(num_prompt_tokens, num_prompt_tokens)
        return CachePlan(self.name, Realisation.LAYERS, first_point, 0, kept, num_queries)

    def kept_per_layer(self, num_prompt_tokens: int, budget: int, num_layers: int) -> tuple[int, ...]:
        """Tokens that each layer keeps, the lowest first."""
        window = min(self.window, budget - 1)
        mean = budget - window
        if num_layers == 1 or window == 0 or num_prompt_tokens <= budget or num_prompt_tokens < 2 * mean:
            return (budget,) * num_layers
        least = mean // self.beta
        most = 2 * mean - least
        if most >= num_prompt_tokens - window:
            most = num_prompt_tokens - window
            least = 2 * mean - most
        step = (most - least) // (num_layers - 1)
        return tuple(most - layer * step + window for layer in range(num_layers))
