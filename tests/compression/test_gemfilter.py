"""Which prompt tokens an early layer leaves."""

from __future__ import annotations

import torch

from engine.compression.gemfilter import GemFilter, filter_logits


def test_a_prompt_within_the_budget_stays_whole():
    assert GemFilter(budget=40, num_recent=4).choose(torch.rand(40)) is None


def test_the_best_neighbourhoods_stay_with_the_first_and_last_tokens():
    torch.manual_seed(0)
    logits = torch.randn(100)
    found = GemFilter(budget=30, kernel=5, num_first=2, num_recent=6).choose(logits)
    padded = [0.0, 0.0, *logits.tolist(), 0.0, 0.0]
    smooth = [sum(padded[i : i + 5]) / 5 for i in range(100)]
    forced = [0, 1, *range(94, 100)]
    others = sorted((i for i in range(100) if i not in forced), key=lambda i: -smooth[i])[:22]
    assert found is not None
    assert found.tolist() == sorted([*forced, *others])


def test_a_needle_is_in_the_set():
    torch.manual_seed(0)
    query = torch.randn(4, 8)
    keys = torch.randn(2, 500, 8) * 0.1
    keys[:, 250] = query.view(2, 2, 8).sum(1)
    logits = filter_logits(query, keys)
    torch.testing.assert_close(logits, sum(keys[h // 2] @ query[h] for h in range(4)))
    found = GemFilter(budget=50, num_recent=8).choose(logits)
    assert found is not None
    assert 250 in found.tolist()


def test_a_ratio_of_a_tiny_prompt_still_has_tokens():
    found = GemFilter(ratio=0.2).choose(torch.rand(10))
    assert found is not None
    assert found.tolist() == [0, 9]


def test_the_layer_is_13_of_32_unless_it_is_given():
    assert GemFilter().layer_of(32) == 13
    assert GemFilter().layer_of(4) == 1
    assert GemFilter(layer=7).layer_of(32) == 7
    assert GemFilter(layer=7).layer_of(4) == 3
