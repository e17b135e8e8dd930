"""Prompt lookup: what followed the last time the request's newest tokens occurred in its own text.

Source: Saxena 2023, "Prompt lookup decoding". Differs: the most recent occurrence instead of the earliest; short
continuations are used; a continuation may run into the guess itself, so that a repeating text drafts its own period.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from sys import getsizeof
from typing import Any

from engine.speculation.base import RequestView, drafters
from engine.speculation.host import INT_BYTES, TUPLE_BYTES, HostDrafter, check_bounds
from engine.speculation.tree import EMPTY, DraftTree

LONGEST_CONFIDENCE = 32  # matched tokens beyond which a longer match says no more


@dataclass(frozen=True, slots=True)
class NgramOptions:
    """`max_match` is the longest run that is looked up; a longer agreement only raises the confidence."""

    min_match: int = 2  # tokens that must agree; 1 guesses at almost every step and is mostly wrong
    max_match: int = 4
    max_tokens: int = 16  # longest draft
    doubt: float = 2.0  # after m agreeing tokens the next is taken to agree with probability m / (m + doubt): measured

    def __post_init__(self) -> None:
        check_bounds("ngram", self, min_match=(1, 16), max_match=(self.min_match, 16), max_tokens=(1, 1024))
        check_bounds("ngram", self, doubt=(0.0, 100.0))


@dataclass(slots=True)
class NgramIndex:
    """Of one request: where each run of min_match to max_match tokens was last followed by another token."""

    options: NgramOptions
    follows: dict[tuple[int, ...], int]  # run -> index of the token behind its last occurrence

    def read(self, token_ids: Sequence[int], start: int) -> None:
        """Index the runs that a token from `start` on follows: O(max_match) per token."""
        shortest, longest, follows = self.options.min_match, self.options.max_match, self.follows
        tail_start = max(0, start - longest)
        tail = tuple(token_ids[tail_start:])
        for end in range(max(start, shortest) - tail_start, len(tail)):
            for length in range(shortest, min(longest, end) + 1):
                follows[tail[end - length : end]] = tail_start + end

    def match(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """(agreeing tokens, index of the token that followed) of the most recent occurrence of the longest run;
        (0, 0) without one."""
        options, count = self.options, len(token_ids)
        tail = tuple(token_ids[-options.max_match :])
        for length in range(min(options.max_match, count), options.min_match - 1, -1):
            place = self.follows.get(tail[len(tail) - length :])
            if place is not None:
                while (
                    length < min(LONGEST_CONFIDENCE, place) and token_ids[place - 1 - length] == token_ids[-1 - length]
                ):
                    length += 1
                return length, place
        return 0, 0

    def continuation(self, token_ids: Sequence[int], place: int, count: int) -> list[int]:
        """`count` tokens from index `place` on; at the end of the text the draft itself is read on."""
        tokens = list(token_ids[place : place + count])
        period = len(token_ids) - place
        while len(tokens) < count:
            tokens.append(tokens[len(tokens) - period])
        return tokens

    @property
    def num_bytes(self) -> int:
        if not self.follows:
            return 0
        run_bytes = TUPLE_BYTES + 8 * self.options.max_match + INT_BYTES
        return getsizeof(self.follows) + len(self.follows) * run_bytes


@drafters.register("ngram")
class Ngram(HostDrafter[NgramIndex]):
    """Chains, at no cost in memory beyond the request. Good wherever the output repeats its input."""

    name = "ngram"

    def __init__(self, **options: Any) -> None:
        """Keyword arguments are those of NgramOptions. Raises ConfigError for a value out of bounds."""
        super().__init__()
        self.options = NgramOptions(**options)

    def _start(self, prompt: Sequence[int]) -> NgramIndex:
        index = NgramIndex(self.options, {})
        index.read(prompt, 0)
        return index

    def _read(self, state: NgramIndex, view: RequestView, start: int) -> None:
        state.read(view.token_ids, start)

    def _guess(self, state: NgramIndex, view: RequestView, max_nodes: int, max_depth: int) -> DraftTree:
        agreeing, place = state.match(view.token_ids)
        if not agreeing:
            return EMPTY
        count = min(max_nodes, max_depth, self.options.max_tokens)
        tokens = state.continuation(view.token_ids, place, count)
        return DraftTree.chain(tokens, source=self.name, values=confidences(agreeing, count, self.options.doubt))

    @property
    def state_bytes(self) -> int:
        return sum(request.state.num_bytes for request in self._requests.values())


def confidences(agreeing: int, count: int, doubt: float) -> list[float]:
    """P(the first 1, 2, ..., `count` tokens are accepted) behind `agreeing` tokens: an accepted token agrees too."""
    values: list[float] = []
    value = 1.0
    for matched in range(agreeing, agreeing + count):
        value *= matched / (matched + doubt)
        values.append(value)
    return values
