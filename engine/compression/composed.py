"""A policy that evicts with a format: what survives the end of the prompt is packed, and so is what is generated.

Knows policies and plans. The base policy chooses from the prompt as it would alone; the survivors of each kv head are
then packed block by block in the order of their positions, as a text of their own that goes on with what is generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from engine.compression import registry
from engine.compression.base import CacheShape, CompactionView, Evidence, Keep, NoisyPolicy, Policy
from engine.compression.formats import PackedPolicy
from engine.compression.hooks import hooks_of
from engine.compression.options import MOST_TOKENS
from engine.compression.scoring import ScoringPolicy, protect, top_k
from engine.compression.writing import side_of
from engine.errors import InvalidParameter
from engine.scheduling.compression import CachePlan, Realisation


@dataclass(frozen=True)
class Composed:
    """See `Policy`."""

    base: Policy
    format: PackedPolicy

    @property
    def evidence(self) -> Evidence | None:
        return self.base.evidence

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        cut = self.base.plan(num_prompt_tokens, shape)
        if cut.first_point is None:
            return replace(self.format.plan(num_prompt_tokens, shape), policy=cut.policy)
        num_left = cut.kept[0]
        num_evicted = cut.first_point - num_left
        packing = self.format.plan(num_left, shape)
        assert packing.first_point is not None
        return replace(
            packing,
            policy=cut.policy,
            first_point=cut.first_point,
            num_queries=cut.num_queries,
            num_evicted=num_evicted,
            packs_at=packing.first_point + num_evicted,
        )

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return self.base.query_weights(positions, num_prompt_tokens, next_point)

    def temperatures(self, positions: Tensor, num_prompt_tokens: int) -> Tensor:
        return cast(NoisyPolicy, self.base).temperatures(positions, num_prompt_tokens)

    def keep(self, view: CompactionView) -> Keep:
        return self.base.keep(view)


def compose(policy: Policy, choice: Any, shape: CacheShape) -> Composed:
    """choice: a format's name, or {"name": ..., its options}. Raises InvalidParameter for what cannot be combined."""
    name = cast(str, policy.name)  # type: ignore[attr-defined]
    options = dict(choice) if isinstance(choice, Mapping) else {"name": choice}
    format_name = options.pop("name", None)
    if format_name not in format_names():
        raise InvalidParameter(
            f"kv_policy.format is {format_name!r}, known are {', '.join(format_names())}", param="kv_policy.format"
        )
    if reason := refusal(policy, shape):
        raise InvalidParameter(
            f"kv_policy {name!r} cannot be combined with a format: {reason}", param="kv_policy.format"
        )
    packing = registry.create(format_name, options, param="kv_policy.format")
    if packing.shared:  # type: ignore[attr-defined]
        raise InvalidParameter(
            "kv_policy.format has shared, but what survives eviction depends on more than the tokens; leave it out",
            param="kv_policy.format.shared",
        )
    return Composed(policy, cast(PackedPolicy, packing))


def format_names() -> tuple[str, ...]:
    return tuple(name for name in registry.names() if issubclass(registry.entry(name).policy, PackedPolicy))


def refusal(policy: Policy, shape: CacheShape) -> str:
    """Why what the policy keeps cannot be packed; "" where it can.

    It can where the cache is cut once, to as many tokens in every layer and kv head: tokens that are packed are not
    chosen from again, and a packed block holds all layers and heads.
    """
    if isinstance(policy, PackedPolicy):
        return "it is one itself"
    if hooks_of(policy):
        return "it acts while layers attend, and packed tokens are attended to as they are"
    plan = policy.plan(2 * MOST_TOKENS, shape)
    if side_of(policy) is not None:
        return "it notes something of each slot, and a packed block has other ones"
    if plan.classes or plan.is_adaptive:
        return "it packs in its own way" if plan.classes else "how much it keeps is known only when it does"
    if plan.realisation in (Realisation.LAYERS, Realisation.HEADS):
        return "its layers or heads keep different numbers of tokens, and a packed block holds all of them"
    if plan.realisation is Realisation.DENSE:
        return "it reads or shortens the prompt in its own way and does not evict"
    if plan.period and hasattr(policy, "period"):
        return (
            f"it evicts again every {plan.period} tokens, and packed tokens are not chosen from again; set period to 0"
        )
    if plan.period or plan.realisation is not Realisation.SLOTS:
        return "it goes on evicting while tokens are generated, and packed tokens are not chosen from again"
    return ""


def format_of(policy: Policy) -> PackedPolicy | None:
    if isinstance(policy, Composed):
        return policy.format
    return policy if isinstance(policy, PackedPolicy) else None


def choose_blocks(policy: ScoringPolicy, view: CompactionView, block_tokens: int, num_kept: int) -> list[int]:
    """Which packed blocks stay, by the best of their tokens on average over layers and heads; and always the newest.

    view          of the packed tokens; their keys are not there, so the policy must choose `by_position`
    block_tokens  in a packed block; the last one may have fewer
    Returns places in ascending order.
    """
    scores = protect(policy.importance(view), policy.protected(view)).mean((0, 1))  # [n]
    rest = -len(scores) % block_tokens
    padded = torch.cat([scores, scores.new_full((rest,), -torch.inf)])
    of_blocks = padded.view(-1, block_tokens).amax(1)
    of_blocks[-1] = torch.inf
    return cast(list[int], top_k(of_blocks, num_kept).tolist())
