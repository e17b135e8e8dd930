"""What hooks at attention time cannot be had with is refused with a reason, and one that fails ends its own request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import msgspec
import pytest
import torch

from engine.compression import registry
from engine.compression.base import CacheShape, Evidence, HiddenChange, HiddenView, QueryView, SameAs, Selection
from engine.compression.options import Budgeted
from engine.compression.resolver import Policies
from engine.compression.scoring import KeepsEverything
from engine.config import CacheConfig
from engine.core import EngineCore
from engine.errors import InvalidParameter
from engine.models.batch import KVSpec, Model
from engine.scheduling.compression import CachePlan, Realisation
from tests.compression.hook_users.test_in_engine import core_of, traffic
from tests.e2e.driving import run

SPEC = KVSpec(4, 2, 32, 32)


@dataclass(frozen=True, kw_only=True)
class Selects(KeepsEverything, Budgeted):
    """Reads the first tokens."""

    def select(self, view: QueryView) -> Selection | SameAs | None:
        return Selection(torch.zeros(len(view.queries), 1, 1, dtype=torch.int64))


@dataclass(frozen=True, kw_only=True)
class InLayers(Selects):
    """Has tables per layer."""

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return CachePlan(self.name, Realisation.LAYERS, 8, 0, (4, 4, 4, 4))


@dataclass(frozen=True, kw_only=True)
class LooksAndDrops(KeepsEverything, Budgeted):
    """Looks at hidden states, and its cache shrinks."""

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return CachePlan(self.name, Realisation.SLOTS, 8, 0, (4,))

    def on_hidden(self, view: HiddenView) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class ScoresWhatItChanges(Selects):
    """Acts on the prompt, and wants the sums of its attention."""

    acts_on_prompt: ClassVar[bool] = True

    @property
    def evidence(self) -> Evidence:
        return Evidence()


@dataclass(frozen=True, kw_only=True)
class ReusesWhatIsNotThere(KeepsEverything, Budgeted):
    """Wants what a later layer selected."""

    def select(self, view: QueryView) -> SameAs:
        return SameAs(view.layer + 1)


@dataclass(frozen=True, kw_only=True)
class ChangesThePrompt(KeepsEverything, Budgeted):
    """Halts tokens of the prompt without a word."""

    def on_hidden(self, view: HiddenView) -> HiddenChange | None:
        return HiddenChange(active=torch.zeros_like(view.active)) if view.layer == 2 else None


KINDS = {
    kind.__name__: kind
    for kind in (Selects, InLayers, LooksAndDrops, ScoresWhatItChanges, ReusesWhatIsNotThere, ChangesThePrompt)
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for name, kind in KINDS.items():
        registry.register(name)(kind)


@pytest.mark.parametrize(
    ("choice", "spec", "shows_hidden", "message"),
    [
        ({"name": "Selects"}, replace(SPEC, windows=(0, 8, 0, 8)), True, "sliding window, which counts them; use full"),
        ({"name": "token_butler"}, SPEC, False, "looks at hidden states between layers, which a model that runs"),
        ({"name": "InLayers"}, SPEC, True, r"its plan \(layers\) leaves others"),
        ({"name": "LooksAndDrops"}, SPEC, True, "its plan drops tokens in all"),
        ({"name": "ScoresWhatItChanges"}, SPEC, True, "sums up attention over the prompt as it is"),
        ({"name": "Selects", "format": "int8"}, SPEC, True, "cannot be combined with a format: it acts while layers"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_with_the_reason(
    choice: dict[str, Any], spec: KVSpec, shows_hidden: bool, message: str
) -> None:
    policies = Policies(CacheConfig(block_size=4), spec, torch.float32, shows_hidden=shows_hidden)
    with pytest.raises(InvalidParameter, match=message):
        policies.resolve(choice, 20)


def test_the_plan_follows_from_the_hooks() -> None:
    policies = Policies(CacheConfig(), SPEC, torch.float32)
    plans = {name: policies.resolve({"name": name}, 20) for name in ("Selects", "token_select", "snapkv")}
    found = {name: (one.plan.steps_singly, one.plan.is_private) for name, one in plans.items() if one is not None}
    assert found == {"Selects": (True, False), "token_select": (True, True), "snapkv": (False, False)}


@pytest.mark.parametrize("name", ["ReusesWhatIsNotThere", "ChangesThePrompt"])
def test_a_hook_that_fails_ends_its_own_request_only(name: str, mimir: Model) -> None:
    requests = traffic(name, {}, num_tokens=6)[:2]
    expected = run(core_of(mimir), traffic(None, {}, num_tokens=6)[:1])
    core = core_of(mimir)
    answers = run(core, requests)
    assert answers["r1", 0].finish_reason == "error"
    assert answers["r0", 0].token_ids == expected["r0", 0].token_ids
    assert core.scheduler.cache.pool.counts.active == 0


def test_prompts_are_shared_with_nobody_where_a_policy_acts_on_them(mimir: Model) -> None:
    def cached(core: EngineCore, name: str) -> int:
        first, second = (msgspec.structs.replace(traffic(name, {})[1], request_id=one) for one in "ab")
        return run(core, [first])["a", 0].num_cached_tokens + run(core, [second])["b", 0].num_cached_tokens

    assert cached(core_of(mimir), "Selects") == 56
    assert cached(core_of(mimir), "token_select") == 0
