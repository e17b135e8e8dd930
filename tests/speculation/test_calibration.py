"""Values come to mean what they say: predicted acceptance converges to what really happens, and follows changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine.speculation.calibration import Calibration, CalibrationOptions
from engine.speculation.tree import DraftTree

TREE = DraftTree(
    tokens=(1, 2, 3, 4),
    parents=(-1, 0, -1, 0),
    values=(0.5, 0.25, 0.4, 0.2),
    sources=("a", "a", "b", "b"),
)
CHAIN = DraftTree.chain((1, 2, 3), source="a", values=(0.9, 0.8, 0.7))


def verdict(tree: DraftTree, chance: Callable[[int], float], rng: np.random.Generator) -> tuple[int, ...]:
    """A path: at each node at most one child is accepted, with its chance."""
    path: list[int] = []
    node = -1
    while True:
        draw = rng.random()
        for child in tree.children[node + 1]:
            draw -= chance(child)
            if draw < 0.0:
                node = child
                path.append(child)
                break
        else:
            return tuple(path)


def teach(
    calibration: Calibration, tree: DraftTree, chance: Callable[[int], float], steps: int, key: str = "r"
) -> None:
    rng = np.random.default_rng(1)
    for step in range(steps):
        calibration.observe(f"{key}{step // 20}", tree, verdict(tree, chance, rng))


def test_values_converge_to_what_is_accepted() -> None:
    truth = {0: 0.7, 1: 0.5, 2: 0.2, 3: 0.3}
    calibration = Calibration()
    teach(calibration, TREE, truth.__getitem__, 4_000)
    found = calibration.values("new", TREE)
    assert found[0] == pytest.approx(0.7, abs=0.08)
    assert found[1] == pytest.approx(0.7 * 0.5, abs=0.08)
    assert found[2] == pytest.approx(0.2, abs=0.08)
    assert found[3] == pytest.approx(0.7 * 0.3, abs=0.08)
    assert calibration.error < 0.05


def test_a_drafter_that_lies_about_its_values_is_found_out() -> None:
    calibration = Calibration()
    before = calibration.values("r", CHAIN)
    assert before == pytest.approx(CHAIN.values)
    teach(calibration, CHAIN, lambda node: 0.1, 300)
    assert calibration.values("new", CHAIN)[0] < 0.2


def test_the_error_is_large_for_wrong_values_and_falls_as_they_are_learnt() -> None:
    calibration = Calibration()
    teach(calibration, CHAIN, lambda node: 0.1, 20)
    at_first = calibration.error
    teach(calibration, CHAIN, lambda node: 0.1, 2_000)
    assert at_first > 0.15
    assert calibration.error < at_first / 3
    assert sum(count for count, _, _ in calibration.bins) > 2_000


def test_what_was_learnt_fades_when_the_traffic_changes() -> None:
    calibration = Calibration(CalibrationOptions(memory=100.0))
    teach(calibration, CHAIN, lambda node: 0.9, 2_000)
    teach(calibration, CHAIN, lambda node: 0.2, 500)
    assert calibration.values("new", CHAIN)[0] < 0.3


def test_values_never_rise_along_a_path_and_stay_probabilities() -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration()
    for step in range(300):
        calibration.observe(f"r{step % 7}", TREE, verdict(TREE, lambda node: 0.45, rng))
        values = calibration.values(f"r{step % 7}", TREE)
        assert all(0.0 <= value <= (1.0 if parent < 0 else values[parent])
                   for value, parent in zip(values, TREE.parents, strict=True))  # fmt: skip


def test_a_request_that_goes_better_than_others_is_expected_to_and_is_forgotten() -> None:
    calibration = Calibration()
    teach(calibration, CHAIN, lambda node: 0.3, 1_000)
    for _ in range(40):
        calibration.observe("lucky", CHAIN, (0, 1, 2))
        calibration.observe("others", CHAIN, ())
    lucky, new = calibration.values("lucky", CHAIN), calibration.values("new", CHAIN)
    assert lucky[0] > new[0] + 0.2
    calibration.forget("lucky")
    assert calibration.values("lucky", CHAIN) == calibration.values("new", CHAIN)


def test_nodes_that_were_not_reached_teach_nothing() -> None:
    calibration = Calibration()
    for _ in range(100):
        calibration.observe("r", CHAIN, ())
    values = calibration.values("new", CHAIN)
    assert values[1] / values[0] == pytest.approx(CHAIN.values[1] / CHAIN.values[0], abs=0.05)
