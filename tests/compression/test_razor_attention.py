"""Head classes, what the other heads keep, and the virtual key that stands for the rest."""

from __future__ import annotations

import pytest
import torch

from engine.compression.razor_attention import (
    EVERYTHING,
    Compensation,
    RazorAttention,
    echo_and_induction,
    retrieval_heads,
)
from engine.errors import ConfigError
from engine.scheduling.compression import Realisation
from tests.compression.views import SHAPE, view_of


def test_retrieval_heads_keep_everything_and_the_others_sinks_and_a_window():
    policy = RazorAttention(num_sink=2, min_recent=10, divisor=5).bind(((0, 1), (3, 0)))
    plan = policy.plan(100, SHAPE)
    local = 2 + 20
    assert plan.realisation == Realisation.HEADS
    assert plan.kept == (local, EVERYTHING, local, local, local, local, EVERYTHING, local)
    assert (plan.first_point, plan.num_queries) == (100, 0)
    assert policy.plan(10, SHAPE).kept[0] == 2 + 10
    assert policy.plan(10, SHAPE).first_point == 12 + 16


def test_with_retrieval_heads_only_nothing_is_ever_dropped():
    heads = tuple((layer, head) for layer in range(4) for head in range(2))
    assert RazorAttention().bind(heads).plan(100_000, SHAPE).first_point is None


def test_head_classes_must_be_there_and_fit_the_model():
    with pytest.raises(ConfigError, match="kvasir calibrate"):
        RazorAttention().plan(100, SHAPE)
    with pytest.raises(ConfigError, match="layer 4, kv head 0; this model has 4 layers of 2"):
        RazorAttention().bind(((4, 0),)).plan(100, SHAPE)


def test_a_head_keeps_its_first_and_newest_tokens():
    view = view_of(torch.zeros(1, 1, 2, 12), torch.tensor([[12, 6]]))
    index = RazorAttention(num_sink=2).keep(view).index
    assert index[0].tolist() == [list(range(12)), [0, 1, 8, 9, 10, 11, *[-1] * 6]]


def attention(query, keys, values, gains):
    weights = (keys @ query + gains).softmax(0)
    return weights @ values


def test_compensation_is_exact_when_the_dropped_tokens_have_equal_logits():
    query = torch.tensor([1.0, 0.0])
    keys = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    values = torch.tensor([[0.0, 4.0], [1.0, 0.0], [3.0, 0.0]])
    whole = attention(query, keys, values, torch.zeros(3))
    dropped = torch.tensor([[False, True, True]])
    kept = Compensation.none(1, 2, 2, torch.device("cpu")).add(keys.unsqueeze(0), values.unsqueeze(0), dropped)
    key, value, gain = kept.virtual()
    assert gain.exp().tolist() == [2.0]
    found = attention(query, torch.cat([keys[:1], key]), torch.cat([values[:1], value]), torch.cat([gain * 0, gain]))
    torch.testing.assert_close(whole, torch.tensor([4 / 3, 4 / 3]))
    torch.testing.assert_close(found, whole)


def test_compensation_grows_as_the_window_slides():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 6, 3), torch.randn(2, 6, 5)
    dropped = torch.tensor([[True, False, True, True, False, False], [False, True, False, False, False, False]])
    step = Compensation.none(2, 3, 5, torch.device("cpu"))
    assert step.virtual()[2].tolist() == [-torch.inf, -torch.inf]
    for i in range(6):
        step = step.add(keys[:, i : i + 1], values[:, i : i + 1], dropped[:, i : i + 1])
    key, value, gain = step.virtual()
    torch.testing.assert_close(key[0], keys[0, dropped[0]].mean(0))
    torch.testing.assert_close(value[1], values[1, 1])
    torch.testing.assert_close(gain.exp(), torch.tensor([3.0, 1.0]))


def test_echo_and_induction_heads_are_found_on_repeated_tokens():
    length, num_tokens = 5, 1 + 3 * 5
    probabilities = torch.zeros(3, num_tokens, num_tokens)
    for query in range(1 + length, num_tokens):
        probabilities[0, query, query - length] = 0.9  # the same token, one copy before
        probabilities[1, query, query - length + 1] = 0.8  # what followed it
        probabilities[2, query, query] = 1.0  # itself
    echo, induction = echo_and_induction(probabilities, length)
    torch.testing.assert_close(echo, torch.tensor([0.9, 0.0, 0.0]))
    torch.testing.assert_close(induction, torch.tensor([0.0, 0.8, 0.0]))
    with pytest.raises(ValueError, match="no second copy"):
        echo_and_induction(probabilities[:, :6, :6], length)


def test_a_group_is_as_good_as_its_best_query_head():
    echo, induction = torch.zeros(4, 4), torch.zeros(4, 4)
    induction[2, 1], induction[1, 3], echo[3, 2] = 0.9, 0.5, 0.4
    heads = retrieval_heads(echo, induction, 2, induction_share=0.25, echo_share=0.01)
    assert heads == ((1, 1), (2, 0), (3, 1))
