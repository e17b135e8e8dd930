"""Which requests of a batch share which prefix: a compact tree over all prompts, cut down to one prefix per request.

Works on sequences of comparable numbers, one per cache block, and knows nothing of text or tokens.
Source: BatchLLM (arXiv:2412.03594), with an exact dynamic program in place of the paper's greedy merging.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# Below so many branchings no further prefix is looked for: bounds the work for chains of nested prompts.
MAX_LEVELS = 64

Keys = tuple[int, ...]  # one sequence


@dataclass(slots=True, eq=False)
class Node:
    """A prefix. `length` counts from the root; `ends` are the sequences that are no longer than it."""

    length: int
    children: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # by their place in the batch

    def walk(self) -> Iterator[Node]:
        """This node and all below, parents first."""
        pending = [self]
        while pending:
            node = pending.pop()
            yield node
            pending += reversed(node.children)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix that is computed once, and the sequences that use it; length 0: those that share nothing."""

    length: int
    members: tuple[int, ...]


def build(sequences: Sequence[Keys]) -> Node:
    """The compact tree: every node but the root has an end or two children. Linear in the input, after sorting it."""
    root = Node(0)
    path = [root]
    previous: Keys = ()
    for index in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        sequence = sequences[index]
        shared = common_length(previous, sequence)
        previous = sequence
        while path[-1].length > shared:
            path.pop()
        if path[-1].length < shared:  # the newest branch goes on past here: it gets a node in between
            middle = Node(shared, [path[-1].children.pop()])
            path[-1].children.append(middle)
            path.append(middle)
        if len(sequence) > path[-1].length:
            leaf = Node(len(sequence))
            path[-1].children.append(leaf)
            path.append(leaf)
        path[-1].ends.append(index)
    return root


def common_length(first: Keys, second: Keys) -> int:
    """How many leading elements are equal."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def flatten(top: Node) -> list[Prefix]:
    """The choice of prefixes, at most one per sequence, that saves most: each is computed once, for all its members.

    top   a child of the root: everything below shares something
    Sequences without a prefix come as one `Prefix` of length 0, last. Takes nodes times levels.
    """
    nodes, levels = _bounded(top)
    gains = _gains(nodes, levels)
    prefixes: list[Prefix] = []
    alone: list[int] = []
    members: dict[Node, list[int]] = {}
    pending: list[tuple[Node, Node | None]] = [(top, None)]  # a node and the nearest chosen one above it
    while pending:
        node, above = pending.pop()
        uses, skips = gains[node]
        chosen = node if uses > skips[levels[above] if above is not None else 0] else above
        (members.setdefault(chosen, []) if chosen is not None else alone).extend(node.ends)
        pending += [(child, chosen) for child in reversed(node.children)]
    prefixes += [Prefix(node.length, tuple(own)) for node, own in members.items() if own]
    return prefixes + ([Prefix(0, tuple(alone))] if alone else [])


def _bounded(top: Node) -> tuple[list[Node], dict[Node, int]]:
    """All nodes, parents first, and their levels from 1 on. What is deeper than MAX_LEVELS ends at its ancestor."""
    levels = {top: 1}
    nodes = [top]
    for node in nodes:
        if levels[node] == MAX_LEVELS and node.children:
            node.ends = [index for below in node.walk() for index in below.ends]
            node.children = []
        for child in node.children:
            levels[child] = levels[node] + 1
            nodes.append(child)
    return nodes, levels


def _gains(nodes: list[Node], levels: dict[Node, int]) -> dict[Node, tuple[int, list[int]]]:
    """Elements saved below each node, when it is a chosen prefix, and when it is not.

    The second by the level of the nearest chosen node above: 0 is none. With A(v) the length of v, e(v) its ends and p
    that node: G(v, p) = max(-A(v) + e(v) A(v) + sum over children c of G(c, v), e(v) A(p) + sum of G(c, p)).
    """
    lengths: dict[Node, list[int]] = {nodes[0]: [0]}  # of the possible p of a node, by level
    for node in nodes:
        for child in node.children:
            lengths[child] = [*lengths[node], node.length]
    gains: dict[Node, tuple[int, list[int]]] = {}
    for node in reversed(nodes):
        level, num_ends = levels[node], len(node.ends)
        uses = (num_ends - 1) * node.length
        skips = [num_ends * length for length in lengths.pop(node)]
        for child in node.children:
            child_uses, child_skips = gains[child]
            uses += max(child_uses, child_skips[level])
            for place in range(level):
                skips[place] += max(child_uses, child_skips[place])
        gains[node] = uses, skips
    return gains
