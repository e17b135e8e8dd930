"""Tries of what followed each token: one that is counted up and bounded, and one of a text that does not change.

Knows tokens and counts; what they are good for is `lookahead.py`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

from engine.speculation.host import ENTRY_BYTES, INT_BYTES

NODE_BYTES = 64 + 24 + ENTRY_BYTES + 100  # object, count, place in its parent, and a dictionary for about every second


class Counted(Protocol):
    """A node of a trie, however it is kept."""

    @property
    def count(self) -> float: ...

    @property
    def children(self) -> Mapping[int, Counted]: ...


class Node:
    """A token behind the tokens above it; `count` times so far."""

    __slots__ = ("children", "count")

    def __init__(self) -> None:
        self.count = 0.0
        self.children: dict[int, Node] = {}


class Trie:
    """First token -> trie of the `length` tokens behind it, with counts.

    A root that outgrows `max_root_nodes`, or all of them beyond `max_nodes`, are squeezed: what occurred at most once
    is forgotten, the counts of the rest are halved.
    """

    def __init__(self, length: int, max_root_nodes: int, max_nodes: int) -> None:
        self._length = length
        self._max_root_nodes = max_root_nodes
        self._max_nodes = max_nodes
        self._roots: dict[int, Node] = {}
        self._sizes: dict[int, int] = {}  # nodes behind each first token, itself included
        self.num_nodes = 0
        self.num_squeezes = 0

    def find(self, tokens: Sequence[int]) -> Node | None:
        node = self._roots.get(tokens[0])
        for token in tokens[1:]:
            node = node.children.get(token) if node is not None else None
        return node

    def insert(self, tokens: Sequence[int], start: int) -> None:
        """Count the paths that end at each index from `start` on; the paths themselves may begin before it."""
        # first token and deepest node of each path that may still grow
        branches = list(self._open(tokens, start))
        for index in range(start, len(tokens)):
            token = tokens[index]
            grown = []
            for first, node in branches:
                child = node.children.get(token)
                if child is None:
                    child = node.children[token] = Node()
                    self._sizes[first] += 1
                    self.num_nodes += 1
                child.count += 1
                grown.append((first, child))
            root = self._roots.get(token)
            if root is None:
                root = self._roots[token] = Node()
                self._sizes[token] = 1
                self.num_nodes += 1
            root.count += 1
            branches = [*grown, (token, root)]
            if self._make_room(first for first, _ in branches):
                branches = list(self._open(tokens, index + 1))
            elif len(branches) == self._length:
                del branches[0]

    def _open(self, tokens: Sequence[int], end: int) -> Iterator[tuple[int, Node]]:
        """Paths that the token at index `end` will lengthen, as far as they are remembered; the longest first."""
        for begin in range(max(0, end - self._length + 1), end):
            node = self.find(tokens[begin:end])
            if node is not None:
                yield tokens[begin], node

    def _make_room(self, firsts: Iterable[int]) -> bool:
        """Keep the bounds, of which the tries behind these first tokens may be beyond; whether anything was lost."""
        before = self.num_squeezes
        for first in firsts:
            if self._sizes.get(first, 0) > self._max_root_nodes:
                self._squeeze(first)
        while self.num_nodes > self._max_nodes:
            for first in list(self._roots):
                self._squeeze(first)
        return self.num_squeezes != before

    def _squeeze(self, first: int) -> None:
        self.num_squeezes += 1
        root = self._roots[first]
        self.num_nodes -= self._sizes[first]
        if root.count <= 1:
            del self._roots[first], self._sizes[first]
            return
        size, stack = 0, [root]
        while stack:
            node = stack.pop()
            node.count /= 2
            size += 1
            node.children = {token: child for token, child in node.children.items() if child.count > 1}
            stack.extend(node.children.values())
        self._sizes[first] = size
        self.num_nodes += size

    @property
    def num_bytes(self) -> int:
        return self.num_nodes * NODE_BYTES


class PromptNode:
    """What followed some places in a text: a node of its trie that is opened when it is looked at."""

    __slots__ = ("_places", "_tokens", "count")

    def __init__(self, tokens: Sequence[int], places: Sequence[int]) -> None:
        self._tokens = tokens
        self._places = places  # index of the token behind each occurrence
        self.count = float(len(places))

    @property
    def children(self) -> Mapping[int, Counted]:
        found: dict[int, list[int]] = {}
        for place in self._places:
            if place < len(self._tokens):
                found.setdefault(self._tokens[place], []).append(place + 1)
        return {token: PromptNode(self._tokens, places) for token, places in found.items()}


class PromptTrie:
    """The trie of a text that does not change, of which only the places of each token are kept."""

    def __init__(self, tokens: Sequence[int], max_places: int) -> None:
        """max_places: most recent occurrences of a token or pair that are counted."""
        self._tokens = list(tokens)
        self._max_places = max_places
        self._places: dict[int, list[int]] = {}
        for place, token in enumerate(self._tokens, 1):
            self._places.setdefault(token, []).append(place)

    def find(self, query: Sequence[int]) -> PromptNode | None:
        """The node of one or two tokens."""
        places: Iterable[int] = reversed(self._places.get(query[-1], ()))
        if len(query) > 1:
            places = (place for place in places if place > 1 and self._tokens[place - 2] == query[0])
        recent = list(islice(places, self._max_places))
        return PromptNode(self._tokens, recent) if recent else None

    @property
    def num_bytes(self) -> int:
        return len(self._tokens) * (16 + 2 * INT_BYTES) + len(self._places) * (ENTRY_BYTES + 88)
