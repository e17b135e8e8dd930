"""Recursive speculative decoding: trees drawn without replacement, of constant branching or as a stochastic beam.

Source: Jeon et al. 2024, arXiv:2402.14160, algorithms RSD-C and RSD-S; the beam is that of Kool et al. 2019,
arXiv:1903.06059. Which beams are left depends on noise values only, which say nothing about the identities below them,
so recursive rejection stays exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.speculation.base import RequestView, drafters
from engine.speculation.host import check_bounds
from engine.speculation.model_drafter import GREEDY_BELOW, Growth, Level, ModelDrafter
from engine.speculation.tree import Kind


@dataclass(frozen=True, slots=True)
class RsdConstantOptions:
    root_width: int = 3  # children of the root
    width: int = 2  # children of other nodes, to `wide_depth`; one child each below
    wide_depth: int = 2
    max_depth: int = 4

    def __post_init__(self) -> None:
        check_bounds("rsd_c", self, root_width=(1, 32), width=(1, 32), wide_depth=(1, 64), max_depth=(1, 64))


@dataclass(frozen=True, slots=True)
class RsdBeamOptions:
    width: int = 4  # paths that are left after each level
    max_depth: int = 4

    def __post_init__(self) -> None:
        check_bounds("rsd_s", self, width=(1, 32), max_depth=(1, 64))


@dataclass
class FixedWidths(Growth):
    """Every node gets as many children as its place says. The last level that does not fit is cut by count."""

    widths: Sequence[int] = ()  # by depth of the parent

    @property
    def num_candidates(self) -> int:
        return max(self.widths)

    def grow(self, level: Sequence[Level]) -> list[int]:
        added = []
        for entry in level:
            width = self.widths[self.depth(entry.node)]
            added += add_children(self, entry, min(width, self.num_left))
        return added if self.num_left > 0 and self.depth(len(self.tokens) - 1) < len(self.widths) else []


def add_children(growth: Growth, entry: Level, count: int) -> list[int]:
    """The first `count` candidates of a node's only draw, those without any mass excepted."""
    pick = entry.picks[0]
    above = growth.value(entry.node)
    return [
        growth.add(entry.node, int(pick.token_ids[i]), above * float(np.exp(pick.log_probs[i])))
        for i in range(min(count, len(pick.token_ids)))
        if pick.log_probs[i] > -math.inf
    ]


@dataclass
class StochasticBeam(Growth):
    """On each level the `width` best of all children stay, by perturbed log-probability of the whole path."""

    width: int = 1
    log_probs: list[float] = field(default_factory=list)  # of the path to each node
    scores: list[float] = field(default_factory=list)  # of each node, conditioned on its parent's

    @property
    def num_candidates(self) -> int:
        return self.width

    def grow(self, level: Sequence[Level]) -> list[int]:
        is_greedy = self.view.temperature < GREEDY_BELOW
        children = []  # score, then what it takes to add the node; earlier ones first among equals
        for entry in level:
            pick, node = entry.picks[0], entry.node
            path = self.log_probs[node] if node >= 0 else 0.0
            own = self.scores[node] if node >= 0 else 0.0
            raw = path + pick.scores.astype(np.float64)
            for i in range(len(pick.token_ids)):
                if pick.log_probs[i] > -math.inf:
                    log_prob = path + float(pick.log_probs[i])
                    score = log_prob if is_greedy else conditioned(own, float(raw[0]), float(raw[i]))
                    children.append((score, node, int(pick.token_ids[i]), log_prob))
        best = sorted(range(len(children)), key=lambda i: -children[i][0])[: min(self.width, self.num_left)]
        added = []
        for i in sorted(best):  # in the order of parents and draws
            score, node, token, log_prob = children[i]
            added.append(self.add(node, token, math.exp(min(0.0, log_prob))))
            self.scores.append(score)
            self.log_probs.append(log_prob)
        return added if added and self.num_left > 0 and self.depth(added[0]) < self.max_depth else []


def conditioned(parent: float, best: float, raw: float) -> float:
    """A child's score, given that the best of its siblings has its parent's: -log(e^-parent - e^-best + e^-raw).

    best: the largest `raw` among the siblings. In the form that keeps its digits (Kool et al., appendix B.3).
    """
    if raw >= best:
        return parent
    u = parent - raw + math.log1p(-math.exp(raw - best))
    return parent - max(0.0, u) - math.log1p(math.exp(-abs(u)))


@drafters.register("rsd_c")
class RsdConstant(ModelDrafter):
    """Constant branching."""

    name = "rsd_c"

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.options = RsdConstantOptions(**options)

    def start(self, view: RequestView, max_nodes: int, max_depth: int, kind: Kind) -> Growth:
        options = self.options
        widths = [options.root_width if depth == 0 else options.width if depth < options.wide_depth else 1
                  for depth in range(min(max_depth, options.max_depth))]  # fmt: skip
        return FixedWidths(view, self.name, max_nodes, max_depth, kind, widths=widths)


@drafters.register("rsd_s")
class RsdBeam(ModelDrafter):
    """A stochastic beam."""

    name = "rsd_s"

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.options = RsdBeamOptions(**options)

    def start(self, view: RequestView, max_nodes: int, max_depth: int, kind: Kind) -> Growth:
        depth = min(max_depth, self.options.max_depth, max_nodes)
        width = min(self.options.width, max(1, max_nodes // depth))
        return StochasticBeam(view, self.name, max_nodes, depth, kind, width=width)
