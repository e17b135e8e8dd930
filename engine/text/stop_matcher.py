"""Finds stop strings in text that arrives in pieces, and says how much of it is safe to show.

One Knuth-Morris-Pratt automaton per stop string: constant work per character, whatever came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Match:
    """Stop string `stop` ends at character `end` of the whole text (exclusive)."""

    stop: str
    end: int

    @property
    def start(self) -> int:
        return self.end - len(self.stop)


class StopMatcher:
    """The stop string that is complete first wins; of several complete at once, the longest."""

    def __init__(self, stops: Sequence[str]) -> None:
        # longest first, so that the first automaton to match at a character is the one that wins
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._num_chars = 0

    @property
    def num_held(self) -> int:
        """Length of the longest end of the text so far that could become a stop string."""
        return max(self._states, default=0)

    def feed(self, text: str, *, is_testing: bool = True) -> Match | None:
        """Takes the next piece; stops at the first match. With is_testing=False, matches that end here do not count."""
        for char in text:
            self._num_chars += 1
            for index, stop in enumerate(self._stops):
                failure = self._failures[index]
                state = self._states[index]
                while state and stop[state] != char:
                    state = failure[state - 1]
                if stop[state] == char:
                    state += 1
                if state == len(stop):
                    if is_testing:
                        return Match(stop, self._num_chars)
                    state = failure[state - 1]
                self._states[index] = state
        return None


def _failure_table(pattern: str) -> list[int]:
    """failure[i]: length of the longest proper prefix of pattern[: i + 1] that is also its suffix."""
    failure = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = failure[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        failure[index] = length
    return failure
