"""Guessing between two steps: asks drafters, merges and cuts what they give, tells them what became of it.

Knows requests and trees. A drafter that fails costs its guess and nothing else: no output depends on one.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import msgspec

from engine.errors import ConfigError
from engine.scheduling.drafts import Progress, max_depth
from engine.scheduling.plan import StepPlan
from engine.scheduling.request import Request, Status
from engine.speculation.allowance import Budget, StepTime
from engine.speculation.base import NO_TAPS, Drafter, RequestView, TapRows, Taps
from engine.speculation.tree import EMPTY, DraftTree
from engine.speculation.tree_merge import merge
from engine.types import EngineStats

logger = logging.getLogger(__name__)

MAX_TIMINGS = 4096  # kept between two reports
LONGEST_REST_S = 1.0  # after so much work a step is timed in any case: loads change
NOTHING = Taps()

Args = ParamSpec("Args")
Result = TypeVar("Result")


@dataclass(slots=True)
class _Followed:
    """
    key       under which drafters know a request
    needs     what they want to see of its steps
    num_told  tokens of it that each has been told of; those that were never asked for it do not know it
    """

    key: str
    needs: Taps
    num_told: dict[str, int] = field(default_factory=dict)


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
        self._needing: dict[Request, _Followed] = {}  # those of which steps may have to show something
        self._is_resting = False  # nothing is guessed for the step at hand
        self._shown = (False, False)  # whether that was so, and the budget spent, when it was last said what to show
        self._rest_s = 0.0  # of work, until something is looked at again
        self._charged = 0.0  # seconds between the steps at hand that the budget knows of already
        self._seconds_passed = 0.0  # since the budget was last told
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

    def advance(self, plan: StepPlan, seconds: float, progress: Sequence[Progress], running: Sequence[Request]) -> None:
        """Between two steps: what the last one took and gave, and guesses for the next."""
        if not self._known and not progress:
            return
        self._seconds_passed += seconds
        if self._seconds_passed < self._rest_s and not progress and running:
            return
        started = time.perf_counter()
        self._charged = 0.0
        self.time_step(plan, seconds)
        self.follow(progress)
        self.guess(running)
        self._budget.time_thought(time.perf_counter() - started - self._charged)
        self._rest_s = min(self._budget.rest_s, LONGEST_REST_S) if self._is_resting else 0.0

    def follow(self, progress: Sequence[Progress]) -> None:
        """What the last step gave to the requests that speculate."""
        for step in progress:
            self._follow(step)
        self.forget()

    def _follow(self, step: Progress) -> None:
        request, tree = step.request, step.draft or EMPTY
        if request not in self._known:
            self._admit(request)
        if tree.tokens:
            self._budget.observe(self._view(request), tree, step.accepted)
        num_told, num_tokens = self._known[request].num_told, len(request.token_ids)
        num_before = num_tokens - step.num_new_tokens
        for drafter in self._of(request):
            # who was not asked lately learns from the text alone, when it is next asked
            known = num_told.get(drafter.name)
            if known == num_before or (known is not None and step.taps is not None and drafter.needs != NOTHING):
                self._tell(drafter, request, num_before)
                self._tell(drafter, request, num_tokens, tree, step.accepted, step.taps or NO_TAPS)

    def _tell(
        self,
        drafter: Drafter,
        request: Request,
        num_tokens: int,
        tree: DraftTree = EMPTY,
        accepted: Sequence[int] = (),
        taps: TapRows = NO_TAPS,
    ) -> None:
        """A drafter learns the request's first `num_tokens` tokens, as far as it does not know them.

        Tokens wait until a guess needs them: while nothing is guessed, they cost nothing.
        """
        followed = self._known[request]
        num_told = followed.num_told.get(drafter.name)
        if num_told is None:
            num_told = request.num_prompt_tokens
            self._call(drafter, drafter.admit, followed.key, request.token_ids[:num_told], request.tenant)
        if num_told < num_tokens:
            new_tokens = request.token_ids[num_told:num_tokens]
            self._call(drafter, drafter.on_commit, followed.key, tree, accepted, new_tokens, taps)
        followed.num_told[drafter.name] = max(num_told, num_tokens)

    def forget(self) -> None:
        """Drops what is kept for requests that are over."""
        for request in [request for request in self._known if request.status is Status.FINISHED]:
            followed = self._known[request]
            self._needing.pop(request, None)
            for drafter in self._of(request):
                if drafter.name not in followed.num_told:
                    continue
                started = time.perf_counter()
                num_unread = len(request.token_ids) - followed.num_told[drafter.name]
                if num_unread == 0 or self._budget.may_learn(drafter.name, num_unread):
                    self._tell(drafter, request, len(request.token_ids))
                self._call(drafter, drafter.drop, followed.key)
                self._charge(drafter, time.perf_counter() - started, 0, num_unread)
            del self._known[request]
            self._budget.forget(followed.key)

    def time_step(self, plan: StepPlan, seconds: float) -> None:
        """What a step took without the guess for the next one. Costs are of interest while somebody speculates."""
        if not self._known or not plan.chunks:
            return
        num_drafted = num_context = num_decodes = 0
        is_shown = False
        for chunk in plan.chunks:
            num_context += chunk.start
            num_decodes += chunk.is_decode
            if chunk.draft is not None:
                num_drafted += len(chunk.draft)
            is_shown = is_shown or chunk.taps is not None
        is_decode = num_decodes == len(plan.chunks)
        self._budget.time_step(
            StepTime(
                num_rows=plan.num_tokens,
                num_decodes=num_decodes,
                num_drafted=num_drafted,
                num_context_tokens=num_context,
                seconds=seconds,
                seconds_passed=self._seconds_passed,
                is_decode=is_decode,
                is_plain=is_decode and num_drafted == 0 and not is_shown,
            )
        )
        self._seconds_passed = 0.0

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
        caps = self._budget.caps(views, wanted, len(running))
        before = self._charged
        found = self._propose(asking, views, caps)
        self._rest(self._charged == before)
        for request, tree in zip(asking, self._budget.select(views, found, len(running)), strict=True):
            assert request.speculating is not None, "only such requests ask"
            request.speculating.draft = tree
        self._seconds.append(time.perf_counter() - started)

    def _rest(self, is_resting: bool) -> None:
        """While nothing is guessed, no step shows its best tokens either: that takes it off the plain path. Hidden
        states are shown until nothing will be guessed for long, because who reads them cannot do without any.
        """
        self._is_resting = is_resting
        shown = is_resting, self._budget.rest_s > 0.0
        if shown != self._shown:
            self._shown = shown
            for request, followed in self._needing.items():
                self._show(request, followed)

    def _show(self, request: Request, followed: _Followed) -> None:
        assert request.speculating is not None, "only requests that speculate are followed"
        is_resting, is_spent = self._shown
        needs = followed.needs
        is_hidden_shown = needs.hidden_last and not is_spent
        shown = Taps(0 if is_resting else needs.topk, is_hidden_shown)
        request.speculating.taps = None if shown == NOTHING else shown

    def _charge(self, drafter: Drafter, seconds: float, num_requests: int, num_learnt: int) -> None:
        self._charged += seconds
        self._budget.time_guess(drafter.name, seconds, num_requests, num_learnt)

    def _propose(self, asking: Sequence[Request], views: Sequence[RequestView], caps: Sequence[int]) -> list[DraftTree]:
        """A tree for each request, many of them empty."""
        found: list[list[DraftTree]] = [[] for _ in asking]
        users: dict[str, list[int]] = {}
        learnt: Counter[str] = Counter()
        seconds: dict[str, float] = {}
        for i in self._budget.order(len(asking)):
            if caps[i] <= 0:
                continue
            request = asking[i]
            for drafter in self._of(request):
                name, num_tokens = drafter.name, len(request.token_ids)
                num_unread = num_tokens - self._known[request].num_told.get(name, 0)
                if self._budget.allows(name, num_unread):
                    started = time.perf_counter()
                    self._tell(drafter, request, num_tokens)
                    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
                    learnt[name] += num_unread
                    users.setdefault(name, []).append(i)
        for name, places in users.items():
            drafter = self._drafters[name]
            own_views, own_caps = [views[i] for i in places], [caps[i] for i in places]
            started = time.perf_counter()
            trees = self._call(drafter, drafter.propose, own_views, own_caps) or [EMPTY] * len(places)
            seconds[name] += time.perf_counter() - started
            self._charge(drafter, seconds[name], len(places), learnt[name])
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
        """Siblings that are not known yet have the same prompt, and are told together to who reads what steps show.

        Other drafters hear of a request when they are first asked for it.
        """
        assert request.speculating is not None, "only requests that speculate come here"
        key = _key(request)
        own_drafters = self._of(request)
        needs = Taps()
        for drafter in own_drafters:
            needs = needs.union(drafter.needs)
            if drafter.needs.hidden_last:
                prompt = request.token_ids[: request.num_prompt_tokens]
                self._call(drafter, drafter.admit, key, prompt, request.tenant)
        for own in [request, *request.family.choices.values()]:
            if own in self._known or own.speculating is None:
                continue
            self._known[own] = followed = _Followed(_key(own), needs)
            own.speculating.is_followed = True
            self._budget.begin(followed.key, [drafter.name for drafter in self._of(own)])
            if needs != NOTHING:
                self._needing[own] = followed
                self._show(own, followed)
            else:
                own.speculating.taps = None
            for drafter in own_drafters:
                if drafter.needs.hidden_last:
                    followed.num_told[drafter.name] = own.num_prompt_tokens
                    if own is not request:
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
