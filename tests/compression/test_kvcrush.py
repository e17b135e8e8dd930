"""Rescued blocks: the hand-checked example, the anchors, and the choice left to the base."""

from __future__ import annotations

import pytest
import torch

from engine.compression import registry
from engine.compression.kvcrush import KVCrush, rescued
from tests.compression.views import kept, view_of

SCORES = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.05, 0.04, 0.7, 0.6])
BASE = {"base": "h2o", "recent_share": 0, "block": 2}


def crush(budget: int, **options: object) -> list[int]:
    return kept(registry.create("kvcrush", {**BASE, "budget": budget, **options}), view_of(SCORES, budget))


def test_blocks_at_even_distances_from_the_anchor_are_rescued():
    """Bits 10|01|00|11, the base keeps the last block; distances to 01 are 2, 0, 1."""
    assert crush(6, rescue=2, anchor="alternating") == [2, 3, 4, 5, 6, 7]
    assert crush(4, rescue=1, anchor="alternating") == [2, 3, 6, 7]


@pytest.mark.parametrize(("anchor", "block"), [("zeros", 2), ("ones", 0), ("mean", 2)])
def test_the_anchor_decides_which_block_comes_first(anchor, block):
    # distances to 00: 1, 1, 0; to 11: 1, 1, 2; the majority of 10|01|00|11 is 00
    assert crush(4, rescue=1, anchor=anchor) == sorted([2 * block, 2 * block + 1, 6, 7])


def test_the_random_anchor_depends_on_the_seed_the_layer_and_the_head():
    policy = registry.create("kvcrush", {"base": "h2o", "budget": 64, "block": 8, "rescue": 3})
    scores = torch.rand(200)
    views = [view_of(scores.expand(1, 3, 3, 200), 64, seed=seed) for seed in (1, 1, 2)]
    a, b, c = (policy.keep(view).index for view in views)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len({tuple(row.tolist()) for row in a.reshape(9, -1)}) > 1


@pytest.mark.parametrize("name", registry.entry("kvcrush").bases)
def test_without_rescued_blocks_the_choice_is_that_of_the_base(name):
    torch.manual_seed(0)
    base = registry.create(name, {"budget": 50})
    view = view_of(torch.rand(1, 2, 2, 120), 50, values=torch.rand(2, 2, 120, 4))
    crushed = KVCrush(base=base, rescue=0)  # type: ignore[arg-type]
    assert torch.equal(crushed.keep(view).index, base.keep(view).index)


def test_what_is_too_small_for_a_block_goes_to_the_best_single_tokens():
    # one rescued block and a single token: the best that is left is token 0
    assert crush(3, rescue=1, anchor="alternating") == [0, 2, 3]
    assert crush(1, rescue=1, anchor="alternating") == [0]


def test_the_last_block_may_be_short():
    view = view_of(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9]), 3)
    policy = registry.create("kvcrush", {**BASE, "budget": 3, "rescue": 0})
    assert kept(policy, view) == [2, 3, 4]
    policy = registry.create("kvcrush", {**BASE, "budget": 3, "rescue": 1, "anchor": "zeros"})
    assert len(kept(policy, view)) == 3


def test_rescue_takes_every_step_th_of_the_sorted_blocks():
    distances = torch.tensor([5, 1, 4, 2, 3, 9, 0])
    evicted = torch.tensor([True, True, True, True, True, True, False])
    # sorted by distance: blocks 1, 3, 4, 2, 0, 5
    assert rescued(distances, evicted, torch.tensor(2)).nonzero().flatten().tolist() == [1, 2]
    assert rescued(distances, evicted, torch.tensor(3)).nonzero().flatten().tolist() == [0, 1, 4]
    assert rescued(distances, evicted, torch.tensor(9)).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert not rescued(distances, evicted, torch.tensor(0)).any()


def test_equal_distances_are_taken_in_order():
    assert rescued(torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool), torch.tensor(2)).tolist() == [
        True,
        False,
        True,
        False,
    ]
