"""How likely a drafted node is accepted, learnt from what was: per source and place, with a view of each request.

Knows trees and verdicts; no model, no cost. A drafter's own values are guesses on scales of their own; here they only
choose a bucket, and counts in that bucket say what they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.speculation.tree import DraftTree, Source

NUM_BINS = 10  # of predicted values, for the calibration error


class Slot(NamedTuple):
    """A bucket: nodes of which the same acceptance is expected, given that their parent was accepted."""

    source: Source
    rank: int  # among siblings: 0, 1, 2-3, 4-7, ...
    depth: int  # 1, 2, 3-4, 5-8, ...
    match: int  # of the drafter's own estimate, in halvings: match length or probability


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    memory: float = 400.0  # observations that a bucket remembers: older ones fade exponentially
    strength: float = 4.0  # observations that the drafter's own estimate is worth in a bucket without any
    request_rate: float = 0.1  # of a new observation in what is known of its request
    request_trust: float = 8.0  # observations of a request after which its own rate counts half


@dataclass(slots=True)
class _Beta:
    """Faded counts of a bucket."""

    accepted: float = 0.0
    turned_down: float = 0.0

    def add(self, is_accepted: bool, keep: float) -> None:
        self.accepted = self.accepted * keep + is_accepted
        self.turned_down = self.turned_down * keep + (not is_accepted)

    def mean(self, prior: float, strength: float) -> float:
        return (self.accepted + prior * strength) / (self.accepted + self.turned_down + strength)


@dataclass(slots=True)
class _Own:
    """How much better, or worse, one source does on one request than on average."""

    excess: float = 0.0  # average of accepted - expected
    count: int = 0


@dataclass
class Calibration:
    """Posteriors of all buckets and of the running requests. One per server: no token enters it."""

    options: CalibrationOptions = field(default_factory=CalibrationOptions)

    def __post_init__(self) -> None:
        self._slots: dict[Slot, _Beta] = {}
        self._own: dict[str, dict[Source, _Own]] = {}
        self._bins = [[0, 0.0, 0.0] for _ in range(NUM_BINS)]  # nodes, sum of predictions, accepted

    def values(self, key: str, tree: DraftTree) -> tuple[float, ...]:
        """P(reached and accepted) of each node for the request `key`: never rising along a path."""
        found: list[float] = []
        for parent, slot, guess in _slots(tree):
            above = 1.0 if parent < 0 else found[parent]
            found.append(above * self.conditional(key, slot, guess))
        return tuple(found)

    def conditional(self, key: str, slot: Slot, guess: float) -> float:
        """P(accepted | parent accepted). guess: the drafter's own estimate of it."""
        options = self.options
        beta = self._slots.get(slot)
        value = guess if beta is None else beta.mean(guess, options.strength)
        own = self._own.get(key, {}).get(slot.source)
        if own is not None:
            value += own.excess * own.count / (own.count + options.request_trust)
        return min(1.0, max(0.0, value))

    def observe(self, key: str, tree: DraftTree, accepted: Sequence[int]) -> None:
        """What became of a draft: `accepted` is a path of nodes. Nodes that were not reached tell nothing."""
        path = set(accepted)
        options = self.options
        keep = 1.0 - 1.0 / options.memory
        own = self._own.setdefault(key, {})
        for node, (parent, slot, guess) in enumerate(_slots(tree)):
            if parent >= 0 and parent not in path:
                continue
            is_accepted = node in path
            self._note(self.conditional(key, slot, guess), is_accepted)
            beta = self._slots.setdefault(slot, _Beta())
            mine = own.setdefault(slot.source, _Own())
            mine.count += 1
            rate = max(options.request_rate, 1.0 / mine.count)
            mine.excess += rate * (is_accepted - beta.mean(guess, options.strength) - mine.excess)
            beta.add(is_accepted, keep)

    def forget(self, key: str) -> None:
        """The request is over."""
        self._own.pop(key, None)

    @property
    def error(self) -> float:
        """Mean distance between what was predicted and what happened, over ten bins of predictions; 0 at the start."""
        total = sum(count for count, _, _ in self._bins)
        return sum(abs(predicted - accepted) for _, predicted, accepted in self._bins) / max(1.0, total)

    @property
    def bins(self) -> list[tuple[int, float, float]]:
        """Per bin of predictions: nodes, mean prediction, accepted share."""
        return [(int(n), predicted / n, accepted / n) for n, predicted, accepted in self._bins if n]

    def _note(self, predicted: float, is_accepted: bool) -> None:
        found = self._bins[min(NUM_BINS - 1, int(predicted * NUM_BINS))]
        found[0] += 1
        found[1] += predicted
        found[2] += is_accepted


def _slots(tree: DraftTree) -> list[tuple[int, Slot, float]]:
    """Parent, bucket and the drafter's own P(accepted | parent accepted) of every node."""
    num_children: dict[int, int] = {}
    depths: list[int] = []
    found = []
    for parent, value, source in zip(tree.parents, tree.values, tree.sources, strict=True):
        rank = num_children.get(parent, 0)
        num_children[parent] = rank + 1
        depths.append(1 if parent < 0 else depths[parent] + 1)
        above = 1.0 if parent < 0 else tree.values[parent]
        guess = value / above if above > 0.0 else 0.0
        match = min(8, int(-math.log2(guess))) if guess > 0.0 else 9
        found.append((parent, Slot(source, rank.bit_length(), (depths[-1] - 1).bit_length(), match), guess))
    return found
