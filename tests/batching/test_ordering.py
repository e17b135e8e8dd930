"""The order of a batch: nothing lost, groups together, prefixes chosen as well as trying all choices would."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batching import prefix_tree
from engine.batching.memory import DEFAULT_OUTPUT, MemoryBudget, OutputEstimate
from engine.batching.ordering import Item, block_keys, decode_ratio, num_computed_tokens, plan

BLOCK = 4
SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=7)


def _items(sequences: Sequence[Sequence[int]], outputs: Sequence[int] = ()) -> list[Item]:
    padded = itertools.chain(outputs, itertools.repeat(1))
    return [Item(tuple(own), len(own) * BLOCK + 1, next(padded)) for own in sequences]


@given(SEQUENCES, st.lists(st.integers(1, 50), max_size=7))
def test_a_plan_holds_every_request_once_and_groups_share_what_they_say(
    sequences: list[list[int]], outputs: list[int]
) -> None:
    groups = plan(_items(sequences, outputs), BLOCK)
    assert sorted(place for group in groups for place in group.members) == list(range(len(sequences)))
    for group in groups:
        shared, rest = divmod(group.prefix_tokens, BLOCK)
        assert rest == 0
        assert len({tuple(sequences[place][:shared]) for place in group.members}) == 1
        assert all(len(sequences[place]) >= shared for place in group.members)
        assert (len(group.members) > 1) == (group.prefix_tokens > 0)


@given(SEQUENCES)
@settings(max_examples=60)
def test_the_chosen_prefixes_save_as_much_as_the_best_of_all_choices(sequences: list[list[int]]) -> None:
    items = _items(sequences)
    saved = sum(item.num_prompt_tokens for item in items) - num_computed_tokens(plan(items, BLOCK), items)
    assert saved == BLOCK * _best_saving(sequences)


def _best_saving(sequences: Sequence[Sequence[int]]) -> int:
    """Over all sets of prefixes; each sequence uses the longest chosen one that it begins with."""
    prefixes = {tuple(own[:length]) for own in sequences for length in range(1, len(own) + 1)}
    shared = [p for p in prefixes if sum(tuple(own[: len(p)]) == p for own in sequences) > 1]
    best = 0
    for size in range(min(len(shared), 4) + 1):  # with 7 sequences a 4th prefix of 2 members is never needed
        for chosen in itertools.combinations(shared, size):
            covered = [max((len(p) for p in chosen if tuple(own[: len(p)]) == p), default=0) for own in sequences]
            best = max(best, sum(covered) - sum(map(len, chosen)))
    return best


@given(SEQUENCES, st.lists(st.integers(1, 50), max_size=7))
def test_families_of_groups_stay_together_and_decode_heavy_ones_come_first(
    sequences: list[list[int]], outputs: list[int]
) -> None:
    items = _items(sequences, outputs)
    groups = plan(items, BLOCK)
    tops = [sequences[group.members[0]][0] if sequences[group.members[0]] else None for group in groups]
    runs = [
        (top, list(own)) for top, own in itertools.groupby(zip(tops, groups, strict=True), key=lambda pair: pair[0])
    ]
    named = [top for top, _ in runs if top is not None]
    assert len(named) == len(set(named)), "a beginning that requests have in common is not left and taken up again"
    for _, own in runs:
        if own[0][0] is not None:
            ratios = [decode_ratio(group, items) for _, group in own]
            assert ratios == sorted(ratios, reverse=True)


def test_requests_of_different_domains_share_nothing() -> None:
    items = [Item((1, 2), 9, 1, domain) for domain in ("a", "a", "b")]
    assert sorted(group.members for group in plan(items, BLOCK)) == [(0, 1), (2,)]


def test_block_keys_are_of_whole_blocks_and_tell_tokens_apart() -> None:
    assert len(block_keys(range(11), BLOCK)) == 2
    assert block_keys([1, 2, 3, 4], BLOCK) == block_keys([1, 2, 3, 4, 9], BLOCK)
    assert block_keys([1, 2, 3, 4], BLOCK) != block_keys([1, 2, 3, 5], BLOCK)


def test_a_long_chain_of_nested_prompts_takes_bounded_work() -> None:
    chain = [tuple(range(length)) for length in range(1, 1500)]
    root = prefix_tree.build(chain)
    prefixes = prefix_tree.flatten(root.children[0])
    assert sorted(index for prefix in prefixes for index in prefix.members) == list(range(len(chain)))


def test_memory_counts_a_prefix_once_and_gives_it_back_with_its_last_member() -> None:
    budget = MemoryBudget(100, max_requests=8)
    for _ in range(2):
        assert budget.fits(20, "g", 40)
        budget.add(20, "g", 40)
    assert budget.fits(20, "g", 40), "80 are used, 20 are left"
    assert not budget.fits(20, "other", 1)
    budget.remove(20, "g", 40)
    assert not budget.fits(50, "other", 0), "the prefix is still held"
    budget.remove(20, "g", 40)
    assert budget.fits(1000), "alone, anything runs"


def test_no_more_run_than_there_are_rows_for() -> None:
    budget = MemoryBudget(1000, max_requests=1)
    budget.add(1)
    assert not budget.fits(1)


def test_expected_output_comes_from_history_and_the_requests_own_bound() -> None:
    estimate = OutputEstimate()
    assert estimate.expected(0) == DEFAULT_OUTPUT
    assert estimate.expected(8) == 8
    estimate.observe(10)
    estimate.observe(21)
    assert estimate.expected(0) == 16
    assert estimate.expected(100) == 16
