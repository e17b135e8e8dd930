"""Bounds of blocks and the choice of those that are read."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from engine.compression.attend import RowRange, TableSegment
from engine.compression.quest import Quest, key_bounds, select_blocks
from engine.compression.selecting import BoundedRows
from engine.models.batch import ForwardBatch, KVCache
from engine.scheduling.plan import Chunk

BLOCKS = torch.tensor([[[1.0, -2.0], [3.0, 1.0]], [[-1.0, 0.0], [2.0, 2.0]], [[0.0, -3.0], [1.0, 1.0]]])


def bounds_of(query: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """query [H, D], blocks [NB, P, D] of one kv head."""
    return key_bounds(query, blocks.amin(1).unsqueeze(0), blocks.amax(1).unsqueeze(0))[0]


def test_bounds_are_those_of_the_hand_checked_example():
    query = torch.tensor([[1.0, -1.0]])
    assert bounds_of(query, BLOCKS).tolist() == [5, 2, 4]
    assert (BLOCKS @ query[0]).amax(1).tolist() == [3, 0, 3]
    # two of three: the best, and the newest
    chosen = select_blocks(bounds_of(query, BLOCKS).view(1, 1, 3), torch.tensor([3]), 2)
    assert chosen.tolist() == [[[0, 2]]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 4))
def test_no_key_exceeds_the_bound_of_its_block(seed, num_blocks, group):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(num_blocks, 4, 8, generator=generator)
    query = torch.randn(group, 8, generator=generator)
    largest = (blocks @ query.T).amax((1, 2))
    assert bool((bounds_of(query, blocks) >= largest - 1e-5).all())


def test_with_blocks_of_one_token_the_choice_is_the_exact_top_k():
    torch.manual_seed(0)
    keys, query = torch.randn(20, 1, 8), torch.randn(1, 8)
    logits = (keys[:, 0] @ query[0]).tolist()
    chosen = select_blocks(bounds_of(query, keys).view(1, 1, 20), torch.tensor([20]), 6)[0, 0].tolist()
    others = sorted(range(19), key=lambda i: -logits[i])[:5]
    assert chosen == sorted([*others, 19])


def test_rows_of_one_batch_have_their_own_lengths_and_budgets():
    bounds = torch.tensor([[[5.0, 1, 4, 9]], [[1.0, 2, 3, 4]], [[7.0, 7, 7, 7]]])
    chosen = select_blocks(bounds, torch.tensor([3, 2, 4]), torch.tensor([2, 3, 3]))
    assert chosen.tolist() == [[[0, 2, -1]], [[0, 1, -1]], [[1, 2, 3]]]


def test_a_row_with_no_more_blocks_than_the_budget_reads_all():
    assert select_blocks(torch.rand(1, 2, 5), torch.tensor([5]), 9).tolist() == [[[0, 1, 2, 3, 4]] * 2]


def test_the_first_layers_are_dense_and_three_blocks_the_least():
    policy = Quest(budget=100)
    assert [policy.is_dense(layer) for layer in range(4)] == [True, True, False, False]
    assert policy.num_blocks(5000, 16) == 6
    assert Quest(budget=1).num_blocks(5000, 16) == 3
    assert Quest(ratio=0.25).num_blocks(4096, 16) == 64


def test_layers_with_a_sliding_window_read_what_they_see():
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(*[torch.randn(12, 1, 2, 4, 16, generator=generator) for _ in range(2)])
    q, k, v = (torch.randn(1, heads, 16, generator=generator) for heads in (4, 2, 2))
    starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [46]))
    batch = ForwardBatch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        positions=torch.tensor([45]),
        slots=torch.tensor([11 * 4 + 1]),
        cu_seqlens_q=starts,
        seq_lens=lens,
        block_table=torch.arange(12, dtype=torch.int32).unsqueeze(0),
        max_seqlen_q=1,
        attention_plan=kernels.plan_attention(starts, lens, num_kv_heads=2),
    )
    rows = BoundedRows(cache)
    rows.add(0, Quest(budget=12, num_dense_layers=0), 1)
    chunk = Chunk(row=0, start=45, num_tokens=1, new_block_ids=(), is_sampling=True, output_index=44)
    for window in (30, 0):
        options = {"scale": 0.3, "window": window, "soft_cap": 0.0, "sinks": None}
        found, plain = torch.empty(1, 4, 16), torch.empty(1, 4, 16)
        rows.segment([chunk], batch, 0, 0).attend(0, q, k, v, found, options)
        TableSegment(batch, cache, RowRange.of(batch, 0, 1), []).attend(0, q, k, v, plain, options)
        assert torch.equal(found, plain) == (window > 0)
