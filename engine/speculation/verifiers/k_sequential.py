"""k-sequential selection: k independent drafts of one context, each accepted against p / rho with one best rho.

Source: Sun et al. 2023, "SpecTr", arXiv:2310.15141, algorithm 2. Accepts at least 1 - (1 - 1/k)^k of the optimum.
"""

from __future__ import annotations

import numpy as np

from engine.speculation.tree import DraftTree
from engine.speculation.verifiers.common import Chance, Front, Law, Rows, Verdict, draft_law, law

_BISECTIONS = 50  # halvings of [1, k]: below the resolution of a double


def k_sequential(tree: DraftTree, p: Rows, chance: Chance) -> Verdict:
    """For an `iid` draft of chains from the root; those with equal tokens so far are drafts of one context.

    All candidates of a context must come from one distribution.
    """
    front = Front(tree)
    while True:
        target = law(p(front.node))
        candidates = front.candidates()
        if not candidates:
            return front.verdict(chance.draw(target))
        draft = draft_law(tree, front.node)
        rho = best_rho(target, draft, len(candidates))
        accepted = None
        for child in candidates:
            token = tree.tokens[child]
            if chance.flip(float(target[token] / (rho * draft[token]))):
                accepted = token
                break
        if accepted is None:
            return front.verdict(chance.draw(_left(target, draft, rho, len(candidates))))
        front.descend(accepted)


def best_rho(p: Law, q: Law, k: int) -> float:
    """The rho in [1, k] at which no mass is left over: 1 - (1 - beta)^k = rho * beta, beta = sum min(q, p / rho)."""

    def excess(rho: float) -> float:
        beta = _beta(p, q, rho)
        return float(1.0 - (1.0 - beta) ** k - rho * beta)

    if excess(1.0) <= 0.0:
        return 1.0
    low, high = 1.0, float(k)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    return high  # the side on which what is left is nowhere negative


def acceptance(p: Law, q: Law, k: int) -> float:
    """P(one of k drafts from q is accepted)."""
    return float(1.0 - (1.0 - _beta(p, q, best_rho(p, q, k))) ** k)


def _beta(p: Law, q: Law, rho: float) -> float:
    return float(np.minimum(q, p / rho).sum())


def _left(p: Law, q: Law, rho: float, k: int) -> Law:
    """What to draw from when all k drafts were turned down."""
    beta = _beta(p, q, rho)
    if beta <= 0.0:
        return p
    each = (1.0 - (1.0 - beta) ** k) / beta
    left = np.maximum(p - np.minimum(q, p / rho) * each, 0.0)
    return left if left.any() else p
