"""Several independent drafts of one context, tried one after the other against what the last one has left.

Source: Miao et al. 2024, "SpecInfer", arXiv:2305.09781, algorithm 2. A baseline: equal drafts waste their tries.
"""

from __future__ import annotations

from engine.speculation.tree import DraftTree
from engine.speculation.verifiers.common import Chance, Front, Rows, Verdict, draft_law, law, ratio, residual


def multi_round(tree: DraftTree, p: Rows, chance: Chance) -> Verdict:
    """For an `iid` draft; siblings may be equal, and branches with equal tokens are drafts of one context."""
    front = Front(tree)
    while True:
        target = law(p(front.node))
        accepted = None
        for child in front.candidates():
            token = tree.tokens[child]
            draft = draft_law(tree, tree.parents[child])
            if chance.flip(ratio(target, draft, token)):
                accepted = token
                break
            target = residual(target, draft)
        if accepted is None:
            return front.verdict(chance.draw(target))
        front.descend(accepted)
