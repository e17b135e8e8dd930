"""When caches shrink and to what size: the integer halves."""

from __future__ import annotations

import pytest
import torch

from engine.compression import registry
from engine.compression.base import CacheShape
from engine.compression.h2o import H2O
from engine.compression.pyramidkv import PyramidKV
from engine.compression.scissorhands import Scissorhands
from engine.compression.snapkv import SnapKV
from engine.compression.tova import TOVA
from engine.errors import ConfigError
from engine.scheduling.compression import Realisation
from tests.compression.views import SHAPE

GOES_ON = ["a2sf", "h2o", "keyformer", "random", "streaming_llm", "tova"]
ONCE = ["ems", "snapkv"]


@pytest.mark.parametrize("name", GOES_ON)
def test_a_longer_prompt_is_cut_at_its_end_and_then_after_every_period(name):
    plan = registry.create(name, {"budget": 100, "period": 8}).plan(101, SHAPE)
    assert (plan.policy, plan.realisation) == (name, Realisation.SLOTS)
    assert (plan.first_point, plan.period, plan.kept) == (101, 8, (100,))


@pytest.mark.parametrize("name", GOES_ON)
def test_a_shorter_prompt_grows_to_the_budget_and_a_period(name):
    policy = registry.create(name, {"budget": 100, "period": 8})
    for num_prompt_tokens in (1, 100):
        plan = policy.plan(num_prompt_tokens, SHAPE)
        assert (plan.first_point, plan.period, plan.kept) == (108, 8, (100,))


@pytest.mark.parametrize("name", GOES_ON)
def test_without_a_period_only_a_longer_prompt_is_cut(name):
    policy = registry.create(name, {"budget": 100, "period": 0})
    assert policy.plan(101, SHAPE).first_point == 101
    assert policy.plan(100, SHAPE).first_point is None


@pytest.mark.parametrize("name", ONCE)
def test_policies_of_the_prompt_cut_once(name):
    policy = registry.create(name, {"budget": 100})
    assert (policy.plan(101, SHAPE).first_point, policy.plan(101, SHAPE).period) == (101, 0)
    plan = policy.plan(100, SHAPE)
    assert (plan.first_point, plan.num_queries) == (None, 0)


def test_a_ratio_is_a_share_of_the_prompt_rounded_to_the_nearest():
    policy = SnapKV(ratio=0.29)
    assert policy.plan(100, SHAPE).kept == (29,)
    assert policy.plan(1000, SHAPE).kept == (290,)
    assert policy.plan(1, SHAPE).kept == (1,)
    assert policy.plan(1, SHAPE).first_point is None
    assert H2O().plan(1000, SHAPE).kept == (200,)


def test_budget_and_ratio_exclude_each_other():
    with pytest.raises(ConfigError, match="both given"):
        SnapKV(budget=100, ratio=0.5)


@pytest.mark.parametrize(
    ("name", "option"), [("snapkv", "window"), ("ems", "window"), ("streaming_llm", "num_sink"), ("a2sf", "num_recent")]
)
def test_a_budget_must_exceed_what_is_protected_anyway(name, option):
    registry.create(name, {"budget": 11, option: 10})
    with pytest.raises(Exception, match=f"budget is 10, it must exceed {option}"):
        registry.create(name, {"budget": 10, option: 10})


def test_queries_that_score_are_those_of_the_prompt_that_must_be_computed():
    assert SnapKV(budget=100, window=16).plan(500, SHAPE).num_queries == 16
    assert H2O(budget=100).plan(500, SHAPE).num_queries == 500
    assert TOVA(budget=100).plan(500, SHAPE).num_queries == 1
    assert TOVA(budget=1000).plan(500, SHAPE).num_queries == 0
    assert Scissorhands(budget=100, window=40).plan(500, SHAPE).num_queries == 40
    # the window before token 601 reaches back to token 561; the prompt ends at 580
    assert Scissorhands(budget=600, window=40).plan(580, SHAPE).num_queries == 19
    assert registry.create("streaming_llm").plan(5000, SHAPE).num_queries == 0


@pytest.mark.parametrize("name", [*GOES_ON, *ONCE, "scissorhands", "pyramidkv"])
@pytest.mark.parametrize("num_prompt_tokens", [200, 700])
def test_only_queries_that_must_be_computed_have_a_weight(name, num_prompt_tokens):
    """Otherwise results would depend on what the prefix cache holds."""
    policy = registry.create(name, {"budget": 300})
    plan = policy.plan(num_prompt_tokens, SHAPE)
    if plan.first_point is None:
        return
    weights = policy.query_weights(torch.arange(plan.first_point), num_prompt_tokens, plan.first_point)
    assert weights.shape == (1 if policy.evidence is None else policy.evidence.channels, plan.first_point)
    assert not weights[:, : num_prompt_tokens - plan.num_queries].any()


def test_scissorhands_drops_half_of_a_full_cache():
    policy = Scissorhands(budget=100)
    plan = policy.plan(60, SHAPE)
    assert (plan.first_point, plan.period, plan.kept) == (101, 50, (50,))
    assert policy.plan(100, SHAPE).first_point == 101
    assert policy.plan(500, SHAPE).first_point == 500
    # after the first burst it is full again exactly at every point
    assert max(plan.slots_at(n) for n in range(102, 400)) < 100
    assert Scissorhands(budget=1, num_recent=0).plan(10, SHAPE).kept == (1,)


def test_pyramid_numbers_are_those_of_the_reference():
    policy = PyramidKV(budget=40, window=8, beta=20)
    plan = policy.plan(1000, SHAPE)
    assert (plan.realisation, plan.kept) == (Realisation.LAYERS, (71, 51, 31, 11))
    assert (plan.first_point, plan.period, plan.num_queries) == (1000, 0, 8)


def test_the_floor_of_the_pyramid_makes_its_mean_a_little_larger():
    shape = CacheShape(num_layers=32, num_kv_heads=8, head_dim=128, head_dim_v=128, block_size=16)
    kept = PyramidKV(budget=128, window=8).plan(10_000, shape).kept
    assert sum(kept) / 32 == 133.5


def test_a_pyramid_never_keeps_more_than_there_is():
    policy = PyramidKV(budget=40, window=8)
    # the first layer would keep 71: it keeps all 65 (b_max = 57, b_min = 64 - 57, step = 50 // 3)
    assert policy.plan(65, SHAPE).kept == (65, 49, 33, 17)


def test_short_prompts_have_no_pyramid():
    policy = PyramidKV(budget=40, window=8)
    assert policy.plan(40, SHAPE).first_point is None
    flat = policy.plan(50, SHAPE)
    assert (flat.realisation, flat.kept, flat.first_point) == (Realisation.SLOTS, (40,), 50)
    one_layer = CacheShape(num_layers=1, num_kv_heads=2, head_dim=8, head_dim_v=8, block_size=16)
    assert policy.plan(1000, one_layer).kept == (40,)
    assert PyramidKV(ratio=0.01).plan(60, SHAPE).kept == (1,)


def test_each_layer_of_a_pyramid_keeps_at_least_its_window():
    for num_prompt_tokens in range(41, 400, 7):
        plan = PyramidKV(budget=40, window=8).plan(num_prompt_tokens, SHAPE)
        assert all(8 <= count <= num_prompt_tokens for count in plan.kept)
        assert list(plan.kept) == sorted(plan.kept, reverse=True)


def test_raas_counts_generated_tokens_in_whole_blocks():
    policy = registry.create("raas", {"budget": 40})
    plan = policy.plan(21, SHAPE)  # two blocks of prompt, then room for two
    assert (plan.realisation, plan.kept, plan.first_point, plan.period) == (Realisation.BLOCKS, (64,), 80, 16)
    assert registry.create("raas", {"budget": 1}).plan(16, SHAPE).kept == (32,)
    # never more blocks than the prompt's, the budget's and the open one
    assert max(-(-plan.slots_at(n) // 16) for n in range(21, 2000)) <= 2 + 2 + 1


@pytest.mark.parametrize("name", ["quest", "gemfilter"])
def test_selection_and_prompt_filters_never_shrink_a_cache(name):
    plan = registry.create(name, {"budget": 100}).plan(5000, SHAPE)
    assert (plan.realisation, plan.first_point) == (Realisation.DENSE, None)


def test_modifiers_have_the_plan_of_their_base_under_their_own_name():
    plan = registry.create("kvcrush", {"base": "pyramidkv", "budget": 40, "window": 8}).plan(1000, SHAPE)
    assert (plan.policy, plan.kept, plan.num_queries) == ("kvcrush", (71, 51, 31, 11), 8)
