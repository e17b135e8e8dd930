"""The budget of a running engine: cost table and calibration around the arithmetic of `budget`.

Implements engine.speculation.manager.Budget. Knows views and trees; the core tells it how long steps took.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from engine.speculation.base import RequestView
from engine.speculation.budget import Load, prune, select, worth_guessing
from engine.speculation.calibration import Calibration
from engine.speculation.cost import CostTable
from engine.speculation.manager import BudgetFigures
from engine.speculation.tree import DraftTree

_HOPE = 3.0  # accepted tokens that a request is expected to give before it has been seen
_RATE = 0.2  # of a new draft in a request's average
_RECOVERY = 0.003  # per step without a draft, back to hope: what failed once is tried again
_TRIAL_EVERY = 200  # steps without any draft after which one is tried, so that a wrong cost does not stay for ever
_TRIAL_NODES = 4
_FEWER = 0.75  # share of the rows from which on a refusal does not hold any more
_LONGEST_REST = 16  # steps in which nothing is asked again after it was not worth it


class LoadAwareBudget:
    """Drafts where the batch gains by it. One thread calls everything."""

    def __init__(
        self,
        costs: CostTable,
        calibration: Calibration,
        *,
        max_rows: int,
        num_waiting_tokens: Callable[[], int] = lambda: 0,
        num_free_slots: Callable[[], int] = lambda: 1 << 30,
    ) -> None:
        """
        max_rows            tokens that a step may have
        num_waiting_tokens  prompt tokens that would take part in the next step if there were room
        num_free_slots      cache slots that drafts may have without taking any from a request
        """
        self.costs = costs
        self.calibration = calibration
        self._max_rows = max_rows
        self._num_waiting_tokens = num_waiting_tokens
        self._num_free_slots = num_free_slots
        self._guess_costs: dict[str, CostTable] = {}  # by drafter; its rows are requests
        self._allowed: frozenset[str] = frozenset()
        self._lengths: dict[str, float] = {}  # accepted tokens per draft, by request
        self._num_refused = 0  # steps since anything was drafted
        self._is_trial = False  # the step at hand
        self._rest = 0  # steps for which the last refusal still holds
        self._next_rest = 1
        self._rested_rows = 0
        self._rate = 0.0  # expected tokens per second of the last selection
        self._num_selected = 0  # nodes in it

    def rests(self, num_rows: int) -> bool:
        """Whether to leave this step alone without looking at requests. Asked once per step, before `caps`.

        What was not worth it a moment ago, with as many rows, is not asked again in every step.
        """
        self._num_refused += 1
        self._is_trial = self._num_refused >= _TRIAL_EVERY
        if self._is_trial:
            self._num_refused = self._rest = 0
        if self._rest == 0 or num_rows < _FEWER * self._rested_rows:
            return False
        self._rest -= 1
        return True

    def caps(
        self,
        views: Sequence[RequestView],
        wanted: Sequence[int],
        num_rows: int,
        drafters: Sequence[Sequence[str]],
    ) -> list[int]:
        """Before anything is guessed: the nodes that each request may have, 0 where guessing is not worth its time.

        What passes here may still be cut by `select`; a request is not cut short before its tree is seen.
        """
        context = _context(views)
        if not self.costs.knows_plain(num_rows, context):
            return [0] * len(views)  # without the cost of plain steps nobody can say what beats them
        if self._is_trial:
            self._allowed = frozenset(name for own in drafters for name in own)
            return [min(most, _TRIAL_NODES) for most in wanted]
        outlooks = [
            _outlook(self._lengths.get(view.key, _HOPE), min(most, view.max_depth))
            for view, most in zip(views, wanted, strict=True)
        ]
        found = worth_guessing(
            outlooks,
            drafters,
            self._guess_cost,
            self.costs.curve(context),
            plain_cost=self.costs.plain_cost(num_rows, context),
            load=self._load(num_rows),
            max_nodes=self._num_free_slots(),
        )
        if not any(found.num_nodes):
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
            self._rested_rows = num_rows
            self._recover(views)
            return [0] * len(views)
        self._num_refused, self._next_rest = 0, 1
        self._allowed = found.sources
        self._recover([view for view, count in zip(views, found.num_nodes, strict=True) if count == 0])
        return [most if count > 0 else 0 for most, count in zip(wanted, found.num_nodes, strict=True)]

    def allows(self, drafter: str) -> bool:
        """Whether the drafter is worth its time in this step: after `caps`, for requests that may have nodes."""
        return drafter in self._allowed

    def _recover(self, views: Sequence[RequestView]) -> None:
        for view in views:
            length = self._lengths.get(view.key)
            if length is not None:
                self._lengths[view.key] = length + self._next_rest * _RECOVERY * (_HOPE - length)

    def select(self, views: Sequence[RequestView], trees: Sequence[DraftTree], num_rows: int) -> list[DraftTree]:
        """What of the guesses is worth its cost, with calibrated values. Sampled drafts stay whole."""
        if self._is_trial:
            return list(trees)
        judged = [
            tree if tree.kind != "delta" else dataclasses.replace(tree, values=self.calibration.values(view.key, tree))
            for view, tree in zip(views, trees, strict=True)
        ]
        fixed = [tree for tree in trees if tree.kind != "delta"]
        num_fixed = sum(map(len, fixed))
        context = _context(views)
        curve, plain_cost = self.costs.curve(context), self.costs.plain_cost(num_rows, context)
        found = select(
            [tree.values if tree.kind == "delta" else () for tree in judged],
            [1.0] * len(views),
            curve,
            plain_cost=plain_cost if num_fixed == 0 else curve.at(num_rows + num_fixed),
            load=self._load(num_rows + num_fixed),
            max_nodes=self._num_free_slots() - num_fixed,
            base_gain=num_rows + sum(sum(tree.values) for tree in fixed),
            least_rate=num_rows / plain_cost,
        )
        self._rate, self._num_selected = found.rate, found.num_nodes + num_fixed
        return [prune(tree, nodes) for tree, nodes in zip(judged, found.nodes, strict=True)]

    def observe(self, view: RequestView, tree: DraftTree, accepted: Sequence[int]) -> None:
        """What became of a tree: the path of its nodes that were accepted."""
        length = self._lengths.get(view.key, _HOPE)
        self._lengths[view.key] = length + _RATE * (len(accepted) - length)
        self.calibration.observe(view.key, tree, accepted)

    def figures(self) -> BudgetFigures:
        return BudgetFigures(self._rate, self._num_selected, self.calibration.error)

    def time_guess(self, drafter: str, num_requests: int, seconds: float) -> None:
        """A drafter has guessed for so many requests in this time."""
        self._guess_costs.setdefault(drafter, CostTable()).observe(num_requests, 0, seconds, is_plain=False)

    def forget(self, key: str) -> None:
        """The request is over."""
        self._lengths.pop(key, None)
        self.calibration.forget(key)

    def time_step(self, num_rows: int, num_context_tokens: int, seconds: float, *, is_plain: bool) -> None:
        """A step took so long; is_plain: nothing was guessed and all rows decode."""
        self.costs.observe(num_rows, num_context_tokens, seconds, is_plain=is_plain)

    def _load(self, num_rows: int) -> Load:
        return Load(num_rows, self._num_waiting_tokens(), self._max_rows)

    def _guess_cost(self, drafter: str, num_requests: int) -> float:
        costs = self._guess_costs.get(drafter)
        return 0.0 if costs is None or not costs.is_settled else costs.cost(num_requests, 0)


def _context(views: Sequence[RequestView]) -> int:
    return sum([len(view.token_ids) for view in views])


def _outlook(mean_length: float, num_nodes: int) -> list[float]:
    """Values of a chain of which `mean_length` tokens are accepted on average."""
    rate = mean_length / (1.0 + mean_length)
    return [rate ** (depth + 1) for depth in range(num_nodes)]
