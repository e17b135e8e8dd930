"""What decides how much is guessed: the interface, and the rule that looks at the number of rows alone.

Knows requests by their views. The rule that follows costs and gains is `load_budget`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.speculation.base import RequestView
from engine.speculation.tree import DraftTree


@dataclass(frozen=True, slots=True)
class BudgetFigures:
    """What a budget reckons with: see the fields of EngineStats."""

    expected_rate: float = 0.0
    num_selected: int = 0
    calibration_error: float = 0.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """What a step was, and how long it took.

    num_rows            tokens in it
    num_decodes         requests that decoded in it
    num_drafted         rows that checked guesses
    num_context_tokens  cached tokens that it read
    is_decode           all rows decode
    is_plain            and nothing is guessed, nor shown to drafters
    seconds_passed      that the engine has worked since the last such report
    """

    num_rows: int
    num_decodes: int
    num_drafted: int
    num_context_tokens: int
    seconds: float
    seconds_passed: float
    is_decode: bool = True
    is_plain: bool = False


class Budget(Protocol):
    """How many nodes the requests of the next step may have."""

    def begin(self, key: str, drafters: Sequence[str]) -> None:
        """A request begins to decode, for which these would guess."""

    def forget(self, key: str) -> None:
        """The request is over."""

    @property
    def rest_s(self) -> float:
        """Seconds of work for which nothing will be guessed, and nothing needs to be shown or timed for it."""

    def rests(self, num_rows: int) -> bool:
        """Whether nothing is to be guessed in this step, told without looking at a request. Asked once per step."""

    def caps(self, views: Sequence[RequestView], wanted: Sequence[int], num_rows: int) -> list[int]:
        """Before anything is guessed: most nodes of each request.

        wanted    what the requests ask for at most
        num_rows  rows of the next step, those that do not speculate included
        """

    def order(self, num_requests: int) -> Sequence[int]:
        """The places of requests in the order in which `allows` is to be asked for them."""

    def allows(self, drafter: str, num_unread: int) -> bool:
        """Whether the drafter may guess for one more request, of which it has yet to learn so many tokens. Asked after
        `caps`, for requests that may have nodes.
        """

    def may_learn(self, drafter: str, num_unread: int) -> bool:
        """Whether the drafter may learn so many tokens at the end of a request that is over."""

    def select(self, views: Sequence[RequestView], trees: Sequence[DraftTree], num_rows: int) -> list[DraftTree]:
        """What of the guesses is worth its cost."""

    def observe(self, view: RequestView, tree: DraftTree, accepted: Sequence[int]) -> None:
        """What became of a tree: the path of its nodes that were accepted. The step has been timed."""

    def figures(self) -> BudgetFigures:
        """For reports."""

    def time_guess(self, drafter: str, seconds: float, num_requests: int, num_learnt: int) -> None:
        """A drafter took this time for so many requests, 0 outside of guesses, and learnt so many tokens in it."""

    def time_thought(self, seconds: float) -> None:
        """What all else between two steps took."""

    def time_step(self, step: StepTime) -> None:
        """What a step took."""


class FixedBudget:
    """Every request may have what it asks for, as long as the rows are few."""

    rest_s = 0.0

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows

    def begin(self, key: str, drafters: Sequence[str]) -> None:
        """The rule knows no requests."""

    def forget(self, key: str) -> None:
        """Nor forgets any."""

    def rests(self, num_rows: int) -> bool:
        return num_rows > self._max_rows

    def caps(self, views: Sequence[RequestView], wanted: Sequence[int], num_rows: int) -> list[int]:
        return list(wanted)

    def order(self, num_requests: int) -> Sequence[int]:
        return range(num_requests)

    def allows(self, drafter: str, num_unread: int) -> bool:
        return True

    def may_learn(self, drafter: str, num_unread: int) -> bool:
        return True

    def select(self, views: Sequence[RequestView], trees: Sequence[DraftTree], num_rows: int) -> list[DraftTree]:
        return list(trees)

    def observe(self, view: RequestView, tree: DraftTree, accepted: Sequence[int]) -> None:
        """The rule learns nothing."""

    def figures(self) -> BudgetFigures:
        return BudgetFigures()

    def time_guess(self, drafter: str, seconds: float, num_requests: int, num_learnt: int) -> None:
        """Times change nothing."""

    def time_thought(self, seconds: float) -> None:
        """Nor do these."""

    def time_step(self, step: StepTime) -> None:
        """Nor these."""
