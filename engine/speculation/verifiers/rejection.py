"""Standard speculative sampling on a chain.

Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318. Accepts 1 - TV(p, q) at each place.
"""

from __future__ import annotations

from engine.speculation.tree import DraftTree
from engine.speculation.verifiers.common import Chance, Rows, Verdict, draft_law, law, ratio, residual


def rejection(tree: DraftTree, p: Rows, chance: Chance) -> Verdict:
    """For a chain whose node i was drawn from q row i. Raises ValueError for a draft that branches."""
    if not tree.is_chain:
        raise ValueError("standard rejection needs a chain, the draft branches")
    for node, token in enumerate(tree.tokens):
        target, draft = law(p(node - 1)), draft_law(tree, node - 1)
        if not chance.flip(ratio(target, draft, token)):
            return Verdict(tuple(range(node)), chance.draw(residual(target, draft)))
    count = len(tree)
    return Verdict(tuple(range(count)), chance.draw(law(p(count - 1))))
