"""What all verifiers share: rows of probabilities, one source of chance, and the verdict. Torch-free.

A verifier is a pure function of a draft, the target's distributions and a `Chance`. p and q are distributions after
every logits processor; a context's row is that of the node that ends it, -1 for the root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine import noise
from engine.speculation.tree import DraftTree

Law = NDArray[np.float64]  # [V], sums to 1
Rows = Callable[[int], NDArray[Any]]  # node, or -1 -> [V] probabilities of the target after it; called once per visit


@dataclass(frozen=True, slots=True)
class Verdict:
    """path: accepted nodes from a child of the root on; token: what follows them, which the draft need not contain."""

    path: tuple[int, ...]
    token: int


class Chance(Protocol):
    """Where a verifier's randomness comes from."""

    def flip(self, probability: float) -> bool:
        """True with this probability: always at 1 or more, never at 0 or less."""

    def draw(self, weights: Law) -> int:
        """A token with a chance proportional to its weight, [V], not negative, not all zero."""


class KeyedChance:
    """Chance from a counter: the same step of the same seeded choice decides alike in every batch and on every run.

    The key belongs to the step and not to a token's place: a verdict can depend on draws for places that it then does
    not fill (block verification), and those must not be met again when the next step comes to them.
    """

    def __init__(self, seed: int, choice: int, output_index: int, purpose: int = noise.Purpose.VERIFY) -> None:
        """output_index: of the first token that the step adds."""
        self._key = noise.row_key(seed, choice, output_index, purpose)
        self._num_used = 0

    def flip(self, probability: float) -> bool:
        return self._next() < probability

    def draw(self, weights: Law) -> int:
        reached = np.cumsum(weights)
        found = int(np.searchsorted(reached, self._next() * reached[-1], side="right"))
        if found < len(weights):
            return found
        return int(np.flatnonzero(weights)[-1])  # the product was rounded up to the whole mass

    def _next(self) -> float:
        self._num_used += 1
        return noise.uniform(self._key, self._num_used)


def law(row: NDArray[Any]) -> Law:
    """A row of probabilities in double precision, made to sum to 1 there."""
    found: Law = np.asarray(row, dtype=np.float64)
    scaled: Law = found / found.sum()
    return scaled


def draft_law(tree: DraftTree, node: int) -> Law:
    """The distribution that the children of `node` were drawn from."""
    assert tree.q is not None, f"a {tree.kind} draft comes without its distributions"
    return law(tree.q[node + 1])


def residual(p: Law, q: Law) -> Law:
    """norm(max(0, p - q)): what is left to draw from after a token drawn from q was turned down."""
    left = np.maximum(p - q, 0.0)
    mass = left.sum()
    return left / mass if mass > 0.0 else p  # p equals q but for rounding: then nothing is ever turned down


def ratio(p: Law, q: Law, token: int) -> float:
    """p / q of a token that was drawn from q."""
    return float(p[token] / q[token]) if q[token] > 0.0 else 1.0


class Front:
    """Nodes of an `iid` draft that have the same tokens from the root on: independent drafts of one context."""

    def __init__(self, tree: DraftTree) -> None:
        self._tree = tree
        self._children = tree.children
        self._nodes: Sequence[int] = (-1,)

    @property
    def node(self) -> int:
        """One of them."""
        return self._nodes[0]

    def candidates(self) -> list[int]:
        """Their children, in the order of the draft."""
        return sorted(child for node in self._nodes for child in self._children[node + 1])

    def descend(self, token: int) -> None:
        self._nodes = [child for child in self.candidates() if self._tree.tokens[child] == token]

    def verdict(self, token: int) -> Verdict:
        return Verdict(self._tree.path(self.node), token)
