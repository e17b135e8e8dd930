"""SpecTr: several independent chains of the draft model, which meet in the root only.

Source: Sun et al. 2023, "SpecTr", arXiv:2310.15141. Where the walk verifies, equal beginnings are drawn once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engine.speculation.base import RequestView, drafters
from engine.speculation.host import check_bounds
from engine.speculation.model_drafter import Growth, Level, ModelDrafter
from engine.speculation.tree import Kind


@dataclass(frozen=True, slots=True)
class SpecTrOptions:
    num_chains: int = 3
    max_depth: int = 4

    def __post_init__(self) -> None:
        check_bounds("spectr", self, num_chains=(1, 16), max_depth=(1, 64))


@dataclass
class Chains(Growth):
    """The root gets a draw per chain; below it every node gets one."""

    num_chains: int = 1

    def draws_after(self, node: int) -> int:
        return self.num_chains if node < 0 else 1

    def grow(self, level: Sequence[Level]) -> list[int]:
        added: list[int] = []
        for entry in level:
            seen: set[int] = set()
            for pick in entry.picks:
                token = int(pick.token_ids[0])
                if self.num_left == 0 or (not self.is_sampled and token in seen):
                    continue
                seen.add(token)
                value = self.value(entry.node) * float(np.exp(pick.log_probs[0]))
                added.append(self.add(entry.node, token, value))
        return added if added and self.depth(added[0]) < self.max_depth and self.num_left > 0 else []


@drafters.register("spectr")
class SpecTr(ModelDrafter):
    """Independent chains."""

    name = "spectr"
    kind: ClassVar[Kind] = "iid"
    verifier: ClassVar[str] = "k_sequential"

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.options = SpecTrOptions(**options)

    def start(self, view: RequestView, max_nodes: int, max_depth: int, kind: Kind) -> Growth:
        depth = min(max_depth, self.options.max_depth, max_nodes)
        chains = min(self.options.num_chains, max(1, max_nodes // depth))
        return Chains(view, self.name, max_nodes, depth, kind, num_chains=chains)
