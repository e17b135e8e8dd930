"""Block verification: a chain is judged as a whole, and never accepted for less than standard rejection would.

Source: Sun et al. 2024, "Block verification accelerates speculative decoding", arXiv:2403.10444, algorithm 2.
"""

from __future__ import annotations

import numpy as np

from engine.speculation.tree import DraftTree
from engine.speculation.verifiers.common import Chance, Rows, Verdict, draft_law, law, ratio


def block(tree: DraftTree, p: Rows, chance: Chance) -> Verdict:
    """For a chain whose node i was drawn from q row i; looks at p of every node. ValueError for one that branches."""
    if not tree.is_chain:
        raise ValueError("block verification needs a chain, the draft branches")
    count = len(tree)
    targets = [law(p(node)) for node in range(-1, count)]
    drafts = [draft_law(tree, node) for node in range(-1, count - 1)]
    kept = [1.0]  # kept[i]: how much of the mass that p gives the first i tokens q has offered, at most 1
    for i, token in enumerate(tree.tokens):
        kept.append(min(1.0, kept[i] * ratio(targets[i], drafts[i], token)))
    if chance.flip(kept[count]):
        return Verdict(tuple(range(count)), chance.draw(targets[count]))
    for i in range(count - 1, 0, -1):  # the longest prefix that is accepted
        left = np.maximum(kept[i] * targets[i] - drafts[i], 0.0)
        mass = float(left.sum())
        rest = mass + 1.0 - kept[i]
        if mass > 0.0 and chance.flip(mass / rest):
            return Verdict(tuple(range(i)), chance.draw(left))
    left = np.maximum(targets[0] - drafts[0], 0.0)
    return Verdict((), chance.draw(left if left.any() else targets[0]))
