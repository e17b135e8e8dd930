"""Choose as if the prompt ended after its first tokens, and read the rest of it with what that left: for measurements.

A yardstick modifier: with the point at the end of a text the policy knows no question (question-agnostic); with the
point at the end of a first question, a later one meets what was kept for the first (multi-turn). What follows the point
is fed like any prompt, so its tokens stand for a second turn on the same cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from engine.compression.base import CacheShape, CompactionView, Keep, Policy
from engine.compression.formats import PackedPolicy
from engine.compression.modifier import Modifier
from engine.compression.options import MOST_TOKENS, option
from engine.compression.registry import register
from engine.scheduling.compression import CachePlan


@register(
    "first_turn",
    bases=(
        "snapkv",
        "a2sf",
        "ems",
        "fp8",
        "h2o",
        "int8",
        "keyformer",
        "kivi",
        "kvcrush",
        "pyramidkv",
        "random",
        "razor_attention",
        "scissorhands",
        "streaming_llm",
        "tova",
        "vatp",
    ),
    offline=True,
)
@dataclass(frozen=True, kw_only=True)
class FirstTurn(Modifier):
    """Modifier: `base` sees a prompt that ends after `num_tokens`."""

    num_tokens: int | None = option(
        None, int, "tokens of the first turn; by default all of the prompt", at_least=1, at_most=MOST_TOKENS
    )

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        first = self._first_turn(num_prompt_tokens)
        plan = super().plan(first, shape)
        # queries are counted from the end of the whole prompt
        num_queries = plan.num_queries + num_prompt_tokens - first if plan.num_queries else 0
        return replace(plan, num_queries=num_queries)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return self.base.query_weights(positions, self._first_turn(num_prompt_tokens), next_point)

    def temperatures(self, positions: Tensor, num_prompt_tokens: int) -> Tensor:
        return self.base.temperatures(positions, self._first_turn(num_prompt_tokens))

    def keep(self, view: CompactionView) -> Keep:
        return self.base.keep(replace(view, num_prompt_tokens=self._first_turn(view.num_prompt_tokens)))

    @property
    def at_work(self) -> Policy:
        """Who acts in the engine: a format packs what is old whatever was asked, so only its points are moved."""
        return self.base if isinstance(self.base, PackedPolicy) else self

    def _first_turn(self, num_prompt_tokens: int) -> int:
        return num_prompt_tokens if self.num_tokens is None else min(self.num_tokens, num_prompt_tokens)
