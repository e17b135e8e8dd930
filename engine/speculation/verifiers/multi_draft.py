"""Multi-draft sampling in canonical form: choose one of the drafts by importance, then one standard rejection.

Source: Khisti et al. 2024, "Multi-draft speculative sampling: canonical decomposition", arXiv:2410.18234. Drafts are
joined two at a time. The paper finds a pair's choice by a linear program over the likeliest tokens; here each token has
an *importance* h, of two drafts i and j the first is chosen with (1 + clip(h_i - h_j, -1, 1)) / 2, and h is found by
descent until the chosen token's law comes as close to p as it can. That law is computed exactly for whatever h, so the
output is exact for every h, and only the acceptance depends on how good it is.
"""

from __future__ import annotations

import numpy as np

from engine.speculation.tree import DraftTree
from engine.speculation.verifiers.common import Chance, Front, Law, Rows, Verdict, draft_law, law, ratio, residual

NUM_STEPS = 40  # of the descent
NUM_TUNED = 64  # likeliest tokens whose importance is tuned; the others keep what p / q suggests
_STEP = 0.9
_MAX_MOVE = 1.0
_CLOSE = 1e-6  # to p: then nothing is left to gain


def multi_draft(tree: DraftTree, p: Rows, chance: Chance) -> Verdict:
    """For an `iid` draft; the candidates of a context may come from different distributions."""
    front = Front(tree)
    while True:
        target = law(p(front.node))
        candidates = front.candidates()
        if not candidates:
            return front.verdict(chance.draw(target))
        token, chosen = _choose(tree, candidates, target, chance)
        if not chance.flip(ratio(target, chosen, token)):
            return front.verdict(chance.draw(residual(target, chosen)))
        front.descend(token)


def _choose(tree: DraftTree, candidates: list[int], target: Law, chance: Chance) -> tuple[int, Law]:
    """One of the candidates' tokens, and the law that it then has."""
    token, chosen = tree.tokens[candidates[0]], draft_law(tree, tree.parents[candidates[0]])
    for child in candidates[1:]:
        other, draft = tree.tokens[child], draft_law(tree, tree.parents[child])
        importance = tune(target, chosen, draft)
        if other != token and not chance.flip(_preference(importance[token], importance[other])):
            token = other
        chosen = joint_law(chosen, draft, importance)
    return token, chosen


def _preference(mine: float, other: float) -> float:
    return float(1.0 + np.clip(mine - other, -1.0, 1.0)) / 2.0


def joint_law(a: Law, b: Law, importance: Law) -> Law:
    """Law of the token chosen of one draft from `a` and one from `b`: [V], exact."""
    return (a * (1.0 + _Ranked(importance, b).mean_preference(importance))
            + b * (1.0 + _Ranked(importance, a).mean_preference(importance))) / 2.0  # fmt: skip


def tune(p: Law, a: Law, b: Law) -> Law:
    """Importance [V] of each token: descent on the convex function whose gradient is joint_law - p."""
    scale = (a + b) / 2.0
    importance = np.clip(np.divide(p - scale, scale, out=np.ones_like(p), where=scale > 0.0), -1.0, 1.0)
    weight = p + scale
    count = min(NUM_TUNED, len(p))
    tuned = np.argpartition(weight, -count)[-count:]
    tuned = tuned[scale[tuned] > 0.0]
    fixed = np.ones(len(p), dtype=bool)
    fixed[tuned] = False
    tails = [_Ranked(importance[fixed], law_[fixed]) for law_ in (a, b)]
    h, p_t, a_t, b_t, scale_t = importance[tuned], p[tuned], a[tuned], b[tuned], scale[tuned]
    for _ in range(NUM_STEPS):
        over_a = _Ranked(h, a_t).mean_preference(h) + tails[0].mean_preference(h)
        over_b = _Ranked(h, b_t).mean_preference(h) + tails[1].mean_preference(h)
        reached = (a_t * (1.0 + over_b) + b_t * (1.0 + over_a)) / 2.0
        if np.abs(reached - p_t).max(initial=0.0) < _CLOSE:
            break
        h = h + np.clip(_STEP * (p_t - reached) / scale_t, -_MAX_MOVE, _MAX_MOVE)
    importance[tuned] = h
    return importance


class _Ranked:
    """Tokens by importance, with running sums of their mass."""

    def __init__(self, importance: Law, mass: Law) -> None:
        order = np.argsort(importance, kind="stable")
        self._sorted = importance[order]
        self._mass = np.concatenate(([0.0], np.cumsum(mass[order])))
        self._moment = np.concatenate(([0.0], np.cumsum(mass[order] * self._sorted)))

    def mean_preference(self, h: Law) -> Law:
        """Sum over the tokens j of mass_j * clip(h - h_j, -1, 1), for each h."""
        low = np.searchsorted(self._sorted, h - 1.0, side="right")
        high = np.searchsorted(self._sorted, h + 1.0, side="left")
        between = h * (self._mass[high] - self._mass[low]) - (self._moment[high] - self._moment[low])
        preference: Law = self._mass[low] + between - (self._mass[-1] - self._mass[high])
        return preference
