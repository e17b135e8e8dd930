"""The budget finds the best connected set of nodes for the whole batch, and drafts nothing where that costs more."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from engine.speculation import budget as budget_module
from engine.speculation import load_budget
from engine.speculation.base import RequestView
from engine.speculation.budget import Load, Selection, prune, select, worth_guessing
from engine.speculation.calibration import Calibration
from engine.speculation.cost import CostTable
from engine.speculation.load_budget import _FIRST_LOSS_REST, _LEAST_BALANCED, LoadAwareBudget, _Balance
from engine.speculation.tree import DraftTree

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


def test_a_drafter_is_called_for_nobody_when_its_own_time_eats_the_gain() -> None:
    outlook = [[0.8, 0.64, 0.512, 0.41]]

    def num_nodes(seconds: float) -> list[int]:
        return worth_guessing(
            outlook, [["m"]], lambda source, requests: seconds, each(lambda rows: 1.0), plain_cost=1.0, load=Load(1),
            max_nodes=16,
        ).num_nodes  # fmt: skip

    assert num_nodes(0.0) == num_nodes(2.3) == [4]
    assert num_nodes(2.4) == [0]  # 3.362 tokens in 3.4 seconds


def test_a_dear_drafter_is_left_out_where_a_cheap_one_does_as_well() -> None:
    outlooks = [[0.9, 0.8], [0.9, 0.8], [0.9, 0.8]]

    def found(sources: list[list[str]]) -> tuple[list[int], set[str]]:
        guessing = worth_guessing(
            outlooks, sources, lambda source, requests: {"dear": 5.0, "cheap": 0.01}[source] * requests,
            each(lambda rows: 1.0), plain_cost=1.0, load=Load(3), max_nodes=16,
        )  # fmt: skip
        return guessing.num_nodes, set(guessing.sources)

    assert found([["dear"], ["cheap"], ["cheap", "dear"]]) == ([0, 2, 2], {"cheap"})
    assert found([["dear"]] * 3) == ([0, 0, 0], set())


def test_requests_without_prospects_ask_for_nothing() -> None:
    found = worth_guessing(
        [[0.9, 0.8, 0.7], [0.05, 0.01, 0.0]], [["m"], ["m"]], lambda source, requests: 0.05 * requests,
        each(lambda rows: 1.0 + 0.1 * (rows - 2)), plain_cost=1.0, load=Load(2), max_nodes=16,
    )  # fmt: skip
    assert found.num_nodes == [3, 0]


def test_a_sampled_draft_is_never_pruned_by_what_was_sampled() -> None:
    sampled = DraftTree((1, 2), (-1, 0), (0.5, 0.1), ("m", "m"), kind="swor", q=np.ones((2, 4), dtype=np.float32) / 4)
    assert prune(sampled, (0,)) is sampled
    assert prune(DraftTree((1, 2), (-1, 0), (0.5, 0.1), ("m", "m")), (0,)).tokens == (1,)


# The budget of an engine -----------------------------------------------------------------------------------------


def view(key: str) -> RequestView:
    return RequestView(key, list(range(100)), 50)


def caps_of(budget: LoadAwareBudget, drafters: Sequence[str] = ("s",)) -> list[int]:
    """What one step of a request alone would allow it."""
    return [0] if budget.rests(1) else budget.caps([view("a")], [4], 1, [drafters])


def budget_with(cost: Callable[[int], float], **options: object) -> LoadAwareBudget:
    costs = CostTable()
    for rows in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128):
        for _ in range(3):
            costs.observe(rows, 100, cost(rows), is_plain=False)
            costs.observe(rows, 100, cost(rows), is_plain=True)
    return LoadAwareBudget(costs, Calibration(), max_rows=512, **options)  # type: ignore[arg-type]


def test_cheap_rows_are_used_and_saturated_ones_are_not() -> None:
    tree = DraftTree.chain((1, 2, 3), source="s", values=(0.9, 0.8, 0.7))
    cheap, dear = budget_with(lambda rows: 1.0 + rows / 1000), budget_with(lambda rows: float(rows))
    assert caps_of(cheap) == [4]
    assert cheap.select([view("a")], [tree], 1)[0].tokens == (1, 2, 3)
    assert caps_of(dear) == [0]
    assert dear.select([view("a")], [tree], 1)[0].tokens == ()
    assert cheap.figures().num_selected == 3
    assert cheap.figures().expected_rate > dear.figures().expected_rate
    assert dear.figures().num_selected == 0


def test_a_request_whose_drafts_fail_is_left_alone_and_tried_again_later() -> None:
    budget = budget_with(lambda rows: 1.0 + rows / 10)
    tree = DraftTree.chain((1, 2), source="s", values=(0.9, 0.8))
    assert caps_of(budget) == [4]
    for _ in range(40):
        budget.observe(view("a"), tree, ())
    assert caps_of(budget) == [0]
    assert budget.select([view("a")], [tree], 1)[0].tokens == ()
    waits = next(step for step in range(200) if caps_of(budget) == [4])
    assert waits > 2
    budget.forget("a")
    assert any(caps_of(budget) == [4] for _ in range(20))


def test_where_drafting_never_pays_it_is_tried_once_in_a_long_while() -> None:
    """Otherwise a cost that was once measured too high would never be measured again."""
    budget = budget_with(lambda rows: float(rows))
    tree = DraftTree.chain((1, 2), source="s", values=(0.9, 0.8))
    tried = [step for step in range(1_000) if any(caps_of(budget))]
    begun = [step for step in tried if step - 1 not in tried]
    assert len(tried) == 3 * len(begun)  # as often as a cost must be seen to be believed
    assert np.diff([-1, *begun]).tolist() == [10, 22, 42, 82, 162, 202, 202, 202]  # what is not known yet, soon
    assert budget.allows("s")
    while not any(caps_of(budget)):
        assert budget.select([view("a")], [tree], 1)[0].tokens == ()
    assert budget.select([view("a")], [tree], 1) == [tree]


def test_the_budget_learns_the_cost_of_steps_while_serving() -> None:
    budget = LoadAwareBudget(CostTable(), Calibration(), max_rows=512)
    assert caps_of(budget) == [0]  # plain steps come first: they are what must be beaten
    for _ in range(3):
        budget.time_step(1, 100, 1.0, is_plain=True)
    assert caps_of(budget) == [4]  # of drafts nothing is known: try
    for _ in range(10):
        budget.time_step(1, 100, 1.0, is_plain=True)
        budget.time_step(5, 100, 9.0, is_plain=False)
    assert caps_of(budget) == [0]
    for _ in range(60):
        budget.time_step(5, 100, 1.1, is_plain=False)
    assert any(caps_of(budget) == [4] for _ in range(20))  # not asked anew in every step


def test_the_budget_learns_what_guessing_takes_and_drops_who_is_too_slow() -> None:
    budget = budget_with(lambda rows: 1.0 + rows / 1000)
    assert caps_of(budget, ("slow", "quick")) == [4]
    assert budget.allows("slow")
    for _ in range(5):
        budget.time_guess("slow", 1, 20.0)
        budget.time_guess("quick", 1, 0.001)
    assert caps_of(budget, ("slow", "quick")) == [4]
    assert not budget.allows("slow")
    assert budget.allows("quick")
    assert caps_of(budget, ("slow",)) == [0]


def test_sampled_drafts_are_counted_but_not_cut() -> None:
    budget = budget_with(lambda rows: float(rows))
    q = np.full((3, 4), 0.25, dtype=np.float32)
    sampled = DraftTree((1, 2), (-1, 0), (0.2, 0.1), ("m", "m"), kind="swor", q=q)
    host = DraftTree.chain((1, 2), source="s", values=(0.9, 0.8))
    budget.caps([view("a"), view("b")], [4, 4], 2, [["m"], ["s"]])
    found = budget.select([view("a"), view("b")], [sampled, host], 2)
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


def run_steps(budget: LoadAwareBudget, num_steps: int, *, succeeds: bool, num_requests: int = 1) -> list[int]:
    """Drafted nodes by step of requests whose guesses are all right, or all wrong."""
    views = [view(f"r{i}") for i in range(num_requests)]
    drafted = []
    for _ in range(num_steps):
        caps = (
            [0]
            if budget.rests(num_requests)
            else budget.caps(views, [4] * num_requests, num_requests, [["s"]] * num_requests)
        )
        trees: list[DraftTree] = []
        if any(caps):
            guesses = [
                DraftTree.chain((1, 2, 3, 4)[:cap], source="s", values=(0.9, 0.8, 0.7, 0.6)[:cap]) for cap in caps
            ]
            trees = budget.select(views, guesses, num_requests)
            for own, tree in zip(views, trees, strict=True):
                if tree.tokens:
                    budget.observe(own, tree, tuple(range(len(tree))) if succeeds else ())
        drafted.append(sum(map(len, trees)))
    return drafted


@pytest.mark.parametrize("num_requests", [1, 5])
def test_a_selection_holds_while_drafts_succeed(num_requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = budget_with(lambda rows: 1.0 + rows / 1000)
    selects, looks = Counted(select), Counted(worth_guessing)
    monkeypatch.setattr(load_budget, "select", selects)
    monkeypatch.setattr(load_budget, "worth_guessing", looks)
    assert run_steps(budget, 400, succeeds=True, num_requests=num_requests) == [4 * num_requests] * 400
    assert selects.count == looks.count < 400 / 12


def test_a_selection_ends_with_the_success_of_its_drafts() -> None:
    """Nothing but what was drafted while it held is lost by it."""
    budget = budget_with(lambda rows: 1.0 + rows / 10)
    run_steps(budget, 100, succeeds=True)
    drafted = run_steps(budget, 100, succeeds=False)
    assert sum(count > 0 for count in drafted) < 40
    assert sum(count > 0 for count in drafted[-50:]) <= 10


def test_a_selection_holds_for_its_own_requests_and_load_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [0]
    budget = budget_with(lambda rows: 1.0 + rows / 1000, num_waiting_tokens=lambda: waiting[0])
    selects = Counted(select)
    monkeypatch.setattr(load_budget, "select", selects)

    def look(views: Sequence[RequestView], num_rows: int) -> bool:
        """Whether a step of these requests looks at the nodes."""
        before = selects.count
        caps = budget.caps(views, [4] * len(views), num_rows, [["s"]] * len(views))
        budget.select(views, [DraftTree.chain((1, 2, 3, 4)[:cap], source="s") for cap in caps], num_rows)
        return selects.count > before

    run_steps(budget, 50, succeeds=True)
    same = [look([view("r0")], 1) for _ in range(17)]
    assert 1 <= same.count(True) <= 2
    assert look([view("r1")], 1)
    assert look([view("r1")], 2)
    assert look([view("r1"), view("r2")], 2)
    waiting[0] = 100
    assert look([view("r1"), view("r2")], 2)


def test_a_draft_keeps_the_values_that_its_drafter_gave() -> None:
    """What becomes of it is counted where the next guess of the same kind will look."""
    budget = budget_with(lambda rows: 1.0 + rows / 1000)
    tree = DraftTree.chain((1, 2), source="s", values=(0.3, 0.1))
    for _ in range(30):
        budget.calibration.observe("other", tree, (0, 1))
    budget.caps([view("a")], [4], 1, [["s"]])
    found = budget.select([view("a")], [tree], 1)[0]
    assert found == tree
    assert budget.calibration.values("a", tree)[1] > 0.5


def test_a_trial_asks_some_of_the_requests() -> None:
    budget = budget_with(lambda rows: float(rows))
    views = [view(f"r{i}") for i in range(8)]
    tried = []
    for _ in range(300):
        caps = [0] * 8 if budget.rests(8) else budget.caps(views, [6] * 8, 8, [["s"]] * 8)
        if any(caps):
            tried.append(caps)
    assert all(sorted(caps) == [0] * 6 + [4] * 2 for caps in tried)
    assert all(any(caps[place] for caps in tried) for place in range(8)), "everybody's turn comes"


def test_steps_with_drafts_that_lose_time_are_followed_by_ever_longer_rests() -> None:
    balance = _Balance()
    rests = []
    for _ in range(3 * _LEAST_BALANCED):
        balance.begin(num_rows=8, plain_s=0.001)
        balance.extra_s += 0.001  # as long again as a plain step
        balance.num_accepted += 2  # a quarter of a plain step's tokens
        if balance.settle():
            rests.append(balance.rest)
            balance.rest *= 2
    assert rests == [_FIRST_LOSS_REST, 2 * _FIRST_LOSS_REST, 4 * _FIRST_LOSS_REST]


def test_steps_with_drafts_that_gain_make_rests_short_again() -> None:
    balance = _Balance(rest=512)
    for _ in range(_LEAST_BALANCED):
        balance.begin(num_rows=1, plain_s=0.001)
        balance.extra_s += 0.001
        balance.num_accepted += 4
        assert not balance.settle()
    assert balance.rest == _FIRST_LOSS_REST
    assert not balance.settle(), "a step without drafts says nothing"


def test_guesses_count_that_led_to_no_draft() -> None:
    balance = _Balance(guess_s=0.5)
    balance.begin(num_rows=1, plain_s=1.0)
    assert (balance.extra_s, balance.guess_s) == (0.5, 0.0)
