"""Sample the target once per node and descend while a child carries the token. Exact for any draft, however chosen.

Accepts sum p(S) at a node with children S (distinct tokens): optimal for drafts that are not random.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.speculation.tree import DraftTree
from engine.speculation.verifiers.common import Chance, Rows, Verdict, law


def walk(tree: DraftTree, choose: Callable[[int], int]) -> Verdict:
    """choose(node): the target's token after it, asked once for each node that is visited, the root (-1) first."""
    children = tree.children
    path: list[int] = []
    node = -1
    while True:
        token = choose(node)
        found = next((child for child in children[node + 1] if tree.tokens[child] == token), None)
        if found is None:
            return Verdict(tuple(path), token)
        path.append(found)
        node = found


def sample_once(tree: DraftTree, p: Rows, chance: Chance) -> Verdict:
    """`walk` with tokens drawn from p, in the form of the other verifiers."""
    return walk(tree, lambda node: chance.draw(law(p(node))))
