"""Building draft trees: best-first growth from any source of likely children, and likeliest-path-first order.

Because a value never rises along a path, taking the most valuable node next yields the best connected tree of every
size. Knows no drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import TypeVar

from engine.speculation.tree import EMPTY, DraftTree, Source

State = TypeVar("State")
Child = tuple[int, float, State]  # token id, P(accepted | parent accepted), state


def grow(
    root: State,
    expand: Callable[[State], Iterator[Child[State]]],
    *,
    source: Source,
    max_nodes: int,
    max_depth: int,
    min_value: float = 0.0,
) -> DraftTree:
    """The `max_nodes` most valuable nodes under `root`, at most `max_depth` deep and worth at least `min_value`.

    expand  state of a node -> its children, the likeliest first: distinct token ids, P(child accepted | parent
            accepted) and the child's state. Read only as far as children are taken

    Among equals, the node that was found first wins.
    """
    if max_nodes <= 0 or max_depth <= 0:
        return EMPTY
    tokens: list[int] = []
    parents: list[int] = []
    values: list[float] = []
    found = 0
    # (-value, order of discovery, token, parent, depth, parent's value, state, siblings still to come): of a node's
    # children only the next one is here. The order is unique, so that nothing behind it is compared
    open_nodes: list[tuple[float, int, int, int, int, float, State, Iterator[Child[State]]]] = []

    def offer(children: Iterator[Child[State]], parent: int, depth: int, above: float) -> None:
        nonlocal found
        for token, probability, state in children:
            value = above * min(probability, 1.0)
            if value >= min_value:
                heappush(open_nodes, (-value, found, token, parent, depth, above, state, children))
                found += 1
            break

    offer(expand(root), -1, 1, 1.0)
    while open_nodes and len(tokens) < max_nodes:
        negated, _, token, parent, depth, above, state, siblings = heappop(open_nodes)
        tokens.append(token)
        parents.append(parent)
        values.append(-negated)
        offer(siblings, parent, depth, above)
        if depth < max_depth:
            offer(expand(state), len(tokens) - 1, depth + 1, -negated)
    return heavy_first(tokens, parents, values, (source,) * len(tokens))


def heavy_first(tokens: list[int], parents: list[int], values: list[float], sources: Sequence[Source]) -> DraftTree:
    """A tree of these nodes (parents before children), numbered depth first, the most valuable child before its
    siblings: nodes 0, 1, 2, ... are then the path that is likeliest to be accepted."""
    count = len(tokens)
    if parents == list(range(-1, count - 1)):
        return DraftTree(tuple(tokens), tuple(parents), tuple(values), tuple(sources))
    children: list[list[int]] = [[] for _ in range(count + 1)]
    for index, parent in enumerate(parents):
        children[parent + 1].append(index)
    order: list[int] = []
    places = [-1] * (count + 1)  # of a node i at i + 1, of the root at 0
    stack = sorted(children[0], key=values.__getitem__)  # ascending: the stack turns it round
    while stack:
        node = stack.pop()
        places[node + 1] = len(order)
        order.append(node)
        below = children[node + 1]
        stack += below if len(below) < 2 else sorted(below, key=values.__getitem__)
    return DraftTree(
        tokens=tuple([tokens[node] for node in order]),
        parents=tuple([places[parents[node] + 1] for node in order]),
        values=tuple([values[node] for node in order]),
        sources=tuple([sources[node] for node in order]),
    )
