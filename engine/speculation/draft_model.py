"""A small language model guesses a chain: what it would say next, token after token.

Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engine.speculation.base import RequestView, drafters
from engine.speculation.draft_cache import DraftCache
from engine.speculation.draft_rows import ChainPass, DraftRunner, RowPass
from engine.speculation.host import check_bounds
from engine.speculation.model_drafter import Growth, Job, Level, ModelDrafter
from engine.speculation.tree import Kind


@dataclass(frozen=True, slots=True)
class DraftModelOptions:
    max_depth: int = 6  # tokens guessed at most
    min_value: float = 0.3  # a chain that is less likely to be accepted to its end is not continued

    def __post_init__(self) -> None:
        check_bounds("draft_model", self, max_depth=(1, 64), min_value=(0.0, 1.0))


@dataclass
class Chain(Growth):
    """One draw after another."""

    min_value: float = 0.0

    def grow(self, level: Sequence[Level]) -> list[int]:
        pick = level[0].picks[0]
        above = level[0].node
        node = self.add(above, pick.token_ids[0], self.value(above) * float(np.exp(pick.log_probs[0])))
        # looking at the token that was kept is allowed: it stays whatever it is
        ends = self.num_left == 0 or self.depth(node) == self.max_depth or self.values[node] < self.min_value
        return [] if ends else [node]


@drafters.register("draft_model")
class DraftModel(ModelDrafter):
    """A chain of the model's own choices."""

    name = "draft_model"
    verifier: ClassVar[str] = "block"

    def __init__(self, **options: float) -> None:
        super().__init__()
        self.options = DraftModelOptions(**options)  # type: ignore[arg-type]

    def start(self, view: RequestView, max_nodes: int, max_depth: int, kind: Kind) -> Growth:
        depth = min(max_depth, self.options.max_depth)
        return Chain(view, self.name, max_nodes, depth, kind, min_value=self.options.min_value)

    def _draft(
        self, runner: DraftRunner, cache: DraftCache, jobs: list[Job], passes: list[RowPass], busy: Collection[str]
    ) -> None:
        """Chains of chosen tokens need nothing between two levels but the token, so they are left to the runner."""
        if any(job.growth.is_sampled for job in jobs):
            super()._draft(runner, cache, jobs, passes, busy)
            return
        least = math.log(self.options.min_value) if self.options.min_value > 0.0 else -math.inf
        chains = []
        for job, (token_ids, start, _) in zip(jobs, passes, strict=True):
            growth, text = job.growth, job.text
            end, depth = start + len(token_ids), min(growth.max_nodes, growth.max_depth)
            while not cache.reserve(text, text.main, end + depth - 1, busy):
                depth -= 1  # ends at 1: there is room for the text
            keys = growth.keys(depth)
            chains.append(ChainPass(token_ids, start, text.main.block_ids, growth.view.temperature, keys, least))
        for job, found in zip(jobs, runner.chain(chains), strict=True):
            job.text.num_tokens = len(job.growth.view.token_ids)
            node, value = -1, 1.0
            for token, log_prob in found:
                value *= math.exp(log_prob)
                node = job.growth.add(node, token, value)
            job.text.main.tokens += [token for token, _ in found[:-1]]
