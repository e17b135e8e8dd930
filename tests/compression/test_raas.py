"""Stamps of blocks: what is used lately survives, the prompt and the newest block always do."""

from __future__ import annotations

import pytest
import torch

from engine.compression.raas import RaaS, stamped, survivors
from tests.compression.views import SHAPE, view_of

INF = float("inf")


def test_the_better_half_of_the_blocks_is_used_and_the_newest_always():
    bounds = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 4.0, -INF]])
    assert RaaS(share=0.5).used(bounds).tolist() == [[True, False, True, True], [False, True, True, False]]
    assert RaaS(share=0.01).used(bounds).tolist() == [[True, False, False, True], [False, True, True, False]]


def test_with_alpha_a_block_is_used_from_that_estimated_probability_on():
    bounds = torch.tensor([0.0, 2.0, -3.0, -INF])
    # 0.118, 0.876, 0.006
    assert RaaS(alpha=0.1).used(bounds).tolist() == [True, True, True, False]
    assert RaaS(alpha=0.5).used(bounds).tolist() == [False, True, True, False]
    assert RaaS(alpha=1e-3).used(bounds).tolist() == [True, True, True, False]


def test_used_blocks_get_the_position_as_their_stamp():
    assert stamped(torch.tensor([4.0, 9.0, 2.0]), torch.tensor([True, False, True]), 12).tolist() == [12, 9, 12]


def test_the_oldest_stamp_goes_of_equal_ones_the_older_block():
    free = torch.zeros(5, dtype=torch.bool)
    assert survivors(torch.tensor([5.0, 3, 9, 4, 0]), free, 4).tolist() == [0, 2, 3, 4]
    assert survivors(torch.tensor([3.0, 3, 9, 4, 0]), free, 4).tolist() == [1, 2, 3, 4]
    pinned = torch.tensor([True, True, False, False, False])
    assert survivors(torch.tensor([0.0, 0, 9, 4, 0]), pinned, 4).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("every", [8, 31, 32, 33, 47, 100])
def test_a_block_survives_exactly_while_it_is_used_more_often_than_the_horizon(every):
    """Blocks of 16, room for 3; every block but one is used only while it is the newest."""
    plan = RaaS(budget=48).plan(16, SHAPE)
    stamps, blocks = torch.full((1,), 15.0), [0]
    for position in range(16, 600):
        if position % 16 == 0:
            blocks.append(position // 16)
            stamps = torch.cat([stamps, torch.tensor([0.0])])
        used = torch.zeros(len(blocks), dtype=torch.bool)
        used[-1] = True
        if 1 in blocks and position >= 32 and (position - 32) % every == 0:
            used[blocks.index(1)] = True
        stamps = stamped(stamps, used, position)
        if plan.is_point(position + 1):
            keep = survivors(stamps, torch.tensor([block == 0 for block in blocks]), plan.kept[0] // 16)
            blocks, stamps = [blocks[i] for i in keep], stamps[keep]
            assert len(blocks) == 4
    # at a point the other generated blocks were last used 0, 16 and 32 tokens ago: block 1 goes unless it is fresher
    # than the last of them
    longest_pause = max((position - 32) % every for position in range(79, 600, 16))
    assert (1 in blocks) == (longest_pause < 32)
    assert (1 in blocks) == (every <= 32)


def test_a_compaction_keeps_whole_blocks_for_all_heads():
    plan = RaaS(budget=32).plan(20, SHAPE)
    assert plan.first_point == 80
    stamps = torch.zeros(2, 2, 5)
    stamps[1, 0, 2] = 70  # one head of one layer used block 2 lately
    stamps[..., 3] = 50
    view = view_of(stamps.repeat_interleave(16, dim=-1).unsqueeze(0), 64, num_prompt_tokens=20)
    expected = [*range(48), *range(64, 80)]
    index = RaaS(budget=32).keep(view).index
    assert index.tolist() == [[expected, expected], [expected, expected]]
