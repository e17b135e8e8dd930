"""StreamingLLM, random eviction and the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.compression import registry
from engine.compression.oracle import FutureQueries, Oracle
from engine.compression.random_eviction import RandomEviction
from engine.compression.streaming_llm import StreamingLLM
from engine.errors import ConfigError, InvalidParameter
from tests.compression.views import kept, view_of


def test_streaming_keeps_sinks_and_the_newest_whatever_the_scores():
    policy = StreamingLLM(budget=10, num_sink=4)
    assert kept(policy, view_of(torch.rand(30), 10)) == [0, 1, 2, 3, 24, 25, 26, 27, 28, 29]
    # the next burst: the sinks are still there
    later = torch.tensor([0, 1, 2, 3, *range(24, 40)])
    assert kept(policy, view_of(torch.rand(20), 10, positions=later)) == [0, 1, 2, 3, 34, 35, 36, 37, 38, 39]
    assert kept(StreamingLLM(num_sink=0), view_of(torch.rand(30), 3)) == [27, 28, 29]


def test_random_eviction_is_keyed_by_seed_layer_head_and_position():
    policy = RandomEviction(num_recent=1)
    zeros = torch.zeros(1, 3, 2, 200)
    a, again, other = (policy.keep(view_of(zeros, 50, seed=seed)).index for seed in (7, 7, 8))
    assert torch.equal(a, again)
    assert not torch.equal(a, other)
    assert len({tuple(row.tolist()) for row in a.reshape(6, -1)}) == 6
    # about a quarter of each half
    first_half = (a < 100).sum(-1).float().mean()
    assert 18 < float(first_half) < 32


def test_random_eviction_in_two_steps_is_random_eviction_in_one():
    policy = RandomEviction(num_recent=1)
    once = kept(policy, view_of(torch.zeros(120), 30, seed=3))
    first = torch.tensor(kept(policy, view_of(torch.zeros(100), 40, seed=3)))
    positions = torch.cat([first, torch.arange(100, 120)])
    twice = kept(policy, view_of(torch.zeros(60), 30, positions=positions, seed=3))
    assert once == twice


def test_the_oracle_keeps_what_later_queries_attend_to():
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 40, 8)
    queries = torch.randn(2, 4, 3, 8)
    policy = replace(Oracle(budget=10, num_recent=1), future=FutureQueries(queries, scale=8**-0.5))
    index = policy.keep(view_of(torch.zeros(1, 2, 2, 40), 10, keys=keys)).index
    for layer in range(2):
        for head in range(2):
            total = torch.zeros(40)
            for query_head in (2 * head, 2 * head + 1):
                for t in range(3):
                    total += (keys[layer, head] @ queries[layer, query_head, t] * 8**-0.5).softmax(0)
            expected = sorted([*total[:39].topk(9).indices.tolist(), 39])
            assert index[layer, head].tolist() == expected


def test_with_the_log_sum_exp_the_oracle_sees_exact_probabilities():
    torch.manual_seed(0)
    keys, queries = torch.randn(2, 12, 8), torch.randn(1, 2, 3, 8)
    logits = torch.einsum("htd,hnd->htn", queries[0], keys) * 0.3
    exact = FutureQueries(queries, 0.3, lse=logits.logsumexp(-1).unsqueeze(0))
    # over fewer keys the others' share is not handed to those that are left
    found = exact.attention(0, keys[:, :5])
    torch.testing.assert_close(found, logits.softmax(-1)[..., :5].sum(1))


def test_requests_cannot_have_the_oracle():
    with pytest.raises(InvalidParameter, match=r"kv_policy\.name is 'oracle', known are a2sf"):
        registry.create("oracle")
    policy = registry.create("oracle", {"budget": 5}, offline=True)
    with pytest.raises(ConfigError, match="oracle needs the queries"):
        policy.keep(view_of(torch.zeros(10), 5))
