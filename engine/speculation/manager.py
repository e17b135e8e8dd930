"""Guessing between two steps: asks drafters, merges and cuts what they give, tells them what became of it.

Knows requests and trees. A drafter that fails costs its guess and nothing else: no output depends on one.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

import msgspec

from engine.errors import ConfigError
from engine.scheduling.drafts import Progress, max_depth
from engine.scheduling.plan import StepPlan
from engine.scheduling.request import Request, Status
from engine.speculation.base import NO_TAPS, Drafter, RequestView, TapRows, Taps
from engine.speculation.tree import EMPTY, DraftTree
from engine.speculation.tree_merge import merge
from engine.types import EngineStats

logger = logging.getLogger(__name__)

MAX_TIMINGS = 4096  # kept between two reports
REST_TIMED = 4  # while nothing is guessed, one step of so many is timed

Args = ParamSpec("Args")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class BudgetFigures:
    """What a budget reckons with: see the fields of EngineStats."""

    expected_rate: float = 0.0
    num_selected: int = 0
    calibration_error: float = 0.0


class Budget(Protocol):
    """How many nodes the requests of the next step may have."""

    def rests(self, num_rows: int) -> bool:
        """Whether nothing is to be guessed in this step, told without looking at a request. Asked once per step."""

    def caps(
        self,
        views: Sequence[RequestView],
        wanted: Sequence[int],
        num_rows: int,
        drafters: Sequence[Sequence[str]],
    ) -> list[int]:
        """Before anything is guessed: most nodes of each request.

        wanted    what the requests ask for at most
        num_rows  rows of the next step, those that do not speculate included
        drafters  who would guess for each request
        """

    def allows(self, drafter: str) -> bool:
        """Whether the drafter may guess in this step; asked after `caps`, for requests that may have nodes."""

    def select(self, views: Sequence[RequestView], trees: Sequence[DraftTree], num_rows: int) -> list[DraftTree]:
        """What of the guesses is worth its cost."""

    def observe(self, view: RequestView, tree: DraftTree, accepted: Sequence[int]) -> None:
        """What became of a tree: the path of its nodes that were accepted."""

    def forget(self, key: str) -> None:
        """The request is over."""

    def figures(self) -> BudgetFigures:
        """For reports."""

    def time_guess(self, drafter: str, num_requests: int, seconds: float) -> None:
        """A drafter has guessed for so many requests in this time."""

    def time_step(self, num_rows: int, num_context_tokens: int, seconds: float, *, is_plain: bool) -> None:
        """A step of so many tokens over so much context took so long. is_plain: all rows decode, nothing is guessed."""


class FixedBudget:
    """Every request may have what it asks for, as long as the rows are few."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows

    def rests(self, num_rows: int) -> bool:
        return num_rows > self._max_rows

    def caps(
        self,
        views: Sequence[RequestView],
        wanted: Sequence[int],
        num_rows: int,
        drafters: Sequence[Sequence[str]],
    ) -> list[int]:
        return list(wanted)

    def allows(self, drafter: str) -> bool:
        return True

    def select(self, views: Sequence[RequestView], trees: Sequence[DraftTree], num_rows: int) -> list[DraftTree]:
        return list(trees)

    def observe(self, view: RequestView, tree: DraftTree, accepted: Sequence[int]) -> None:
        """The rule learns nothing."""

    def forget(self, key: str) -> None:
        """And keeps nothing."""

    def figures(self) -> BudgetFigures:
        return BudgetFigures()

    def time_guess(self, drafter: str, num_requests: int, seconds: float) -> None:
        """Times change nothing."""

    def time_step(self, num_rows: int, num_context_tokens: int, seconds: float, *, is_plain: bool) -> None:
        """Times change nothing either."""


@dataclass(slots=True)
class _Followed:
    """
    key       under which drafters know a request
    num_told  tokens of it that they have been told of
    needs     what they want to see of its steps
    """

    key: str
    num_told: int
    needs: Taps


class Speculation:
    """All drafters of an engine. One thread calls everything."""

    def __init__(self, make: Callable[[str], Drafter], budget: Budget, vocab_size: int) -> None:
        """
        make        a drafter by name; each is made when a request first asks for it, and kept
        vocab_size  token ids of the target must be below
        """
        self._make = make
        self._vocab_size = vocab_size
        self._budget = budget
        self._drafters: dict[str, Drafter] = {}
        self._known: dict[Request, _Followed] = {}
        self._is_resting = False  # nothing is guessed for the step at hand
        self._num_timed = 0
        self._failed: set[str] = set()
        self._num_proposed: Counter[str] = Counter()  # nodes by drafter, before they were merged and cut
        self._seconds: deque[float] = deque(maxlen=MAX_TIMINGS)

    @property
    def num_known(self) -> int:
        """Requests that drafters keep something for."""
        return len(self._known)

    def add_to(self, stats: EngineStats) -> EngineStats:
        """The report of the core, with what is known here, and the timings since the last one."""
        seconds = list(self._seconds)
        self._seconds.clear()
        figures = self._budget.figures()
        return msgspec.structs.replace(
            stats,
            spec_proposed=dict(self._num_proposed),
            spec_propose_seconds=seconds,
            spec_state_bytes=sum(drafter.state_bytes for drafter in self._drafters.values()),
            spec_expected_rate=figures.expected_rate,
            spec_selected_nodes=figures.num_selected,
            spec_calibration_error=figures.calibration_error,
        )

    def follow(self, progress: Sequence[Progress]) -> None:
        """What the last step gave to the requests that speculate."""
        for step in progress:
            request, tree = step.request, step.draft or EMPTY
            if request not in self._known:
                self._admit(request)
            self._tell(request, len(request.token_ids) - step.num_new_tokens)
            if tree.tokens:
                self._budget.observe(self._view(request), tree, step.accepted)
            self._tell(request, len(request.token_ids), tree, step.accepted, step.taps or NO_TAPS)
        self.forget()

    def _tell(
        self,
        request: Request,
        num_tokens: int,
        tree: DraftTree = EMPTY,
        accepted: Sequence[int] = (),
        taps: TapRows = NO_TAPS,
    ) -> None:
        """Drafters learn the request's first `num_tokens` tokens, as far as they do not know them.

        Tokens of steps in which nothing was guessed wait until a guess needs them: while nothing is, they cost nothing.
        """
        followed = self._known[request]
        if followed.num_told >= num_tokens:
            return
        new_tokens = request.token_ids[followed.num_told : num_tokens]
        followed.num_told = num_tokens
        for drafter in self._of(request):
            self._call(drafter, drafter.on_commit, followed.key, tree, accepted, new_tokens, taps)

    def forget(self) -> None:
        """Drops what is kept for requests that are over."""
        for request in [request for request in self._known if request.status is Status.FINISHED]:
            if not self._is_resting:  # else nobody has use for it, and to learn it takes its time
                self._tell(request, len(request.token_ids))
            key = self._known.pop(request).key
            self._budget.forget(key)
            for drafter in self._of(request):
                self._call(drafter, drafter.drop, key)

    def time_step(self, plan: StepPlan, seconds: float) -> None:
        """What a step took without the guess for the next one. Costs are of interest while somebody speculates."""
        if not self._known or not plan.chunks:
            return
        self._num_timed += 1
        if self._is_resting and self._num_timed % REST_TIMED:
            return
        is_plain = all(chunk.is_decode and chunk.draft is None for chunk in plan.chunks)
        context = sum([chunk.start for chunk in plan.chunks])
        self._budget.time_step(plan.num_tokens, context, seconds, is_plain=is_plain)

    def guess(self, running: Sequence[Request]) -> None:
        """Sets the drafts of the requests that will decode in the next step."""
        if not self._known:
            return
        if self._budget.rests(len(running)):
            self._rest(True)
            return
        started = time.perf_counter()
        asking = [request for request in running if request in self._known and _may_guess(request)]
        if not asking:
            return
        views = [self._view(request) for request in asking]
        wanted = [request.speculating.options.max_nodes if request.speculating else 0 for request in asking]
        names = [request.speculating.options.drafters if request.speculating else () for request in asking]
        caps = self._budget.caps(views, wanted, len(running), names)
        self._rest(not any(caps))
        if not self._is_resting:
            found = self._propose(asking, views, caps)
            for request, tree in zip(asking, self._budget.select(views, found, len(running)), strict=True):
                assert request.speculating is not None, "only such requests ask"
                request.speculating.draft = tree
        self._seconds.append(time.perf_counter() - started)

    def _rest(self, is_resting: bool) -> None:
        """While nothing is guessed, no step shows its best tokens either: that takes it off the plain path. Hidden
        states are shown all the same, because who reads them cannot do without any.
        """
        if is_resting != self._is_resting:
            self._is_resting = is_resting
            for request, followed in self._known.items():
                self._show(request, followed)

    def _show(self, request: Request, followed: _Followed) -> None:
        assert request.speculating is not None, "only requests that speculate are followed"
        if followed.needs == Taps(topk=followed.needs.topk):
            request.speculating.taps = followed.needs if followed.needs.topk and not self._is_resting else None
        else:
            request.speculating.taps = followed.needs

    def _propose(self, asking: Sequence[Request], views: Sequence[RequestView], caps: Sequence[int]) -> list[DraftTree]:
        found: list[list[DraftTree]] = [[] for _ in asking]
        users: dict[str, list[int]] = {}
        for i, request in enumerate(asking):
            if caps[i] > 0:
                self._tell(request, len(request.token_ids))
                for drafter in filter(lambda drafter: self._budget.allows(drafter.name), self._of(request)):
                    users.setdefault(drafter.name, []).append(i)
        for name, places in users.items():
            drafter = self._drafters[name]
            own_views, own_caps = [views[i] for i in places], [caps[i] for i in places]
            started = time.perf_counter()
            trees = self._call(drafter, drafter.propose, own_views, own_caps) or [EMPTY] * len(places)
            self._budget.time_guess(name, len(places), time.perf_counter() - started)
            for i, tree in zip(places, trees, strict=True):
                if tree.tokens and self._is_sound(drafter, tree):
                    found[i].append(tree)
                    self._num_proposed[name] += len(tree)
        return [_joined(trees, cap) for trees, cap in zip(found, caps, strict=True)]

    def _of(self, request: Request) -> list[Drafter]:
        """The drafters that a request has chosen, as far as they could be made."""
        assert request.speculating is not None, "only requests that speculate come here"
        names = request.speculating.options.drafters
        return [drafter for name in names if (drafter := self._drafter(name)) is not None]

    def _drafter(self, name: str) -> Drafter | None:
        if name not in self._drafters and name not in self._failed:
            try:
                self._drafters[name] = _checked(self._make(name))
            except Exception as error:
                self._blame(name, repr(error), is_exception=True)
        return self._drafters.get(name)

    def _admit(self, request: Request) -> None:
        """Siblings that the drafters do not know yet have the same prompt: they are told together."""
        assert request.speculating is not None, "only requests that speculate come here"
        key = _key(request)
        needs = Taps()
        for drafter in self._of(request):
            needs = needs.union(drafter.needs)
            prompt = request.token_ids[: request.num_prompt_tokens]
            self._call(drafter, drafter.admit, key, prompt, request.tenant)
        for own in [request, *request.family.choices.values()]:
            if own in self._known or own.speculating is None:
                continue
            self._known[own] = followed = _Followed(_key(own), own.num_prompt_tokens, needs)
            own.speculating.is_followed = True
            self._show(own, followed)
            if own is not request:
                for drafter in self._of(own):
                    self._call(drafter, drafter.fork, key, followed.key)

    def _view(self, request: Request) -> RequestView:
        return RequestView(
            key=self._known[request].key,
            token_ids=request.token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            tenant=request.tenant,
            adapter=request.family.request.adapter,
            temperature=request.sampling.temperature,
            seed=request.sampling.seed,
            choice=request.choice,
            max_depth=max_depth(request),
            samples=request.speculating is not None and request.speculating.options.verifier != "walk",
        )

    def _is_sound(self, drafter: Drafter, tree: DraftTree) -> bool:
        problem = tree.problem()
        if problem is None and max(tree.tokens) >= self._vocab_size:
            problem = f"token {max(tree.tokens)} is not below {self._vocab_size}"
        if problem is not None:
            self._blame(drafter.name, problem)
        return problem is None

    def _call(
        self, drafter: Drafter, method: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result | None:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            self._blame(drafter.name, repr(error), is_exception=True)
            return None

    def _blame(self, name: str, problem: str, *, is_exception: bool = False) -> None:
        """Told once for each drafter: it could happen in every step."""
        if name not in self._failed:
            self._failed.add(name)
            logger.error("drafter %s failed, its guess is left out: %s", name, problem, exc_info=is_exception)


def _checked(drafter: Drafter) -> Drafter:
    """Raises ConfigError for what no model can show: a drafter must not wait for it in silence."""
    if layers := drafter.needs.hidden_layers:
        raise ConfigError(f"drafter {drafter.name} needs the residual stream behind layers {layers}; no model shows it")
    return drafter


def _joined(trees: Sequence[DraftTree], max_nodes: int) -> DraftTree:
    """One tree of all. A single one that was drawn at random stays what it is: its rule needs all of it."""
    if len(trees) == 1 and trees[0].kind != "delta" and len(trees[0]) <= max_nodes:
        return trees[0]
    return merge(trees, max_nodes).tree


def _key(request: Request) -> str:
    return f"{request.request_id}/{request.choice}"


def _may_guess(request: Request) -> bool:
    return request.status is Status.RUNNING and request.num_remaining_tokens == 1 and max_depth(request) > 0
