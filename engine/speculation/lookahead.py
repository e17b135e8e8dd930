"""Lookahead: tries of what followed each token, one of the request's prompt and one of the server's outputs.

Source: Zhao et al. 2023, "Lookahead", arXiv:2312.12728, mode `hier`. Differs: the prompt has a trie of its own instead
of per-request counts in a shared one, of its most recent places and opened where it is read; outputs are shared within
a tenant and adapter only; memory is bounded as a whole, besides per first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

from engine.speculation.base import RequestView, drafters
from engine.speculation.grow import heavy_first
from engine.speculation.host import HostDrafter, Scopes, check_bounds
from engine.speculation.tree import EMPTY, DraftTree
from engine.speculation.tries import Counted, PromptTrie, Trie

Pair = tuple[Counted | None, Counted | None]  # of the prompt, of outputs


@dataclass(frozen=True, slots=True)
class LookaheadOptions:
    max_tokens: int = 64  # nodes of a draft
    branch_length: int = 12  # tokens that are remembered behind each token, and the depth of a draft
    output_weight: float = 1e-4  # of a count in outputs when nodes are ranked, against 1 for the prompt
    doubt: float = 2.0  # added to counts, divided by the number of tokens that agree
    min_value: float = 0.02  # nodes less likely than this to be accepted are not drafted
    max_root_nodes: int = 512  # of outputs behind one first token
    max_output_nodes: int = 1 << 17  # of all outputs of a scope
    max_places: int = 256  # most recent occurrences in the prompt that are counted
    max_scopes: int = 8  # pairs of tenant and adapter

    def __post_init__(self) -> None:
        check_bounds("lookahead", self, max_tokens=(1, 1024), branch_length=(1, 128), output_weight=(0.0, 1.0))
        check_bounds("lookahead", self, doubt=(0.0, 100.0), min_value=(0.0, 1.0))
        check_bounds("lookahead", self, max_root_nodes=(1, 1 << 20), max_scopes=(1, 65536))
        check_bounds("lookahead", self, max_output_nodes=(1, 1 << 26), max_places=(1, 1 << 20))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may be drafted: its two trie nodes, of prompt and outputs, and their counts."""

    token: int
    parent: int
    depth: int
    value: float
    nodes: Pair
    in_count: float
    out_count: float


class Growth:
    """A draft that grows by the count of its candidates; they never rise along a path."""

    def __init__(self, pair: Pair, agreeing: int, max_depth: int, options: LookaheadOptions) -> None:
        """agreeing: tokens of the request that led to the pair."""
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.values: list[float] = []
        self._agreeing = agreeing
        self._max_depth = max_depth
        self._options = options
        self._open = self._children(Candidate(-1, -1, 0, 1.0, pair, inf, inf))

    def add(self, count: int, *, by_outputs: bool) -> None:
        """Take the `count` candidates with the greatest count: in outputs, where that is not 0, or mixed."""
        heap = [(-self._rank(candidate, by_outputs), order) for order, candidate in enumerate(self._open)]
        heapify(heap)
        taken: set[int] = set()
        while heap and len(taken) < count:
            rank, order = heappop(heap)
            if by_outputs and rank == 0:
                break
            candidate = self._open[order]
            taken.add(order)
            self.tokens.append(candidate.token)
            self.parents.append(candidate.parent)
            self.values.append(candidate.value)
            for child in self._children(candidate):
                heappush(heap, (-self._rank(child, by_outputs), len(self._open)))
                self._open.append(child)
        self._open = [candidate for order, candidate in enumerate(self._open) if order not in taken]

    def _rank(self, candidate: Candidate, by_outputs: bool) -> float:
        if by_outputs:
            return candidate.out_count
        weight = self._options.output_weight
        return (1 - weight) * candidate.in_count + weight * candidate.out_count

    def _children(self, above: Candidate) -> list[Candidate]:
        """Of the candidate that was added last, or of the root."""
        if above.depth == self._max_depth:
            return []
        total = sum(node.count for node in above.nodes if node is not None)
        total += self._options.doubt / (self._agreeing + above.depth)
        prompt, output = (node.children if node is not None else {} for node in above.nodes)
        children = []
        for token in dict.fromkeys((*prompt, *output)):
            inner, outer = prompt.get(token), output.get(token)
            # after a squeeze a node may count more than the one above it
            in_count = min(above.in_count, inner.count if inner else 0.0)
            out_count = min(above.out_count, outer.count if outer else 0.0)
            value = above.value * min(1.0, (in_count + out_count) / total)
            if value >= self._options.min_value and value > 0.0:
                place, depth = len(self.tokens) - 1, above.depth + 1
                children.append(Candidate(token, place, depth, value, (inner, outer), in_count, out_count))
        return children


@dataclass(slots=True)
class LookaheadState:
    prompt: PromptTrie
    scope: tuple[str, str] | None = None
    tail: tuple[int, ...] = ()  # newest tokens that are in the trie of outputs


@drafters.register("lookahead")
class Lookahead(HostDrafter[LookaheadState]):
    """Wide trees of what followed the newest one or two tokens. Strongest where outputs resemble earlier ones."""

    name = "lookahead"

    def __init__(self, **options: Any) -> None:
        """Keyword arguments are those of LookaheadOptions. Raises ConfigError for a value out of bounds."""
        super().__init__()
        self.options = chosen = LookaheadOptions(**options)
        self._outputs = Scopes(
            lambda: Trie(chosen.branch_length + 1, chosen.max_root_nodes, chosen.max_output_nodes), chosen.max_scopes
        )

    def _start(self, prompt: Sequence[int]) -> LookaheadState:
        return LookaheadState(PromptTrie(prompt, self.options.max_places))

    def _read(self, state: LookaheadState, view: RequestView, start: int) -> None:
        state.scope = (view.tenant, view.adapter)
        self._learn(state, view.token_ids[max(start, view.num_prompt_tokens) :])

    def _finish(self, state: LookaheadState, unread: Sequence[int]) -> None:
        self._learn(state, unread)

    def _learn(self, state: LookaheadState, tokens: Sequence[int]) -> None:
        if state.scope is None or not tokens:
            return
        text = (*state.tail, *tokens)
        self._outputs.get(*state.scope).insert(text, len(state.tail))
        state.tail = text[-self.options.branch_length :]

    def _guess(self, state: LookaheadState, view: RequestView, max_nodes: int, max_depth: int) -> DraftTree:
        outputs = self._outputs.get(view.tenant, view.adapter)
        best = EMPTY
        for length in (2, 1):
            query = view.token_ids[-length:]
            if len(query) == length:
                pair = (state.prompt.find(query), outputs.find(query))
                tree = self._choose(pair, length, max_nodes, min(max_depth, self.options.branch_length + 1 - length))
                if len(tree) >= min(self.options.branch_length, max_nodes):
                    return tree
                best = max(best, tree, key=lambda found: sum(found.values))
        return best

    def _choose(self, pair: Pair, agreeing: int, max_nodes: int, max_depth: int) -> DraftTree:
        """Half of the nodes by how often outputs had them, the others by the mixed count, the prompt's first."""
        max_nodes = min(max_nodes, self.options.max_tokens)
        growth = Growth(pair, agreeing, max_depth, self.options)
        growth.add(max(1, max_nodes // 2), by_outputs=True)
        growth.add(max_nodes - len(growth.tokens), by_outputs=False)
        return heavy_first(growth.tokens, growth.parents, growth.values, [self.name] * len(growth.tokens))

    def forget(self, tenant: str) -> None:
        """Wipe a tenant's outputs."""
        self._outputs.forget(tenant)

    @property
    def state_bytes(self) -> int:
        return self._outputs.num_bytes + sum(request.state.prompt.num_bytes for request in self._requests.values())
