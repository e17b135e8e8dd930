"""From what a request asks of its cache to a policy and its plan. The one place that refuses combinations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from engine.compression import registry
from engine.compression.artefacts import FILE_NAME, Artefacts
from engine.compression.base import CacheShape, Policy
from engine.compression.composed import Composed, compose
from engine.compression.first_turn import FirstTurn
from engine.compression.hooks import refusal as hooks_refusal
from engine.compression.hooks import with_hooks
from engine.compression.registry import Hook
from engine.compression.writing import refusal as writing_refusal
from engine.compression.writing import with_writing
from engine.config import CacheConfig
from engine.errors import ConfigError, InvalidParameter
from engine.models.batch import KVSpec
from engine.scheduling.compression import CachePlan, Realisation, ResolvedPolicy

FULL = "full"  # the name under which the whole cache can be asked for
# What this engine offers to policies.
HOOKS = frozenset(
    {
        Hook.MERGE,
        Hook.TEMPERATURES,
        Hook.COMPENSATION,
        Hook.FORMAT,
        Hook.PROMPT_FILTER,
        Hook.SELECTION,
        Hook.REWRITE,
        Hook.HIDDEN,
        Hook.STAMPS,
    }
)


class Policies:
    """What this server offers, for one model. Raises ConfigError when its own default is not among it."""

    def __init__(
        self,
        config: CacheConfig,
        spec: KVSpec,
        dtype: torch.dtype,
        artefacts: Artefacts | None = None,
        has_yardsticks: bool = False,
        shows_hidden: bool = True,
    ) -> None:
        """
        artefacts       what was measured of this model for policies that need it
        has_yardsticks  requests may name policies that are for measurements only
        shows_hidden    the model does, see `engine.models.batch.Model`
        """
        self.shape = CacheShape(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            head_dim_v=spec.head_dim_v,
            block_size=config.block_size,
            dtype=dtype,
        )
        self._artefacts = artefacts
        if artefacts is not None:
            artefacts.check(self.shape, config.kv_artefacts or FILE_NAME)
        self._has_yardsticks = has_yardsticks
        self._has_windows = any(spec.windows)
        self._shows_hidden = shows_hidden
        self._bits = 8 * dtype.itemsize
        self._allowed = _allowed(config.kv_policies)
        self._default = _parse(config.kv_policy)
        try:
            self.resolve(self._default, 1)
        except InvalidParameter as error:
            raise ConfigError(f"kv_policy: {error}") from error

    def resolve(self, choice: Mapping[str, Any] | None, num_prompt_tokens: int) -> ResolvedPolicy | None:
        """See `PolicyResolver`."""
        is_default = choice is None
        options = dict(self._default if choice is None else choice)
        name = options.pop("name", None)
        if name == FULL:
            _check_full(options)
            return None
        if not is_default:
            self._check_allowed(name)
            self._check_allowed(_name_of(options.get("format")))
        try:
            policy = self._create(name, options)
            plan = with_hooks(policy, policy.plan(num_prompt_tokens, self.shape))
            plan = with_writing(policy, plan, num_prompt_tokens, self.shape)
        except ConfigError as error:
            raise InvalidParameter(f"kv_policy: {error}", param="kv_policy") from error
        self._check(name, policy, plan)
        model = {"has_windows": self._has_windows, "shows_hidden": self._shows_hidden}
        if reason := writing_refusal(policy, plan, num_prompt_tokens, **model):
            raise InvalidParameter(f"kv_policy {name!r} {reason}; use {FULL}", param="kv_policy")
        return self.resolved(plan, policy.at_work if isinstance(policy, FirstTurn) else policy)

    def resolved(self, plan: CachePlan, policy: Policy) -> ResolvedPolicy:
        bits = self._bits / max(1, plan.places)
        if num_packed := sum(each.first for each in plan.classes):
            bits = self._bits * sum(each.first / each.places for each in plan.classes) / num_packed
        return ResolvedPolicy(plan, bits, policy)

    def create(self, choice: Mapping[str, Any]) -> Policy:
        """A policy that the operator chose. Raises InvalidParameter or ConfigError for what cannot be honoured."""
        options = dict(choice)
        name = options.pop("name")
        policy = self._create(name, options)
        self._check(name, policy, policy.plan(1, self.shape))
        return policy

    @property
    def default_may_shrink(self) -> bool:
        return bool(self._default.get("may_shrink", False))

    def _create(self, name: Any, options: dict[str, Any]) -> Policy:
        """options: also `format`, which packs what the policy keeps."""
        format_choice = options.pop("format", None)
        policy = registry.create(name, options, offline=self._has_yardsticks)
        if self._artefacts is not None:
            policy = self._artefacts.bind(policy)
        return policy if format_choice is None else compose(policy, format_choice, self.shape)

    def _check_allowed(self, name: Any) -> None:
        if name in registry.names() and name not in self._allowed:
            raise InvalidParameter(
                f"kv_policy {name!r} is not offered here; choose from {', '.join([FULL, *sorted(self._allowed)])}",
                param="kv_policy",
            )

    def _check(self, name: str, policy: Policy, plan: CachePlan) -> None:
        """Raises InvalidParameter for what this engine or this model cannot honour."""
        parts = (policy.base, policy.format) if isinstance(policy, Composed) else (policy,)
        if lacking := frozenset[Hook]().union(*map(registry.needs, parts)) - HOOKS:
            raise InvalidParameter(
                f"kv_policy {name!r} needs {', '.join(sorted(lacking))}, which this server does not have yet",
                param="kv_policy",
            )
        model = {"has_windows": self._has_windows, "shows_hidden": self._shows_hidden}
        if reason := hooks_refusal(policy, plan, **model):
            raise InvalidParameter(f"kv_policy {name!r} {reason}; use {FULL}", param="kv_policy")
        if self._has_windows and plan.realisation is Realisation.PACKED:
            raise InvalidParameter(
                f"kv_policy {name!r} packs older tokens, which the sliding windows of this model's layers cannot leave "
                f"out; use {FULL}",
                param="kv_policy",
            )
        if self._has_windows and plan.realisation is not Realisation.DENSE:
            raise InvalidParameter(
                f"kv_policy {name!r} drops tokens, and layers of this model have a sliding window, which counts them; "
                f"use {FULL}",
                param="kv_policy",
            )


def _name_of(choice: Any) -> Any:
    """Of a choice that is a name or an object with one."""
    return choice.get("name") if isinstance(choice, Mapping) else choice


def _check_full(options: dict[str, Any]) -> None:
    may_shrink = options.pop("may_shrink", False)
    if options:
        raise InvalidParameter(
            f"kv_policy {FULL!r} has no option {', '.join(sorted(options))}; its only option is may_shrink",
            param="kv_policy",
        )
    if not isinstance(may_shrink, bool):
        raise InvalidParameter(f"kv_policy: may_shrink is {may_shrink!r}; use true or false", param="kv_policy")


def _allowed(names: tuple[str, ...]) -> frozenset[str]:
    known = registry.names()
    if names == ("all",):
        return frozenset(known)
    if names == ("none",):
        return frozenset()
    unknown = sorted(set(names).difference(known))
    if unknown:
        raise ConfigError(f"kv_policies has {', '.join(unknown)}; known are all, none, {', '.join(known)}")
    return frozenset(names)


def _parse(text: str) -> dict[str, Any]:
    """A name, or a JSON object with a name. Raises ConfigError."""
    if not text.startswith("{"):
        return {"name": text}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f'kv_policy is no JSON object: {error}; write a name or {{"name": ...}}') from error
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError('kv_policy needs a name: write a name or {"name": ...}')
    return value
