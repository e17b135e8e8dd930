"""The budget of a running engine: cost table, calibration and accounts around the arithmetic of `budget`.

Implements engine.speculation.allowance.Budget. Knows views and trees; the core tells it how long steps took.
Expectations say what is checked, and may be wrong; the accounts see to it that this costs next to nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.speculation.accounts import MAX_STALL, Accounts, Stalls
from engine.speculation.allowance import BudgetFigures, StepTime
from engine.speculation.base import RequestView
from engine.speculation.budget import Load, Selection, prune, select
from engine.speculation.calibration import Calibration
from engine.speculation.cost import CostTable, context_bucket
from engine.speculation.tree import EMPTY, DraftTree

_MARGIN = 1.05  # of the rate of plain steps: what gains less than costs are known to vary is not worth it
_LONGEST_WAIT = 8  # steps until a request is asked for again of which nothing was worth checking, or accepted
_LONGEST_HOLD = 16  # steps for which a selection holds that was found again and again
_SIMILAR = 0.75  # share of the nodes of one selection that the next must have to count as found again
_CONTROL_EVERY = 48  # steps with drafts after which one goes without: what plain steps take now must stay known
_BARREN = 8  # looks in a row that selected nothing, after which a few nodes are checked: costs may be known wrongly
_TRIAL_NODES = 4


@dataclass(slots=True)
class _Record:
    """How one request is asked for."""

    names: tuple[str, ...]
    due: int = 0  # the step from which on it may be asked for
    wait: int = 0  # steps in between, as of late
    limit: int = 0  # nodes that were worth checking in the last look
    hold: int = 0  # steps for which that holds
    num_held: int = 0  # of them, those to come


class LoadAwareBudget:
    """Drafts where the batch gains by it. One thread calls everything.

    Looking at every node of every draft takes longer than a short step saves. So what was found holds for some steps,
    the more the more often the same was found, and as long as the drafts succeed. Acceptance is learnt from the drafts
    that were looked at.
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
        self.accounts = Accounts()
        self._max_rows = max_rows
        self._num_waiting_tokens = num_waiting_tokens
        self._num_free_slots = num_free_slots
        self._records: dict[str, _Record] = {}
        self._step = 0
        self._next_due = 0  # no request is due before
        self._turn = 0  # whose turn it is to be asked first, where not all can be afforded
        self._situation = (0, 0, False)  # rows, context bucket, whether prompts wait, when selections were made
        self._asked: Counter[str] = Counter()  # requests for the step at hand, by drafter
        self._num_nodes: Counter[str] = Counter()  # to be checked in it, by source
        self._is_look = True  # whether its nodes were looked at
        self._token_s = 0.0  # what a token of one request takes in a plain step, whose time its rows share
        self._extra_s = 0.0  # what the step at hand took beyond a plain one
        self._is_trial = False  # whether they are checked although nothing was expected of them
        self._rate = 0.0  # expected tokens per second of the last selection
        self._num_selected = 0  # nodes in it
        self._checking = Stalls()
        self._num_barren = 0  # looks in a row that found something, and selected nothing
        self._num_since_plain = 0  # steps with drafts

    def begin(self, key: str, drafters: Sequence[str]) -> None:
        """A request that speculates begins to decode."""
        self._records[key] = _Record(tuple(drafters), due=self._step)
        self._next_due = self._step
        self.accounts.begin(drafters)

    def forget(self, key: str) -> None:
        """The request is over."""
        record = self._records.pop(key, None)
        if record is not None:
            self.accounts.end(record.names)
        self.calibration.forget(key)

    @property
    def rest_s(self) -> float:
        """Seconds until the drafters have saved up for another guess, when all have lost what they may lose."""
        return self.accounts.seconds_closed()

    def rests(self, num_rows: int) -> bool:
        """Whether to leave this step alone without looking at requests. Asked once per step, before `caps`."""
        self._step += 1
        self._asked.clear()
        self._num_nodes.clear()
        if self._num_since_plain >= _CONTROL_EVERY:
            return True
        return self._step < self._next_due or self.accounts.are_closed

    def caps(self, views: Sequence[RequestView], wanted: Sequence[int], num_rows: int) -> list[int]:
        """Before anything is guessed: the nodes that each request may have, 0 where it is not its turn.

        What passes here may still be cut by `select`; a request is not cut short before its tree is seen.
        """
        context = _context(views)
        if not self.costs.knows_plain(num_rows, context):
            return [0] * len(views)  # without the cost of plain steps nobody can say what beats them
        situation = (num_rows, context_bucket(context), self._num_waiting_tokens() > 0)
        if situation != self._situation:
            self._situation = situation
            for record in self._records.values():
                record.num_held = 0
        self.accounts.begin_step()
        caps = [0] * len(views)
        for place, (view, most) in enumerate(zip(views, wanted, strict=True)):
            record = self._records[view.key]
            if record.due <= self._step:
                caps[place] = min(most, record.limit) if record.num_held > 0 else most
        return caps

    def order(self, num_requests: int) -> list[int]:
        """The places of requests in the order in which they may spend: everybody's turn to be the first comes."""
        self._turn = (self._turn + 1) % num_requests
        return [*range(self._turn, num_requests), *range(self._turn)]

    def allows(self, drafter: str, num_unread: int) -> bool:
        """Whether the drafter may guess for one more request, of which it has yet to learn so many tokens."""
        is_allowed = self.accounts.affords(drafter, num_unread)
        self._asked[drafter] += is_allowed
        return is_allowed

    def may_learn(self, drafter: str, num_unread: int) -> bool:
        """Whether the drafter may learn so many tokens that are over."""
        return self.accounts.affords(drafter, num_unread)

    def select(self, views: Sequence[RequestView], trees: Sequence[DraftTree], num_rows: int) -> list[DraftTree]:
        """What of the guesses is worth its cost, with calibrated values. Sampled drafts stay whole."""
        self.accounts.end_step()
        records = [self._records[view.key] for view in views]
        self._is_trial = False
        self._is_look = any(record.num_held == 0 and len(tree) > 0 for record, tree in zip(records, trees, strict=True))
        kept = self._look(views, trees, records, num_rows) if self._is_look else list(trees)
        for record, tree in zip(records, kept, strict=True):
            if record.num_held > 0 and not self._is_look:
                record.num_held -= 1
            if len(tree) > 0:
                self._num_nodes.update(map(str, tree.sources))
            elif record.due <= self._step:
                self._put_off(record)
        self._next_due = min([record.due for record in self._records.values()])
        return kept

    def _look(
        self, views: Sequence[RequestView], trees: Sequence[DraftTree], records: Sequence[_Record], num_rows: int
    ) -> list[DraftTree]:
        values = [
            self.calibration.values(view.key, tree) if tree.kind == "delta" else ()
            for view, tree in zip(views, trees, strict=True)
        ]
        found = self._best(views, trees, values, num_rows)
        self._rate, self._num_selected = found.rate, found.num_nodes + sum(len(t) for t in trees if t.kind != "delta")
        kept = [prune(tree, nodes) for tree, nodes in zip(trees, found.nodes, strict=True)]
        for record, tree, own in zip(records, trees, kept, strict=True):
            if not own.tokens:
                record.hold = record.num_held = 0
                continue
            limit = _UNBOUNDED if len(own) == len(tree) else len(own)
            is_similar = record.hold > 0 and _SIMILAR <= (limit / record.limit) <= 1 / _SIMILAR
            record.hold = record.num_held = min(2 * record.hold, _LONGEST_HOLD) if is_similar else 1
            record.limit = limit
        if any(kept):
            self._num_barren = 0
            return kept
        self._num_barren += 1
        if self._num_barren < _BARREN:
            return kept
        self._num_barren, self._is_trial = 0, True
        return _trial(trees, values)

    def _best(
        self,
        views: Sequence[RequestView],
        trees: Sequence[DraftTree],
        values: Sequence[Sequence[float]],
        num_rows: int,
    ) -> Selection:
        fixed = [tree for tree in trees if tree.kind != "delta"]
        num_fixed = sum(map(len, fixed))
        context = _context(views)
        curve, plain_cost = self.costs.curve(context), self.costs.plain_cost(num_rows, context)
        return select(
            values,
            [1.0] * len(views),
            curve,
            plain_cost=plain_cost if num_fixed == 0 else curve.at(num_rows + num_fixed),
            load=Load(num_rows + num_fixed, self._num_waiting_tokens(), self._max_rows),
            max_nodes=self._num_free_slots() - num_fixed,
            base_gain=num_rows + sum(sum(tree.values) for tree in fixed),
            least_rate=_MARGIN * num_rows / plain_cost,
        )

    def _put_off(self, record: _Record) -> None:
        record.due = self._step + 1 + record.wait  # once is no sign
        record.wait = min(2 * record.wait or 1, _LONGEST_WAIT)
        record.num_held = record.hold = 0

    def observe(self, view: RequestView, tree: DraftTree, accepted: Sequence[int]) -> None:
        """What became of a tree: the path of its nodes that were accepted."""
        self.accounts.pay_in(Counter([str(tree.sources[node]) for node in accepted]), self._token_s)
        if self._is_look:
            self.calibration.observe(view.key, tree, accepted)
        record = self._records.get(view.key)
        if record is None:
            return
        num_nodes = self._num_nodes.total()
        share = len(tree) / num_nodes if num_nodes else 1.0
        if len(accepted) * self._token_s < share * self._extra_s:
            self._put_off(record)
            return
        if self._is_trial:
            self._num_barren = _BARREN  # as long as trials pay, expectations are wrong
        record.wait, record.due = 0, self._step
        self._next_due = min(self._next_due, record.due)
        if 2 * len(accepted) < max(tree.depths):
            record.hold = record.num_held = 0

    def figures(self) -> BudgetFigures:
        return BudgetFigures(self._rate, self._num_selected, self.calibration.error)

    def time_guess(self, drafter: str, seconds: float, num_requests: int, num_learnt: int) -> None:
        """A drafter has guessed for so many requests, and learnt so many tokens for it."""
        self.accounts.guessed(drafter, seconds, num_requests, num_learnt)

    def time_thought(self, seconds: float) -> None:
        """What the budget, and all that goes with asking, took for the step at hand besides guesses."""
        self.accounts.thought(self._asked, seconds)

    def time_step(self, step: StepTime) -> None:
        """What a step took. Those that were not plain are charged to who made them so."""
        costs, rows, context = self.costs, step.num_rows, step.num_context_tokens
        self._extra_s = 0.0
        if step.is_plain or step.num_drafted > 0 or not step.is_decode:
            costs.observe(rows, context, step.seconds, is_plain=step.is_plain)
        if step.num_decodes == 0 or not costs.knows_plain(step.num_decodes, context):
            return
        plain_s = costs.plain_cost(step.num_decodes, context)
        self._token_s = plain_s / step.num_decodes
        self.accounts.pass_time(step.seconds_passed, plain_s)
        if step.is_plain:
            self._num_since_plain = 0
            return
        self._num_since_plain += step.num_drafted > 0
        if not costs.knows_plain(step.num_decodes, context, is_exact=True):
            self._num_since_plain = _CONTROL_EVERY
        if step.num_drafted > 0 or step.is_decode:
            without = plain_s if step.is_decode else costs.cost(rows - step.num_drafted, context)
            self._extra_s = self._checking.charge(step.seconds, MAX_STALL * costs.cost(rows, context)) - without
            self.accounts.draw(self._num_nodes or self._asked, self._extra_s)


_UNBOUNDED = 1 << 20  # nodes: all that the request wants were worth checking


def _context(views: Sequence[RequestView]) -> int:
    return sum([len(view.token_ids) for view in views])


def _trial(trees: Sequence[DraftTree], values: Sequence[Sequence[float]]) -> list[DraftTree]:
    """A few nodes of the most promising draft, and nothing of the others."""
    found = [EMPTY] * len(trees)
    place = max(range(len(trees)), key=lambda i: sum(values[i]))
    ranked = sorted(range(len(values[place])), key=lambda node: -values[place][node])  # parents stay first
    found[place] = prune(trees[place], sorted(ranked[:_TRIAL_NODES]))
    return found
