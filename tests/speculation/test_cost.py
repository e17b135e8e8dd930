"""The cost table learns what steps take: by rows, by context, without falling, and apart for plain decoding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine.speculation.cost import CostTable, isotonic


def table_of(cost, rows=(1, 2, 4, 8, 16, 32, 64), context: int = 1000) -> CostTable:
    table = CostTable()
    for count in rows:
        for _ in range(3):
            table.observe(count, context, cost(count), is_plain=False)
    return table


def test_costs_between_measured_rows_lie_on_the_line_and_beyond_go_on_rising() -> None:
    table = table_of(lambda rows: 1.0 + 0.1 * rows)
    assert table.cost(6, 1000) == pytest.approx(1.6)
    assert table.cost(100, 1000) == pytest.approx(11.0)


def test_a_flat_end_does_not_promise_free_rows_for_ever() -> None:
    table = table_of(lambda rows: 1.0 + 0.1 * min(rows, 32))
    assert table.cost(1000, 1000) > 2 * table.cost(64, 1000)


@pytest.mark.parametrize("seed", range(10))
def test_costs_never_fall_with_the_rows_whatever_was_measured(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = CostTable()
    for _ in range(200):
        table.observe(int(rng.integers(1, 300)), 500, float(rng.exponential()), is_plain=False)
    costs = [table.cost(rows, 500) for rows in range(1, 400)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(costs))


def test_isotonic_is_the_closest_rising_sequence() -> None:
    assert isotonic([1.0, 3.0, 2.0, 4.0], [1.0] * 4) == [1.0, 2.5, 2.5, 4.0]
    assert isotonic([3.0, 1.0], [3.0, 1.0]) == [2.5, 2.5]
    assert isotonic([], []) == []


def test_costs_follow_a_machine_that_changes_its_speed() -> None:
    table = table_of(lambda rows: 1.0, rows=(1, 2, 4, 8))
    for _ in range(100):
        table.observe(8, 1000, 3.0, is_plain=False)
    assert table.cost(8, 1000) == pytest.approx(3.0, rel=0.05)


def test_one_stall_of_the_machine_hardly_moves_the_table() -> None:
    table = CostTable()
    for _ in range(50):
        table.observe(4, 1000, 1.0, is_plain=False)
    table.observe(4, 1000, 500.0, is_plain=False)
    assert table.cost(4, 1000) < 1.4


def test_contexts_have_costs_of_their_own_and_the_nearest_stands_in() -> None:
    """Where the context is long, reading it dominates and rows are cheap."""
    table = CostTable()
    for rows in (1, 8):
        table.observe(rows, 1000, 1.0 * rows, is_plain=False)
        table.observe(rows, 100_000, 10.0 + 0.1 * rows, is_plain=False)
    assert table.cost(8, 1000) / table.cost(1, 1000) == pytest.approx(8.0)
    assert table.cost(8, 100_000) / table.cost(1, 100_000) < 1.1
    assert table.cost(8, 3_000) == table.cost(8, 1000)
    assert table.cost(8, 10**7) == table.cost(8, 100_000)


def test_plain_decoding_has_its_own_cost() -> None:
    table = table_of(lambda rows: 2.0 + 0.1 * rows)
    assert table.plain_cost(4, 1000) == table.cost(4, 1000)  # nothing better is known
    for _ in range(3):
        table.observe(4, 1000, 1.0, is_plain=True)
    assert table.plain_cost(4, 1000) == 1.0
    assert table.cost(4, 1000) == pytest.approx(2.4)


def test_an_empty_table_gives_a_rising_cost_so_that_drafting_can_start_and_be_measured() -> None:
    table = CostTable()
    assert table.cost(1, 0) < table.cost(9, 0) < 9 * table.cost(1, 0)


def test_a_first_step_that_loads_things_is_not_taken_for_the_cost_of_its_rows() -> None:
    table = CostTable()
    for _ in range(10):
        table.observe(1, 1000, 1.0, is_plain=True)
    table.observe(8, 1000, 500.0, is_plain=False)
    assert table.cost(8, 1000) < 2.0  # one measurement is none
    for _ in range(2):
        table.observe(8, 1000, 1.3, is_plain=False)
    assert table.cost(8, 1000) == pytest.approx(1.3)


def test_steps_without_rows_or_time_teach_nothing() -> None:
    table = CostTable()
    table.observe(0, 10, 1.0, is_plain=True)
    table.observe(4, 10, 0.0, is_plain=True)
    assert table.cost(1, 10) == CostTable().cost(1, 10)


def test_a_curve_is_used_for_some_observations_before_it_is_made_anew() -> None:
    table = CostTable()
    for _ in range(20):
        table.observe(4, 100, 1.0, is_plain=False)
    curves = []
    for _ in range(64):
        table.observe(4, 100, 2.0, is_plain=False)
        curves.append(table.curve(100))
    assert len({id(curve) for curve in curves}) <= 5
    assert table.cost(4, 100) > 1.9


def test_a_stall_of_the_machine_counts_as_little_more_than_what_was_known() -> None:
    table = CostTable()
    for _ in range(20):
        table.observe(4, 100, 1.0, is_plain=False)
    for step in range(16):
        table.observe(4, 100, 100.0 if step == 7 else 1.0, is_plain=False)
    assert table.cost(4, 100) < 1.06


def test_what_was_never_measured_is_taken_to_cost_more_than_plain_steps() -> None:
    table = CostTable()
    for _ in range(3):
        table.observe(16, 100, 1.0, is_plain=True)
    assert table.plain_cost(16, 100) == pytest.approx(1.0)
    assert table.cost(16, 100) > 1.1
    assert table.cost(47, 100) == pytest.approx(2 * table.cost(16, 100))  # not as if each row cost what the first does
