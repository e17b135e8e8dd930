"""The budget of a running engine: cost table and calibration around the arithmetic of `budget`.

Implements engine.speculation.manager.Budget. Knows views and trees; the core tells it how long steps took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.speculation.base import RequestView
from engine.speculation.budget import Load, prune, select, worth_guessing
from engine.speculation.calibration import Calibration
from engine.speculation.cost import CostTable, context_bucket
from engine.speculation.manager import BudgetFigures
from engine.speculation.tree import DraftTree

_HOPE = 3.0  # accepted tokens per draft that are expected before any has been seen
_FIRST_HOPE = 8.0  # of a new request, where a guess takes little: the guess itself will tell more
_LITTLE = 0.1  # of a plain step
_LONGEST = 16  # more is not expected of any
_RATE = 0.2  # of a new draft in a request's average
_TYPICAL_RATE = 0.05  # and in the average of all, with which new requests begin
_RECOVERY = 0.003  # per step without a draft, back to hope: what failed once is tried again
_FIRST_TRIAL = 10  # steps without any draft after which one is tried, because costs that were never seen are guessed
_TRIAL_EVERY = 200  # the same later, so that a wrong cost does not stay for ever
_TRIAL_STEPS = 3  # one after the other: as often as a cost must be seen to be believed
_TRIAL_NODES = 4
_MARGIN = 1.05  # of the rate of plain steps: what gains less than costs are known to vary is not worth it
_TRIAL_SHARE = 4  # a trial is made with one request of so many
_FEWER = 0.75  # share of the rows from which on a refusal does not hold any more
_LONGEST_REST = 32  # steps in which nothing is asked again after it was not worth it
_LONGEST_HOLD = 16  # steps for which a selection holds that was found again and again
_SIMILAR = 0.75  # share of the nodes of one selection that the next must have to count as found again
_BALANCE_RATE = 0.2  # of a step with drafts in the average of what such steps gained
_LEAST_BALANCED = 4  # steps with drafts before that average is believed
_FIRST_LOSS_REST = 16  # steps in which nothing is asked after drafts have lost time; doubled while they go on with it
_LONGEST_LOSS_REST = 512
_PATIENCE = 4  # guesses in a row of which nothing was selected, after which it counts as not worth it


@dataclass(slots=True)
class _Decision:
    """What a look at all nodes has found: it holds for a number of steps of the same requests."""

    keys: list[str]
    wanted: list[int]
    situation: tuple[int, int, bool]  # rows, context bucket, whether prompts wait
    caps: list[int]
    num_steps: int  # for which it holds
    num_left: int
    num_nodes: int  # of all requests
    num_failed: int = 0  # drafts of which less than half was accepted


@dataclass(slots=True)
class _Balance:
    """What steps with drafts have really gained: in plain steps, on average over the last ones.

    Expectations may err, and what was expected wrongly would be tried again for every new request.
    """

    mean: float = 0.0
    num_steps: int = 0
    rest: int = _FIRST_LOSS_REST
    # of the step at hand, where something was selected
    num_rows: int = 0
    plain_s: float = 0.0
    extra_s: float = 0.0  # beyond the plain step: guesses, those since the last such step included, and checking
    num_accepted: int = 0
    guess_s: float = 0.0

    def begin(self, num_rows: int, plain_s: float) -> None:
        self.num_rows, self.plain_s, self.num_accepted = num_rows, plain_s, 0
        self.extra_s, self.guess_s = self.guess_s, 0.0

    def settle(self) -> bool:
        """The step is over. Returns whether such steps have lost time, after which the average begins anew."""
        if self.num_rows == 0 or self.plain_s <= 0.0:
            return False
        gained = self.num_accepted / self.num_rows - self.extra_s / self.plain_s
        self.num_rows = 0
        self.num_steps += 1
        self.mean += max(_BALANCE_RATE, 1 / self.num_steps) * (gained - self.mean)
        if self.num_steps < _LEAST_BALANCED:
            return False
        if self.mean >= 0.0:
            self.rest = _FIRST_LOSS_REST
            return False
        self.mean, self.num_steps = 0.0, 0
        return True


class LoadAwareBudget:
    """Drafts where the batch gains by it. One thread calls everything.

    Looking at every node of every draft takes longer than a short step saves. So what was found holds for some steps,
    the more the more often the same was found, and as long as the drafts succeed; a guess has no more nodes then than
    were worth it before. Acceptance is learnt from the drafts that were looked at.
    """

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
        self._lengths: dict[str, float] = {}  # accepted tokens per draft, by request that had one
        self._num_refused = 0  # steps since anything was drafted
        self._is_trial = False  # the step at hand
        self._rest = 0  # steps for which the last refusal still holds
        self._next_rest = 1
        self._rested_rows = 0
        self._rate = 0.0  # expected tokens per second of the last selection
        self._num_selected = 0  # nodes in it
        self._typical = _HOPE  # accepted tokens per draft, of all requests
        self._expected = _HOPE  # the same of a request that has not been seen
        self._decision: _Decision | None = None
        self._wanted: Sequence[int] = ()  # of the step at hand
        self._situation = (0, 0, False)  # likewise
        self._is_look = True  # whether the nodes of the step at hand are looked at
        self._num_empty = 0  # looks in a row that selected nothing
        self._balance = _Balance()
        self._num_trials = 0
        self._next_trial = _FIRST_TRIAL
        self._trial_left = 0  # steps

    def rests(self, num_rows: int) -> bool:
        """Whether to leave this step alone without looking at requests. Asked once per step, before `caps`.

        What was not worth it a moment ago, with as many rows, is not asked again in every step.
        """
        if self._balance.settle():
            self._decision = None
            self._rest, self._rested_rows = self._balance.rest, num_rows
            self._balance.rest = min(2 * self._balance.rest, _LONGEST_LOSS_REST)
        self._num_refused += 1
        if self._num_refused >= self._next_trial:
            self._num_refused = self._rest = 0
            self._next_trial = min(2 * self._next_trial, _TRIAL_EVERY)
            self._trial_left = _TRIAL_STEPS
            self._num_trials += 1
        self._is_trial = self._trial_left > 0
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
        self._wanted = wanted
        self._situation = (num_rows, context_bucket(context), self._num_waiting_tokens() > 0)
        if not self._is_trial and self._still_holds(views):
            assert self._decision is not None, "it holds"
            self._decision.num_left -= 1
            self._is_look = False
            self._num_refused = 0
            return self._decision.caps
        self._is_look = True
        if not self.costs.knows_plain(num_rows, context):
            return [0] * len(views)  # without the cost of plain steps nobody can say what beats them
        if self._is_trial:
            return self._trial(wanted, drafters)
        plain_cost = self.costs.plain_cost(num_rows, context)
        self._expected = self._typical if self._is_dear(drafters, plain_cost) else _FIRST_HOPE
        outlooks = [
            _outlook(self._lengths.get(view.key, self._expected), min(most, view.max_depth))
            for view, most in zip(views, wanted, strict=True)
        ]
        found = worth_guessing(
            outlooks,
            drafters,
            self._guess_cost,
            self.costs.curve(context),
            plain_cost=plain_cost,
            load=self._load(num_rows),
            max_nodes=self._num_free_slots(),
        )
        if not any(found.num_nodes):
            self._refuse(views, num_rows)
            return [0] * len(views)
        self._num_refused = 0
        self._allowed = found.sources
        self._recover([view for view, count in zip(views, found.num_nodes, strict=True) if count == 0])
        return [most if count > 0 else 0 for most, count in zip(wanted, found.num_nodes, strict=True)]

    def _still_holds(self, views: Sequence[RequestView]) -> bool:
        """Whether the last decision may be used once more."""
        decision = self._decision
        return (
            decision is not None
            and decision.num_left > 0
            and decision.situation == self._situation
            and decision.keys == [view.key for view in views]
            and decision.wanted == list(self._wanted)
            and self._num_free_slots() >= sum(decision.caps)
        )

    def _trial(self, wanted: Sequence[int], drafters: Sequence[Sequence[str]]) -> list[int]:
        """A few nodes for some requests, the next time for others."""
        self._decision = None
        self._num_refused = 0
        self._trial_left -= 1
        self._allowed = frozenset(name for own in drafters for name in own)
        return [
            min(most, _TRIAL_NODES) if (place + self._num_trials) % min(_TRIAL_SHARE, len(wanted)) == 0 else 0
            for place, most in enumerate(wanted)
        ]

    def _refuse(self, views: Sequence[RequestView], num_rows: int) -> None:
        """It is not worth it: for some steps nothing is asked."""
        self._decision = None
        self._num_empty = _PATIENCE - 1  # after the rest one more look is enough
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
        self._rested_rows = num_rows
        self._recover(views)

    def allows(self, drafter: str) -> bool:
        """Whether the drafter is worth its time in this step: after `caps`, for requests that may have nodes."""
        return drafter in self._allowed

    def _recover(self, views: Sequence[RequestView]) -> None:
        for view in views:
            length = self._lengths.get(view.key, self._expected)
            if length < _HOPE:
                self._lengths[view.key] = length + self._next_rest * _RECOVERY * (_HOPE - length)

    def select(self, views: Sequence[RequestView], trees: Sequence[DraftTree], num_rows: int) -> list[DraftTree]:
        """What of the guesses is worth its cost, with calibrated values. Sampled drafts stay whole."""
        if self._is_trial:
            return list(trees)
        if not self._is_look:
            if any(tree.tokens for tree in trees):
                self._balance.begin(num_rows, self.costs.plain_cost(num_rows, _context(views)))
            return list(trees)
        values = [
            self.calibration.values(view.key, tree) if tree.kind == "delta" else ()
            for view, tree in zip(views, trees, strict=True)
        ]
        fixed = [tree for tree in trees if tree.kind != "delta"]
        num_fixed = sum(map(len, fixed))
        context = _context(views)
        curve, plain_cost = self.costs.curve(context), self.costs.plain_cost(num_rows, context)
        found = select(
            values,
            [1.0] * len(views),
            curve,
            plain_cost=plain_cost if num_fixed == 0 else curve.at(num_rows + num_fixed),
            load=self._load(num_rows + num_fixed),
            max_nodes=self._num_free_slots() - num_fixed,
            base_gain=num_rows + sum(sum(tree.values) for tree in fixed),
            least_rate=_MARGIN * num_rows / plain_cost,
        )
        self._rate, self._num_selected = found.rate, found.num_nodes + num_fixed
        kept = [prune(tree, nodes) for tree, nodes in zip(trees, found.nodes, strict=True)]
        self._decide(views, trees, kept, num_rows)
        return kept

    def _decide(
        self, views: Sequence[RequestView], trees: Sequence[DraftTree], kept: Sequence[DraftTree], num_rows: int
    ) -> None:
        """What was selected now is the bound of the next steps' guesses; nothing, and they may rest soon."""
        for view, tree, own in zip(views, trees, kept, strict=True):
            if tree.tokens and not own.tokens:  # a guess that is not worth checking is one more that was not accepted
                length = self._lengths.get(view.key, self._expected)
                self._lengths[view.key] = length - _RATE * length
                self._typical -= _TYPICAL_RATE * self._typical
        num_nodes = sum(map(len, kept))
        if num_nodes == 0:
            self._decision = None
            self._num_empty += 1
            if self._num_empty >= _PATIENCE:
                self._refuse(views, num_rows)
            return
        self._balance.begin(num_rows, self.costs.plain_cost(num_rows, _context(views)))
        self._num_empty, self._next_rest = 0, 1
        before, wanted = self._decision, self._wanted
        num_steps = 1
        if before is not None and before.num_failed == 0 and _SIMILAR <= num_nodes / before.num_nodes <= 1 / _SIMILAR:
            num_steps = min(2 * before.num_steps, _LONGEST_HOLD)
        caps = [
            most if len(own) == len(tree) > 0 else len(own) for tree, own, most in zip(trees, kept, wanted, strict=True)
        ]
        keys = [view.key for view in views]
        self._decision = _Decision(keys, list(wanted), self._situation, caps, num_steps, num_steps, num_nodes)

    def observe(self, view: RequestView, tree: DraftTree, accepted: Sequence[int]) -> None:
        """What became of a tree: the path of its nodes that were accepted."""
        self._balance.num_accepted += len(accepted)
        depth = max(tree.depths)
        # of a draft that was accepted to its end nobody knows how much longer it might have been
        found = len(accepted) if len(accepted) < depth else min(2 * depth, _LONGEST)
        length = self._lengths.get(view.key)
        self._lengths[view.key] = found if length is None else length + _RATE * (found - length)
        self._typical += _TYPICAL_RATE * (found - self._typical)
        if self._is_look:
            self.calibration.observe(view.key, tree, accepted)
        elif self._decision is not None and 2 * len(accepted) < depth:
            self._decision.num_failed += 1
            if 2 * self._decision.num_failed > len(self._decision.keys):
                self._decision.num_left = 0

    def figures(self) -> BudgetFigures:
        return BudgetFigures(self._rate, self._num_selected, self.calibration.error)

    def time_guess(self, drafter: str, num_requests: int, seconds: float) -> None:
        """A drafter has guessed for so many requests in this time."""
        self._balance.guess_s += seconds
        self._guess_costs.setdefault(drafter, CostTable()).observe(num_requests, 0, seconds, is_plain=False)

    def forget(self, key: str) -> None:
        """The request is over."""
        self._lengths.pop(key, None)
        self.calibration.forget(key)

    def time_step(self, num_rows: int, num_context_tokens: int, seconds: float, *, is_plain: bool) -> None:
        """A step took so long; is_plain: nothing was guessed and all rows decode."""
        if not is_plain:
            self._balance.extra_s += seconds - self._balance.plain_s
        self.costs.observe(num_rows, num_context_tokens, seconds, is_plain=is_plain)

    def _load(self, num_rows: int) -> Load:
        return Load(num_rows, self._num_waiting_tokens(), self._max_rows)

    def _is_dear(self, drafters: Sequence[Sequence[str]], plain_cost: float) -> bool:
        """Whether a guess of all who would be asked takes more than a little."""
        names = frozenset(name for own in drafters for name in own)
        return sum(self._guess_cost(name, len(drafters)) for name in names) > _LITTLE * plain_cost

    def _guess_cost(self, drafter: str, num_requests: int) -> float:
        costs = self._guess_costs.get(drafter)
        return 0.0 if costs is None or not costs.is_settled else costs.cost(num_requests, 0)


def _context(views: Sequence[RequestView]) -> int:
    return sum([len(view.token_ids) for view in views])


def _outlook(mean_length: float, num_nodes: int) -> list[float]:
    """Values of a chain of which `mean_length` tokens are accepted on average."""
    rate = mean_length / (1.0 + mean_length)
    return [rate ** (depth + 1) for depth in range(num_nodes)]
