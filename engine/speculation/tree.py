"""A draft: guessed continuations of one request as a tree of tokens. Knows no model, no cache and no drafter.

The root is the request's last token, which is not part of the tree: node i continues node parents[i], or the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal["delta", "swor", "iid"]
Source = str | int


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Guessed tokens in topological order, a child after its parent.

    tokens   token ids
    parents  index of each node's parent, -1 for children of the root. Put the likeliest path first: an accepted path
             of nodes 0, 1, 2, ... need not be moved in the cache
    values   P(node is reached and accepted), each between 0 and its parent's
    sources  who guessed the node: names of drafters
    kind     delta: chosen by any rule, and siblings are distinct. swor, iid: drawn from `q` without, or with,
             replacement; they may only be pruned by what does not look at the token that was drawn
    q        distributions that the nodes were drawn from: node i from row parents[i] + 1, so row 0 is the root's;
             [rows, V] float32, needed by swor and iid alone
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    sources: tuple[Source, ...] = ()
    kind: Kind = "delta"
    q: np.ndarray | None = field(default=None, compare=False)

    @staticmethod
    def chain(
        tokens: Sequence[int], *, source: Source, values: Sequence[float] | None = None, kind: Kind = "delta"
    ) -> DraftTree:
        """One continuation, token after token. Without `values` all are certain."""
        count = len(tokens)
        return DraftTree(
            tokens=tuple(tokens),
            parents=tuple(range(-1, count - 1)),
            values=tuple(values) if values is not None else (1.0,) * count,
            sources=(source,) * count,
            kind=kind,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        return all(parent == index - 1 for index, parent in enumerate(self.parents))

    @property
    def depths(self) -> tuple[int, ...]:
        """1 for children of the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of the root, then of every node: their indices in order, so node i's are at i + 1."""
        found: list[list[int]] = [[] for _ in range(len(self.tokens) + 1)]
        for index, parent in enumerate(self.parents):
            found[parent + 1].append(index)
        return tuple(map(tuple, found))

    def child(self, node: int, token_id: int) -> int:
        """The child of `node` (-1: of the root) that carries the token, -1 without one."""
        for index in range(node + 1, len(self.parents)):
            if self.parents[index] == node and self.tokens[index] == token_id:
                return index
        return -1

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from a child of the root to `node`; empty for the root, -1."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return tuple(reversed(found))

    def select(self, nodes: Sequence[int]) -> DraftTree:
        """The tree of some nodes (ascending), among which is every node's parent."""
        places = {-1: -1, **{node: place for place, node in enumerate(nodes)}}
        q = self.q
        if q is not None:
            q = q[[0, *(node + 1 for node in nodes if node + 1 < len(q))]]
        return DraftTree(
            tokens=tuple(self.tokens[node] for node in nodes),
            parents=tuple(places[self.parents[node]] for node in nodes),
            values=tuple(self.values[node] for node in nodes),
            sources=tuple(self.sources[node] for node in nodes),
            kind=self.kind,
            q=q,
        )

    def first_path(self) -> DraftTree:
        """The chain from the root along first children, `delta` where that leaves some out: see `first`."""
        nodes: list[int] = []
        for index, parent in enumerate(self.parents):
            if parent == (nodes[-1] if nodes else -1):
                nodes.append(index)
        if len(nodes) == len(self.tokens):
            return self
        kept = self.select(nodes)
        return DraftTree(kept.tokens, kept.parents, kept.values, kept.sources)

    def first(self, num_nodes: int) -> DraftTree:
        """The tree of its first nodes, `delta`: which ones come first may depend on what was drawn."""
        if len(self.tokens) <= num_nodes:
            return self
        kept = self.select(range(max(0, num_nodes)))
        return DraftTree(kept.tokens, kept.parents, kept.values, kept.sources)

    def within(self, max_nodes: int, max_depth: int) -> DraftTree:
        """The most valuable nodes that fit. A bound that cuts by value makes a sampled tree a `delta` one."""
        if len(self.tokens) <= min(max_nodes, max_depth):
            return self
        depths = self.depths
        if len(self.tokens) <= max_nodes and max(depths) <= max_depth:
            return self
        fitting = [node for node, depth in enumerate(depths) if depth <= max_depth]
        # parents first among equals: a value never rises along a path
        best = sorted(sorted(fitting, key=lambda node: -self.values[node])[: max(0, max_nodes)])
        kept = self.select(best)
        if len(fitting) > max_nodes and self.kind != "delta":
            return DraftTree(kept.tokens, kept.parents, kept.values, kept.sources)
        return kept

    def problem(self) -> str | None:
        """What is wrong with the tree, None when nothing is. A drafter's output is not trusted, only checked."""
        count = len(self.tokens)
        if not len(self.parents) == len(self.values) == len(self.sources) == count:
            sizes = f"{len(self.parents)} parents, {len(self.values)} values, {len(self.sources)} sources"
            return f"{count} tokens with {sizes}"
        seen: set[tuple[int, int]] = set()
        for index, (token, parent, value) in enumerate(zip(self.tokens, self.parents, self.values, strict=True)):
            if token < 0:
                return f"node {index} has token {token}"
            if not -1 <= parent < index:
                return f"node {index} has parent {parent}; need -1 to {index - 1}"
            if not 0.0 <= value <= (1.0 if parent < 0 else self.values[parent]):
                return f"node {index} has value {value}, which is not between 0 and its parent's"
            if self.kind != "iid":
                if (parent, token) in seen:
                    return f"node {index} repeats token {token} of a sibling"
                seen.add((parent, token))
        if self.kind != "delta":
            num_rows = max(self.parents, default=-1) + 2
            if self.q is None or len(self.q) < num_rows:
                return f"{self.kind} needs {num_rows} rows of q"
        return None


EMPTY = DraftTree()
