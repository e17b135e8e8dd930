"""Sequoia: one tree shape for all steps, the best for how often a first, second, third ... child is accepted.

Source: Chen et al. 2024, "Sequoia", arXiv:2402.12374, section 3.1. The rates are measured while serving, and the shape
follows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from engine.speculation.base import RequestView, TapRows, drafters
from engine.speculation.host import check_bounds
from engine.speculation.model_drafter import Growth, Level, ModelDrafter
from engine.speculation.rsd import add_children
from engine.speculation.tree import DraftTree, Kind

_MEMORY = 500.0  # verdicts that a measured rate remembers
_STRENGTH = 20.0  # verdicts that the assumed rate is worth
_GRID = 20  # rates are rounded to 1 / 20, so that shapes are found again


class Shape(NamedTuple):
    """
    num_children  of the root, then of every node, in order of levels
    value         expected tokens of a step, that of the root included
    """

    num_children: tuple[int, ...]
    value: float


LEAF = Shape((0,), 1.0)


@dataclass(frozen=True, slots=True)
class SequoiaOptions:
    width: int = 6  # children of one node at most
    max_depth: int = 8
    first: float = 0.6  # rate of first children, and of each next one the share `decay`: assumed, until measured
    decay: float = 0.5

    def __post_init__(self) -> None:
        check_bounds("sequoia", self, width=(1, 32), max_depth=(1, 16), first=(0.0, 1.0), decay=(0.0, 1.0))


@lru_cache(maxsize=64)
def best_shape(rates: tuple[float, ...], num_nodes: int, max_depth: int) -> Shape:
    """The tree of at most `num_nodes` nodes below the root, `max_depth` deep, with the most expected tokens.

    rates[b]: P(child number b is accepted | those before it were not, and the node was reached)
    """
    # P(child b is the accepted one | node reached): what the value of its subtree counts with
    chances, left = [], 1.0
    for rate in rates:
        chances.append(left * rate)
        left *= 1.0 - rate
    size = num_nodes + 1
    # best[depth][m]: value and children's sizes of the best tree with at most m nodes, its root counted
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(1.0, ())] * (size + 1)]
    for _ in range(max_depth):
        below = best[-1]
        # tail[m]: best value and sizes of children b, b + 1, ... with m nodes in all
        tail: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * size
        for chance in reversed(chances):
            tail = [
                max(
                    [(0.0, ())] + [(chance * below[own][0] + tail[m - own][0], (own, *tail[m - own][1]))
                                   for own in range(1, m + 1)],
                    key=lambda entry: entry[0],
                )
                for m in range(size)
            ]  # fmt: skip
        best.append([(1.0, ())] + [(1.0 + tail[m - 1][0], tail[m - 1][1]) for m in range(1, size + 1)])
    counts = []
    level = [(size, max_depth)]
    while level:
        following = []
        for m, depth in level:
            sizes = best[depth][m][1]
            counts.append(len(sizes))
            following += [(own, depth - 1) for own in sizes]
        level = following
    return Shape(tuple(counts), best[max_depth][size][0])


@dataclass
class StaticTree(Growth):
    """Every node gets the children that the shape gives to its place."""

    shape: Shape = LEAF

    @property
    def num_candidates(self) -> int:
        return max(1, *self.shape.num_children)

    def grow(self, level: Sequence[Level]) -> list[int]:
        added = []
        for entry in level:
            added += add_children(self, entry, min(self._count(entry.node), self.num_left))
        return [node for node in added if self._count(node) > 0]

    def _count(self, node: int) -> int:
        counts = self.shape.num_children
        return counts[node + 1] if node + 1 < len(counts) else 0


@drafters.register("sequoia")
class Sequoia(ModelDrafter):
    """A tree of the best constant shape."""

    name = "sequoia"

    def __init__(self, **options: float) -> None:
        super().__init__()
        self.options = SequoiaOptions(**options)  # type: ignore[arg-type]
        width = self.options.width
        self._assumed = [self.options.first * self.options.decay**rank for rank in range(width)]
        self._accepted, self._tried = [0.0] * width, [0.0] * width

    @property
    def rates(self) -> tuple[float, ...]:
        """What is known of each child's acceptance, those before it being turned down."""
        return tuple(
            round(_GRID * (accepted + _STRENGTH * assumed) / (tried + _STRENGTH)) / _GRID
            for accepted, tried, assumed in zip(self._accepted, self._tried, self._assumed, strict=True)
        )

    def start(self, view: RequestView, max_nodes: int, max_depth: int, kind: Kind) -> Growth:
        depth = min(max_depth, self.options.max_depth)
        shape = best_shape(self.rates, max_nodes, depth)
        return StaticTree(view, self.name, max_nodes, depth, kind, shape=shape)

    def on_commit(
        self, key: str, tree: DraftTree, accepted: Sequence[int], new_tokens: Sequence[int], taps: TapRows
    ) -> None:
        super().on_commit(key, tree, accepted, new_tokens, taps)
        path = set(accepted)
        for node in (-1, *accepted):
            children = [child for child in tree.children[node + 1] if tree.sources[child] == self.name]
            for rank, child in enumerate(children[: len(self._tried)]):
                keep = 1.0 - 1.0 / _MEMORY
                self._tried[rank] = self._tried[rank] * keep + 1.0
                self._accepted[rank] = self._accepted[rank] * keep + (child in path)
                if child in path:
                    break
