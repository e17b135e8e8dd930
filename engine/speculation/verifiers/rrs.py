"""Recursive rejection for children drawn without replacement: the best of the practical rules where a drafter samples.

Source: Jeon et al. 2024, "Recursive speculative decoding", arXiv:2402.14160; the same rule in Sequoia and EAGLE-1.
"""

from __future__ import annotations

from engine.speculation.tree import DraftTree
from engine.speculation.verifiers.common import Chance, Law, Rows, Verdict, draft_law, law, ratio, residual


def rrs(tree: DraftTree, p: Rows, chance: Chance) -> Verdict:
    """For a `swor` draft whose siblings stand in the order in which they were drawn."""
    children = tree.children
    path: list[int] = []
    node = -1
    while True:
        target = law(p(node))
        found, left = _try_children(tree, children[node + 1], target, node, chance)
        if found is None:
            return Verdict(tuple(path), chance.draw(left))
        path.append(found)
        node = found


def _try_children(
    tree: DraftTree, children: tuple[int, ...], target: Law, node: int, chance: Chance
) -> tuple[int | None, Law]:
    """The child that is accepted, or what to draw from instead."""
    if not children:
        return None, target
    draft = draft_law(tree, node)
    for child in children:
        token = tree.tokens[child]
        if chance.flip(ratio(target, draft, token)):
            return child, target
        target = residual(target, draft)
        draft[token] = 0.0  # the next one was drawn from what the tried ones have left
        mass = draft.sum()
        if mass <= 0.0:
            break
        draft /= mass
    return None, target
