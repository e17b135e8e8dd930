"""Token Recycling keeps the newest candidates of every token and unrolls them into its template."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.speculation.token_recycling import CandidateTable, TokenRecycling, TokenRecyclingOptions, template
from engine.speculation.tree import EMPTY, DraftTree
from tests.speculation.drafting import candidates, guess, paths

ROWS = st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(-1, 9), max_size=5)), max_size=30)


def start(drafter: TokenRecycling, root: int = 1, **fields: object) -> None:
    """One request has begun, and its newest token is `root`."""
    drafter.admit("request", [root], "")
    guess(drafter, [root], **fields)


@given(ROWS)
def test_a_row_holds_what_was_last_written(rows: list[tuple[int, list[int]]]) -> None:
    table, expected = CandidateTable(3, 1 << 20), {}
    for token, ids in rows:
        table.update([token], [ids])
        distinct = list(dict.fromkeys(value for value in ids if value >= 0))[:3]
        if distinct:
            expected[token] = distinct
    assert {token: list(table.candidates(token)) for token in range(10)} == {
        token: expected.get(token, []) for token in range(10)
    }


def test_after_a_pass_every_row_holds_its_topk() -> None:
    drafter = TokenRecycling(num_candidates=3, learn_prompt=0)
    start(drafter)
    seen = DraftTree((4, 5), (-1, -1), (0.5, 0.3), ("x", "x"))
    drafter.on_commit("request", seen, (0,), (4, 8), candidates([[4, 5, 6], [8, 7, 9], [2, 3, 1]]))
    tree = guess(drafter, [1, 4, 8, 1], num_prompt_tokens=1, cap=80)
    assert {(4,), (5,), (6,), (4, 8), (5, 2)} <= paths(tree)
    assert {path for path in paths(tree) if len(path) == 1} == {(4,), (5,), (6,)}


def test_the_root_of_a_step_is_the_newest_token_before_it() -> None:
    drafter = TokenRecycling(num_candidates=2, learn_prompt=0)
    start(drafter)
    drafter.on_commit("request", EMPTY, (), (7,), candidates([[7, 8]]))
    drafter.on_commit("request", EMPTY, (), (9,), candidates([[9, 6]]))  # no guess was asked for in between
    assert guess(drafter, [1, 7, 9, 7], num_prompt_tokens=1, cap=1).tokens == (9,)


def test_of_two_rows_of_one_token_the_likelier_path_wins() -> None:
    drafter = TokenRecycling(num_candidates=1, learn_prompt=0)
    start(drafter)
    seen = DraftTree((5, 5), (-1, 0), (0.5, 0.2), ("x", "x"))
    drafter.on_commit("request", seen, (), (5,), candidates([[5], [6], [7]]))
    assert guess(drafter, [1, 5], num_prompt_tokens=1, cap=1).tokens == (6,)


@pytest.mark.parametrize("num_nodes", [1, 5, 30])
def test_template_is_the_most_valuable_paths(num_nodes: int) -> None:
    rates = TokenRecyclingOptions(num_candidates=3, first=0.5, decay=1.5).rates
    values = []
    for depth in range(1, 5):
        for ranks in product(range(3), repeat=depth):
            value = 1.0
            for rank in ranks:
                value *= rates[rank]
            values.append((value, ranks))
    nodes = template(rates, num_nodes, 4)
    ranks_of: list[tuple[int, ...]] = []
    for node in nodes:
        above = ranks_of[node.parent] if node.parent >= 0 else ()
        ranks_of.append((*above, node.rank))
        assert node.depth == len(ranks_of[-1])
    assert len(set(ranks_of)) == num_nodes
    by_ranks = {ranks: value for value, ranks in values}
    assert [node.value for node in nodes] == pytest.approx([by_ranks[ranks] for ranks in ranks_of])
    best = sorted((value for value, _ in values), reverse=True)[:num_nodes]
    assert [node.value for node in nodes] == pytest.approx(best)


def test_a_prompt_teaches_what_followed() -> None:
    assert guess(TokenRecycling(), [1, 2, 3, 1], cap=2).tokens == (2, 3)
    assert guess(TokenRecycling(learn_prompt=0), [1, 2, 3, 1]) == EMPTY


def test_candidates_of_one_tenant_are_not_shown_to_another() -> None:
    drafter = TokenRecycling()
    guess(drafter, [1, 2, 3, 1], tenant="a", key="a")
    assert guess(drafter, [1], tenant="b", key="b") == EMPTY
    drafter.forget("a")
    assert guess(drafter, [1], tenant="a", key="c") == EMPTY


def test_tables_stay_within_their_bounds() -> None:
    drafter = TokenRecycling(max_tokens=10, max_scopes=3)
    for number in range(8):
        guess(drafter, list(range(100)), tenant=str(number), key=str(number))
        drafter.drop(str(number))
    row = CandidateTable(8, 10)
    row.follow(range(11))
    assert drafter.state_bytes == 3 * row.num_bytes
    # the rows written last are the ones that are left
    assert guess(drafter, [97], tenant="7", key="x", cap=1).tokens == (98,)
    assert guess(drafter, [5], tenant="7", key="y", cap=1) == EMPTY


def test_any_garbage_in_the_table_yields_sound_trees() -> None:
    drafter = TokenRecycling(num_candidates=4)
    start(drafter)
    rows = [[-1, 5, 5, 1], [5, 1, -7, 5], [1, 1, 1, 1]]
    seen = DraftTree((5, 1), (-1, 0), (0.5, 0.2), ("x", "x"))
    drafter.on_commit("request", seen, (), (5,), candidates(rows))
    for cap in (1, 2, 7, 80):
        tree = guess(drafter, [1, 5], num_prompt_tokens=1, cap=cap)
        assert tree.problem() is None
        assert 0 < len(tree) <= cap
