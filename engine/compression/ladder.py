"""What is done to caches that may shrink when memory is short, in order: a format, then eviction; each step is a rung.

Knows options, policies and plans. Who takes a rung, and when, is decided by `engine.scheduling.pressure`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from engine.compression.base import Policy
from engine.compression.composed import Composed, format_of
from engine.compression.formats import PackedPolicy
from engine.compression.resolver import Policies
from engine.compression.scoring import ScoringPolicy
from engine.compression.writing import side_of
from engine.errors import ConfigError, InvalidParameter
from engine.scheduling.compression import Realisation, ResolvedPolicy
from engine.scheduling.pressure import Rung

LONG = 1 << 20  # tokens, for a look at a policy's plan


def ladder(text: str, policies: Policies) -> list[Rung]:
    """The rungs of `pressure_policy`. Raises ConfigError that names what cannot be honoured."""
    choices = parse(text)
    try:
        rungs = [policies.create(choice) for choice in choices]
    except (InvalidParameter, ConfigError) as error:
        raise ConfigError(f"pressure_policy: {error}") from error
    for place, (choice, policy) in enumerate(zip(choices, rungs, strict=True)):
        if problem := _problem(policy, rungs[:place], policies):
            raise ConfigError(f"pressure_policy has {choice['name']}, which {problem}")
    return [_packing(p, policies) if isinstance(p, PackedPolicy) else _evicting(p, policies) for p in rungs]


def parse(text: str) -> list[dict[str, Any]]:
    """Names with commas between them, one JSON object with a name, or a JSON list of either. Raises ConfigError."""
    if not text.startswith(("{", "[")):
        return [{"name": name.strip()} for name in text.split(",")]
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"pressure_policy is no JSON: {error}; write names, or [name, {{...}}]") from error
    choices = [{"name": item} if isinstance(item, str) else item for item in (value if text[0] == "[" else [value])]
    if not choices or not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in choices):
        raise ConfigError('pressure_policy needs names: write names, or [name, {"name": ...}]')
    return choices


def _problem(policy: Policy, before: list[Policy], policies: Policies) -> str:
    """What is wrong with a rung after others; "" when nothing is."""
    plan = policy.plan(LONG, policies.shape)
    if isinstance(policy, Composed):
        return "comes with a format; make the format a rung before it"
    if isinstance(policy, PackedPolicy) and policy.shared:
        return "has shared, which packs prompts as they are read; a rung packs what is there"
    if isinstance(policy, PackedPolicy):
        return "packs what another rung has left; the format comes first, and there is one" if before else ""
    if side_of(policy) is not None or plan.is_adaptive:
        return "sees each token as it is written, or finds out how many stay; a rung does neither"
    if plan.num_queries > 1 or plan.realisation is not Realisation.SLOTS:
        return "needs more than the newest query to choose; use int8, fp8, kivi, tova, streaming_llm or random"
    if any(not isinstance(other, PackedPolicy) for other in before):
        return "evicts after another that does; one is enough"
    if before and not _is_by_position(policy):
        return "looks at keys or attention, which packed tokens do not show; use streaming_llm or random there"
    return ""


def _is_by_position(policy: Policy) -> bool:
    return isinstance(policy, ScoringPolicy) and policy.by_position


def _packing(policy: PackedPolicy, policies: Policies) -> Rung:
    def take(now: ResolvedPolicy | None, num_tokens: int) -> ResolvedPolicy | None:
        plan = policy.plan(num_tokens, policies.shape)
        return None if now is not None or plan.first_point != num_tokens else policies.resolved(plan, policy)

    return take


def _evicting(policy: Policy, policies: Policies) -> Rung:
    def take(now: ResolvedPolicy | None, num_tokens: int) -> ResolvedPolicy | None:
        cut = policy.plan(num_tokens, policies.shape)
        if cut.first_point is None or cut.first_point > num_tokens:
            return None
        if now is None:
            return policies.resolved(replace(cut, first_point=num_tokens), policy)
        plan, packing = now.plan, format_of(now.policy)  # type: ignore[arg-type]
        if packing is None or plan.is_point(num_tokens):
            return None
        # whole packed blocks go, never the newest, which may have room
        unit, num_packed = plan.places * policies.shape.block_size, plan.packed_slots_at(num_tokens)
        num_surplus = plan.slots_at(num_tokens) + num_packed - cut.kept[0]
        num_dropped = min(num_surplus // unit, (num_packed - 1) // unit) * unit
        if num_dropped <= 0:
            return None
        drops = (*plan.drops, (num_tokens, num_dropped))
        return policies.resolved(replace(plan, policy=cut.policy, drops=drops), Composed(policy, packing))

    return take
