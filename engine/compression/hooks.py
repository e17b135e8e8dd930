"""Which hooks at attention time a policy has, what follows from them for its plan, and what they cannot be had with."""

from __future__ import annotations

from dataclasses import replace

from engine.compression.base import Policy
from engine.compression.registry import Hook
from engine.scheduling.compression import CachePlan, Realisation

_METHODS = {"select": Hook.SELECTION, "rewrite": Hook.REWRITE, "on_hidden": Hook.HIDDEN}


def hooks_of(policy: Policy) -> frozenset[Hook]:
    """By the methods that it has."""
    return frozenset(hook for method, hook in _METHODS.items() if hasattr(policy, method))


def acts_on_prompt(policy: Policy) -> bool:
    return bool(getattr(policy, "acts_on_prompt", False))


def with_hooks(policy: Policy, plan: CachePlan) -> CachePlan:
    """The plan as the policy's hooks need it: each generated token attends in its own way, and a prompt that does so is
    nobody else's.
    """
    if not hooks_of(policy):
        return plan
    return replace(plan, steps_singly=True, is_private=plan.is_private or acts_on_prompt(policy))


def refusal(policy: Policy, plan: CachePlan, *, has_windows: bool, shows_hidden: bool) -> str:
    """Why the policy's hooks cannot be honoured; "" where they can."""
    hooks = hooks_of(policy)
    if not hooks:
        return ""
    if Hook.HIDDEN in hooks and not shows_hidden:
        return "looks at hidden states between layers, which a model that runs through transformers does not show"
    if has_windows:
        return "chooses what is read by slots, and layers of this model have a sliding window, which counts them"
    if plan.realisation not in (Realisation.DENSE, Realisation.SLOTS, Realisation.BLOCKS):
        return f"chooses what is read from one block table, and its plan ({plan.realisation.value}) leaves others"
    if plan.first_point is not None and Hook.HIDDEN in hooks:
        return "halts tokens in some layers, and its plan drops tokens in all: it can do one of them"
    if policy.evidence is not None and (Hook.HIDDEN in hooks or acts_on_prompt(policy)):
        return "sums up attention over the prompt as it is, and changes it there: it can do one of them"
    return ""
