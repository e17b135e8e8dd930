"""DySpec: the tree grows where acceptance is likeliest, taking the drafter's probabilities as estimates of it.

Source: Xiong et al. 2024, "DySpec", arXiv:2410.11744. A *slot* is a place for a token that has not been drawn; its
value is the probability that verification comes to it. The model runs once per level and not once per node, and the
most valuable slots are kept: the same as drawing the most valuable slot next, because what is below a slot, or after it
among siblings, is never worth more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.speculation.base import RequestView, drafters
from engine.speculation.host import check_bounds
from engine.speculation.model_drafter import Growth, Level, ModelDrafter
from engine.speculation.tree import DraftTree, Kind

_MAX_CHILDREN = 32


@dataclass(frozen=True, slots=True)
class DySpecOptions:
    max_depth: int = 8
    threshold: float = 0.02  # slots that are worth less are not drawn

    def __post_init__(self) -> None:
        check_bounds("dyspec", self, max_depth=(1, 64), threshold=(0.0, 1.0))


@dataclass
class DynamicTree(Growth):
    threshold: float = 0.0
    slots: list[float] = field(default_factory=list)  # value of each node's slot, before its token was drawn

    @property
    def num_candidates(self) -> int:
        return min(self.max_nodes, _MAX_CHILDREN)

    def grow(self, level: Sequence[Level]) -> list[int]:
        first = len(self.tokens)
        for node, (pick,) in ((entry.node, entry.picks) for entry in level):
            slot, mass = self.value(node), 1.0
            for token, log_prob in zip(pick.token_ids, pick.log_probs, strict=True):
                share = min(1.0, float(np.exp(log_prob)) / mass) if mass > 0.0 else 0.0
                if slot < self.threshold or slot <= 0.0 or share <= 0.0:
                    break
                self.add(node, int(token), slot * share)
                self.slots.append(slot)
                slot *= 1.0 - share
                mass -= float(np.exp(log_prob))
        kept = self._best()
        return [
            node
            for node in range(first, len(self.tokens))
            if node in kept and self.values[node] >= self.threshold and self.depths[node] < self.max_depth
        ]

    def tree(self) -> DraftTree:
        self._cut()
        return super().tree()

    def _cut(self) -> None:
        """Leaves the most valuable slots, as many as there may be nodes."""
        kept = sorted(self._best())
        places = {-1: -1, **{node: place for place, node in enumerate(kept)}}
        self.tokens = [self.tokens[node] for node in kept]
        self.values = [self.values[node] for node in kept]
        self.depths = [self.depths[node] for node in kept]
        self.parents = [places[self.parents[node]] for node in kept]
        self.slots = [self.slots[node] for node in kept]
        self.q = {places[node]: row for node, row in self.q.items() if node in places}

    def _best(self) -> set[int]:
        # stable: parents, and siblings drawn earlier, come first among equals
        return set(sorted(range(len(self.tokens)), key=lambda node: -self.slots[node])[: self.max_nodes])


@drafters.register("dyspec")
class DySpec(ModelDrafter):
    """A tree of the slots that the model finds likeliest to be reached."""

    name = "dyspec"

    def __init__(self, **options: float) -> None:
        super().__init__()
        self.options = DySpecOptions(**options)  # type: ignore[arg-type]

    def start(self, view: RequestView, max_nodes: int, max_depth: int, kind: Kind) -> Growth:
        depth = min(max_depth, self.options.max_depth)
        return DynamicTree(view, self.name, max_nodes, depth, kind, threshold=self.options.threshold)
