"""Several drafters, one tree: the union of their tries.

Source: the fusion of RASD (Quan et al. 2025) and GOOSE, generalised. A node that several trees hold is accepted unless
all of them are wrong, 1 - prod(1 - value); siblings are then scaled to share no more than their parent's value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.speculation.grow import heavy_first
from engine.speculation.tree import EMPTY, DraftTree, Source

UNBOUNDED = 1 << 30


@dataclass(slots=True)
class Node:
    doubt: float = 1.0  # P(all sources are wrong)
    best: float = -1.0  # greatest value that one source gave
    source: Source = ""  # the one that gave it
    children: dict[int, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Merged:
    """num_duplicates: nodes that were found more than once, and so cost nothing."""

    tree: DraftTree
    num_duplicates: int


def merge(trees: Sequence[DraftTree], max_nodes: int = UNBOUNDED) -> Merged:
    """The union of trees of one request, cut to its `max_nodes` most valuable nodes.

    A node keeps the source that valued it most, the earlier tree's among equals. A union is of kind delta, whatever was
    merged; a tree that has no other beside it stays what it is, as far as a cut leaves it so.
    """
    filled = [tree for tree in trees if len(tree)]
    if not filled or max_nodes <= 0:
        return Merged(EMPTY, 0)
    if len(filled) == 1:
        return Merged(filled[0].within(max_nodes, UNBOUNDED), 0)
    root = Node()
    num_nodes = sum(_insert(root, tree) for tree in filled)
    merged = _flatten(root)
    return Merged(merged.within(max_nodes, UNBOUNDED), sum(map(len, filled)) - num_nodes)


def _insert(root: Node, tree: DraftTree) -> int:
    """Add a tree's paths; how many nodes were new. A token that a sampled tree repeats among siblings counts once,
    with the greater value."""
    added = 0
    held: dict[int, float] = {}  # id of a node -> value this tree gave it
    nodes = [root]
    for token, parent, value, source in zip(tree.tokens, tree.parents, tree.values, tree.sources, strict=True):
        above = nodes[parent + 1]
        node = above.children.get(token)
        if node is None:
            node = above.children[token] = Node()
            added += 1
        nodes.append(node)
        earlier = held.get(id(node), 0.0)
        if value > earlier or id(node) not in held:
            held[id(node)] = value
            if earlier < 1.0:
                node.doubt *= (1.0 - value) / (1.0 - earlier)
        if value > node.best:
            node.best, node.source = value, source
    return added


def _flatten(root: Node) -> DraftTree:
    tokens: list[int] = []
    parents: list[int] = []
    values: list[float] = []
    sources: list[Source] = []
    queue = [(root, -1, 1.0)]
    for node, place, value in queue:  # grows as it is read: breadth first
        wanted = {token: min(value, 1.0 - child.doubt) for token, child in node.children.items()}
        total = sum(wanted.values())
        scale = value / total if total > value else 1.0
        for token, child in node.children.items():
            child_value = min(value, wanted[token] * scale)
            queue.append((child, len(tokens), child_value))
            tokens.append(token)
            parents.append(place)
            values.append(child_value)
            sources.append(child.source)
    return heavy_first(tokens, parents, values, sources)
