"""The budget finds the best connected set of nodes for the whole batch, and drafts nothing where that costs more."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from engine.speculation import budget as budget_module
from engine.speculation import load_budget
from engine.speculation.allowance import StepTime
from engine.speculation.base import RequestView
from engine.speculation.budget import Load, Selection, prune, select
from engine.speculation.calibration import Calibration
from engine.speculation.cost import CostTable
from engine.speculation.load_budget import LoadAwareBudget
from engine.speculation.tree import EMPTY, DraftTree

Tree = tuple[list[int], list[float]]


def each(cost: Callable[[int], float]) -> Callable[[np.ndarray], np.ndarray]:
    """A cost by number of rows, for many numbers."""
    return lambda rows: np.array([float(cost(int(count))) for count in rows])


def values_of(trees: Sequence[Tree]) -> list[list[float]]:
    return [values for _, values in trees]


def random_tree(rng: np.random.Generator, num_nodes: int) -> Tree:
    parents, values = [], []
    for node in range(num_nodes):
        parent = int(rng.integers(-1, node))
        parents.append(parent)
        # a coarse grid: ties are common, and values may stay equal along a path
        values.append((1.0 if parent < 0 else values[parent]) * float(rng.choice([0.25, 0.5, 0.75, 1.0])))
    return parents, values


def staircase(rng: np.random.Generator, num_rows: int) -> Callable[[int], float]:
    steps = np.cumsum(rng.choice([0.0, 0.0, 0.0, 0.4, 1.0], size=num_rows + 1)) + 1.0
    return lambda rows: float(steps[rows])


def is_connected(parents: Sequence[int], nodes: Sequence[int]) -> bool:
    return all(parents[node] < 0 or parents[node] in nodes for node in nodes)


def best_by_brute_force(trees: Sequence[Tree], weights: Sequence[float], times: Callable[[int], float]) -> float:
    subsets = []
    for parents, _ in trees:
        nodes = range(len(parents))
        sets = itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(len(parents) + 1))
        subsets.append([chosen for chosen in sets if is_connected(parents, chosen)])
    best = 0.0
    for chosen in itertools.product(*subsets):
        gain = sum(weights)
        for (_, values), weight, nodes in zip(trees, weights, chosen, strict=True):
            gain += weight * sum(values[node] for node in nodes)
        best = max(best, gain / times(sum(map(len, chosen))))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_scan_finds_what_brute_force_over_connected_sets_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, int(rng.integers(0, 5))) for _ in range(3)]
    weights = rng.choice([0.5, 1.0, 2.0], size=3).tolist()
    cost = staircase(rng, 20)
    found = select(values_of(trees), weights, each(cost), plain_cost=cost(3), load=Load(3), max_nodes=64)
    assert found.rate == pytest.approx(best_by_brute_force(trees, weights, lambda nodes: cost(3 + nodes)), rel=1e-12)
    for (parents, _), nodes in zip(trees, found.nodes, strict=True):
        assert is_connected(parents, nodes)


@pytest.mark.parametrize("seed", range(40))
def test_few_nodes_are_selected_as_many_are(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    trees = values_of([random_tree(rng, int(rng.integers(0, 12))) for _ in range(4)])
    cost, weights = each(staircase(rng, 80)), rng.choice([0.5, 1.0, 2.0], size=4).tolist()

    def found() -> Selection:
        return select(
            trees, weights, cost, plain_cost=float(rng.uniform(0.5, 2.0)), load=Load(4, max_rows=30),
            max_nodes=int(rng.integers(0, 30)), least_rate=float(rng.uniform(0.0, 3.0)),
        )  # fmt: skip

    state = rng.bit_generator.state
    few = found()
    monkeypatch.setattr(budget_module, "_FEW", -1)
    rng.bit_generator.state = state
    many = found()
    assert few.nodes == many.nodes
    assert (few.gain, few.rate) == pytest.approx((many.gain, many.rate))


def test_stopping_at_the_first_drop_would_miss_the_best_place_of_a_staircase() -> None:
    """The second node is behind a step in the cost, and the nodes after it are free."""
    trees = [[0.9, 0.9, 0.9, 0.9]]

    def cost(rows: int) -> float:
        return 1.0 if rows == 1 else 2.2

    found = select(trees, [1.0], each(cost), plain_cost=1.0, load=Load(1), max_nodes=8)
    assert found.nodes == ((0, 1, 2, 3),)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_drafted_where_the_cost_exceeds_the_gain(seed: int) -> None:
    """Every row costs its full share, as on a saturated device: no node with a value below 1 is worth it."""
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, 6) for _ in range(3)]
    claims = [[min(value, 0.99) for value in values] for _, values in trees]
    found = select(claims, [1.0] * 3, each(float), plain_cost=3.0, load=Load(3), max_nodes=64)
    assert found.num_nodes == 0
    assert found.rate == pytest.approx(1.0)


def test_the_true_cost_of_plain_decoding_is_what_drafts_must_beat() -> None:
    """A step that verifies is slower than a plain one even with few nodes: half a token more is not worth it."""
    tree = [[0.5]]
    assert select(tree, [1.0], each(lambda rows: 1.6), plain_cost=1.6, load=Load(1), max_nodes=8).num_nodes == 1
    assert select(tree, [1.0], each(lambda rows: 1.6), plain_cost=1.0, load=Load(1), max_nodes=8).num_nodes == 0


def test_ceilings_hold() -> None:
    trees = [[1.0, 0.9, 0.8, 0.7], [0.95, 0.85]]

    def nodes(max_nodes: int, max_rows: int) -> tuple[tuple[int, ...], ...]:
        load = Load(2, max_rows=max_rows)
        return select(trees, [1.0, 1.0], each(lambda rows: 1.0), plain_cost=1.0, load=load, max_nodes=max_nodes).nodes

    assert nodes(3, 100) == ((0, 1), (0,))
    assert nodes(100, 4) == ((0,), (0,))
    assert nodes(0, 100) == nodes(-5, 100) == nodes(100, 1) == ((), ())
    assert nodes(100, 100) == ((0, 1, 2, 3), (0, 1))


def test_weights_send_nodes_to_the_requests_that_matter_more() -> None:
    trees = [[0.6, 0.5], [0.9, 0.8]]
    found = select(trees, [3.0, 1.0], each(lambda rows: 1.0), plain_cost=1.0, load=Load(2), max_nodes=2)
    assert found.nodes == ((0, 1), ())


def test_waiting_prompts_make_drafting_yield_smoothly() -> None:
    """Decoding alone is bound by memory; with a queue of prompts every row of the step is paid for."""
    trees = [[0.9, 0.8, 0.6, 0.4, 0.2, 0.1]] * 4

    def cost(rows: int) -> float:
        return max(1.0, rows / 32.0)

    def num_nodes(num_prompt_tokens: int) -> int:
        load = Load(4, num_prompt_tokens, max_rows=64)
        return select(trees, [1.0] * 4, each(cost), plain_cost=1.0, load=load, max_nodes=64).num_nodes

    counts = [num_nodes(tokens) for tokens in (0, 8, 16, 24, 60, 1000)]
    assert counts[0] == 24
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[-1] < counts[0]


def test_saturated_steps_with_waiting_prompts_draft_nothing() -> None:
    trees = [[0.95, 0.9]] * 8
    load = Load(8, 1000, max_rows=64)
    found = select(trees, [1.0] * 8, each(float), plain_cost=8.0, load=load, max_nodes=64)
    assert found.num_nodes == 0


def test_a_sampled_draft_is_never_pruned_by_what_was_sampled() -> None:
    sampled = DraftTree((1, 2), (-1, 0), (0.5, 0.1), ("m", "m"), kind="swor", q=np.ones((2, 4), dtype=np.float32) / 4)
    assert prune(sampled, (0,)) is sampled
    assert prune(DraftTree((1, 2), (-1, 0), (0.5, 0.1), ("m", "m")), (0,)).tokens == (1,)


# The budget of an engine -----------------------------------------------------------------------------------------


def view(key: str) -> RequestView:
    return RequestView(key, list(range(100)), 50)


def budget_with(cost: Callable[[int], float], *keys: str, **options: object) -> LoadAwareBudget:
    """With known costs, an account that can afford anything, and running requests."""
    costs = CostTable()
    for rows in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128):
        for _ in range(3):
            costs.observe(rows, 100, cost(rows), is_plain=False)
            costs.observe(rows, 100, cost(rows), is_plain=True)
    budget = LoadAwareBudget(costs, Calibration(), max_rows=512, **options)  # type: ignore[arg-type]
    for key in keys or ("a",):
        budget.begin(key, ["s"])
    budget.accounts.pass_time(1.0, 1e6)
    return budget


def step(budget: LoadAwareBudget, keys: Sequence[str], tree: DraftTree, num_rows: int | None = None) -> list[DraftTree]:
    """What of the same guess for each request is selected; empty where nobody is asked."""
    num_rows = num_rows or len(keys)
    views = [view(key) for key in keys]
    if budget.rests(num_rows):
        return [EMPTY] * len(keys)
    caps = budget.caps(views, [8] * len(views), num_rows)
    trees = [tree.within(cap, 100) if budget.allows("s", 0) else EMPTY for cap in caps]
    return budget.select(views, trees, num_rows)


def timed(budget: LoadAwareBudget, num_decodes: int, num_drafted: int, seconds: float) -> None:
    is_plain = num_drafted == 0
    num_rows = num_decodes + num_drafted
    budget.time_step(StepTime(num_rows, num_decodes, num_drafted, 100, seconds, seconds, is_plain=is_plain))


TREE = DraftTree.chain((1, 2, 3), source="s", values=(0.9, 0.8, 0.7))


def test_cheap_rows_are_used_and_saturated_ones_are_not() -> None:
    cheap, dear = budget_with(lambda rows: 1.0 + rows / 1000), budget_with(lambda rows: float(rows))
    assert step(cheap, ["a"], TREE) == [TREE]
    assert step(dear, ["a"], TREE) == [EMPTY]
    assert cheap.figures().num_selected == 3
    assert cheap.figures().expected_rate > dear.figures().expected_rate
    assert dear.figures().num_selected == 0


def test_nobody_is_asked_before_the_cost_of_plain_steps_is_known() -> None:
    budget = LoadAwareBudget(CostTable(), Calibration(), max_rows=512)
    budget.begin("a", ["s"])
    for _ in range(3):
        assert step(budget, ["a"], TREE) == [EMPTY]
        timed(budget, 1, 0, 1.0)
    assert step(budget, ["a"], TREE) == [TREE]  # of drafts nothing is known: try


def test_a_request_whose_drafts_fail_is_asked_for_less_often() -> None:
    budget = budget_with(lambda rows: 1.0 + rows / 10, "right", "wrong")
    num_asked = Counter[str]()
    for _ in range(200):
        trees = step(budget, ["right", "wrong"], TREE)
        timed(budget, 2, sum(map(len, trees)), 1.2 + sum(map(len, trees)) / 10)
        for key, tree in zip(["right", "wrong"], trees, strict=True):
            num_asked[key] += len(tree) > 0
            if tree.tokens:
                budget.observe(view(key), tree, tuple(range(len(tree))) if key == "right" else ())
    assert num_asked["right"] > 150
    assert num_asked["wrong"] < 40


def test_a_few_nodes_are_tried_where_nothing_is_expected() -> None:
    """Otherwise a cost that was once measured too high would never be measured again."""
    budget = budget_with(lambda rows: float(rows))
    tried = [trees[0] for _ in range(400) if (trees := step(budget, ["a"], TREE))[0].tokens]
    assert 2 <= len(tried) <= 400 / 8
    assert all(len(tree) <= 4 for tree in tried)


def test_trials_go_on_as_long_as_they_pay() -> None:
    budget = budget_with(lambda rows: float(rows))
    trees = [EMPTY]
    while not trees[0].tokens:
        trees = step(budget, ["a"], TREE)
    for _ in range(3):
        timed(budget, 1, 3, 1.1)
        budget.observe(view("a"), trees[0], (0, 1, 2))
        trees = step(budget, ["a"], TREE)
        assert trees[0].tokens


def test_sampled_drafts_are_counted_but_not_cut() -> None:
    budget = budget_with(lambda rows: float(rows), "a", "b")
    q = np.full((3, 4), 0.25, dtype=np.float32)
    sampled = DraftTree((1, 2), (-1, 0), (0.2, 0.1), ("m", "m"), kind="swor", q=q)
    assert not budget.rests(2)
    budget.caps([view("a"), view("b")], [4, 4], 2)
    found = budget.select([view("a"), view("b")], [sampled, TREE], 2)
    assert found[0] is sampled
    assert found[1].tokens == ()


class Counted:
    """Calls of a function that go on to it."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function
        self.count = 0

    def __call__(self, *args: object, **options: object) -> object:
        self.count += 1
        return self.function(*args, **options)


def run_steps(budget: LoadAwareBudget, num_steps: int, keys: Sequence[str], *, succeeds: bool) -> list[int]:
    """Drafted nodes by step of requests whose guesses are all right, or all wrong."""
    drafted = []
    for _ in range(num_steps):
        trees = step(budget, keys, TREE)
        drafted.append(sum(map(len, trees)))
        if not succeeds:
            timed(budget, len(keys), drafted[-1], 1.0 + (len(keys) + drafted[-1]) / 10)
        for key, tree in zip(keys, trees, strict=True):
            if tree.tokens:
                budget.observe(view(key), tree, tuple(range(len(tree))) if succeeds else ())
    return drafted


@pytest.mark.parametrize("num_requests", [1, 5])
def test_a_selection_holds_while_drafts_succeed(num_requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"r{i}" for i in range(num_requests)]
    budget = budget_with(lambda rows: 1.0 + rows / 1000, *keys)
    selects = Counted(select)
    monkeypatch.setattr(load_budget, "select", selects)
    assert run_steps(budget, 400, keys, succeeds=True) == [3 * num_requests] * 400
    assert selects.count < 400 / 10


def test_a_selection_ends_with_the_success_of_its_drafts() -> None:
    budget = budget_with(lambda rows: 1.0 + rows / 10, "a")
    run_steps(budget, 100, ["a"], succeeds=True)
    drafted = run_steps(budget, 100, ["a"], succeeds=False)
    assert sum(count > 0 for count in drafted) < 30


def test_a_selection_holds_for_its_own_requests_and_load_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [0]
    budget = budget_with(lambda rows: 1.0 + rows / 1000, "a", "b", num_waiting_tokens=lambda: waiting[0])
    selects = Counted(select)
    monkeypatch.setattr(load_budget, "select", selects)

    def looks(keys: Sequence[str], num_rows: int) -> bool:
        before = selects.count
        step(budget, keys, TREE, num_rows)
        return selects.count > before

    run_steps(budget, 50, ["a"], succeeds=True)
    assert 1 <= [looks(["a"], 1) for _ in range(17)].count(True) <= 2
    assert looks(["b"], 1)
    assert looks(["a", "b"], 2)
    waiting[0] = 100
    assert looks(["a", "b"], 2)


def test_a_draft_keeps_the_values_that_its_drafter_gave() -> None:
    """What becomes of it is counted where the next guess of the same kind will look."""
    budget = budget_with(lambda rows: 1.0 + rows / 1000)
    tree = DraftTree.chain((1, 2), source="s", values=(0.3, 0.1))
    for _ in range(30):
        budget.calibration.observe("other", tree, (0, 1))
    assert step(budget, ["a"], tree) == [tree]
    assert budget.calibration.values("a", tree)[1] > 0.5


def test_a_step_goes_without_drafts_now_and_then_so_that_plain_steps_stay_known() -> None:
    budget = budget_with(lambda rows: 1.0 + rows / 1000)
    drafted = []
    for _ in range(200):
        trees = step(budget, ["a"], TREE)
        drafted.append(len(trees[0]))
        timed(budget, 1, len(trees[0]), 1.0)
        if trees[0].tokens:
            budget.observe(view("a"), trees[0], (0, 1, 2))
    assert 3 <= drafted.count(0) <= 8
