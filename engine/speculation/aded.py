"""ADED: a table of which token follows which pair, adapted to the running request, searched for a draft tree.

Source: Liu et al. 2024, "Adaptive Draft-Verification", arXiv:2407.12021. Differs: no corpus comes along, the table
starts empty and learns from prompts and outputs; pairs are kept per tenant and adapter, the longest unused are
forgotten; and the tree is the best one by product of relative weights, found by a heap. `simulations` above 0 searches
with the paper's Monte Carlo tree search instead, which finds a similar tree in more time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from random import Random
from typing import Any

from engine.noise import row_key
from engine.speculation.base import RequestView, drafters
from engine.speculation.grow import grow, heavy_first
from engine.speculation.host import ENTRY_BYTES, INT_BYTES, TUPLE_BYTES, HostDrafter, Scopes, check_bounds
from engine.speculation.tree import DraftTree

Pair = tuple[int, int]
PAIR_BYTES = TUPLE_BYTES + 16 + ENTRY_BYTES + 104  # key, place in the table, dictionary
SUCCESSOR_BYTES = ENTRY_BYTES + INT_BYTES + 24


@dataclass(frozen=True, slots=True)
class AdedOptions:
    max_tokens: int = 64  # nodes of a draft
    max_depth: int = 5
    successors: int = 12  # remembered for each pair
    window: int = 16  # newest tokens whose triples are strengthened before each draft
    step: float = 0.04  # weight that a triple gains
    max_weight: float = 3.0
    learn_prompt: int = 1  # 0: only the window, as in the paper
    min_value: float = 0.02  # nodes less likely than this to be accepted are not drafted
    simulations: int = 0  # of the Monte Carlo search; the paper has 150
    max_pairs: int = 32768  # of a table
    max_scopes: int = 8  # tables: pairs of tenant and adapter

    def __post_init__(self) -> None:
        check_bounds("aded", self, max_tokens=(1, 1024), max_depth=(1, 64), successors=(1, 1024), window=(3, 1024))
        check_bounds("aded", self, step=(1e-6, 1e6), max_weight=(self.step, 1e6), learn_prompt=(0, 1))
        check_bounds("aded", self, min_value=(0.0, 1.0), simulations=(0, 10000))
        check_bounds("aded", self, max_pairs=(1, 1 << 24), max_scopes=(1, 65536))


class PairTable:
    """(a, b) -> weight of each c that followed: at most `successors` per pair, at most `max_pairs` pairs."""

    def __init__(self, options: AdedOptions) -> None:
        self._options = options
        self._pairs: OrderedDict[Pair, dict[int, float]] = OrderedDict()  # the longest unused first
        self._num_successors = 0

    def successors(self, pair: Pair) -> Mapping[int, float]:
        return self._pairs.get(pair, {})

    def learn(self, tokens: Sequence[int]) -> None:
        """Strengthen every triple of the text by one step. O(tokens)."""
        options, pairs = self._options, self._pairs
        for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
            pair = (first, second)
            weights = pairs.get(pair)
            if weights is None:
                if len(pairs) >= options.max_pairs:
                    _, lost = pairs.popitem(last=False)
                    self._num_successors -= len(lost)
                weights = pairs[pair] = {}
            else:
                pairs.move_to_end(pair)
            if third not in weights:
                self._num_successors += 1
                if len(weights) == options.successors:
                    del weights[min(weights, key=weights.__getitem__)]
                    self._num_successors -= 1
            weights[third] = min(weights.get(third, 0.0) + options.step, options.max_weight)

    def chances(self, pair: Pair, doubt: float) -> list[tuple[int, float]]:
        """Successors with their share of the pair's weight, to which `doubt` is added; the greatest first."""
        weights = self.successors(pair)
        total = sum(weights.values()) + doubt
        return [(token, weights[token] / total) for token in sorted(weights, key=weights.__getitem__, reverse=True)]

    @property
    def num_bytes(self) -> int:
        return len(self._pairs) * PAIR_BYTES + self._num_successors * SUCCESSOR_BYTES


@dataclass(slots=True)
class AdedState:
    prompt: tuple[int, ...] = ()  # until its tenant and adapter are known


@drafters.register("aded")
class Aded(HostDrafter[AdedState]):
    """Trees of limited depth from pairs of tokens: cheap, and best where outputs keep to few phrases."""

    name = "aded"

    def __init__(self, **options: Any) -> None:
        """Keyword arguments are those of AdedOptions. Raises ConfigError for a value out of bounds."""
        super().__init__()
        self.options = chosen = AdedOptions(**options)
        self._tables = Scopes(lambda: PairTable(chosen), chosen.max_scopes)

    def _start(self, prompt: Sequence[int]) -> AdedState:
        return AdedState(tuple(prompt) if self.options.learn_prompt else ())

    def _read(self, state: AdedState, view: RequestView, start: int) -> None:
        """Nothing: the window is read anew for every draft."""

    def _guess(self, state: AdedState, view: RequestView, max_nodes: int, max_depth: int) -> DraftTree:
        options = self.options
        table = self._tables.get(view.tenant, view.adapter)
        if state.prompt:
            table.learn(state.prompt)
            state.prompt = ()
        table.learn(view.token_ids[-options.window :])
        max_nodes, max_depth = min(max_nodes, options.max_tokens), min(max_depth, options.max_depth)
        if len(view.token_ids) < 2:
            return DraftTree()
        pair = (view.token_ids[-2], view.token_ids[-1])
        if options.simulations:
            generator = Random(row_key(view.seed, view.choice, len(view.token_ids)))
            return TreeSearch(table, options.step, generator).draft(
                pair, options.simulations, max_nodes, max_depth, self.name
            )

        def children(above: Pair) -> Iterator[tuple[int, float, Pair]]:
            return ((token, chance, (above[1], token)) for token, chance in table.chances(above, options.step))

        return grow(
            pair,
            children,
            source=self.name,
            max_nodes=max_nodes,
            max_depth=max_depth,
            min_value=options.min_value,
        )

    def forget(self, tenant: str) -> None:
        """Wipe what a tenant's requests have taught."""
        self._tables.forget(tenant)

    @property
    def state_bytes(self) -> int:
        return self._tables.num_bytes + sum(8 * len(request.state.prompt) for request in self._requests.values())


class Visited:
    """A node of the search."""

    __slots__ = ("chance", "children", "num_visits", "pair", "token", "total")

    def __init__(self, token: int, pair: Pair, chance: float) -> None:
        self.token = token
        self.pair = pair
        self.chance = chance
        self.num_visits = 0
        self.total = 0.0
        self.children: list[Visited] | None = None


class TreeSearch:
    """The paper's Monte Carlo tree search over successors, with the constants of its authors' code."""

    EXPLORE, EXPLORE_GROWTH = 32.0, 8.0
    SEARCH_DEPTH = 4
    NUM_PATHS = 24

    def __init__(self, table: PairTable, doubt: float, generator: Random) -> None:
        self._table = table
        self._doubt = doubt
        self._generator = generator

    def draft(self, pair: Pair, simulations: int, max_nodes: int, max_depth: int, source: str) -> DraftTree:
        """The most visited paths, each with its best successor at the end, as a tree."""
        root = Visited(pair[1], pair, 1.0)
        for _ in range(simulations):
            self._simulate(root)
        paths = sorted(self._paths(root, []), key=lambda path: -path[-1].num_visits)[: self.NUM_PATHS]
        tokens: list[int] = []
        parents: list[int] = []
        values: list[float] = []
        places: dict[tuple[int, ...], int] = {(): -1}
        for path in paths:
            steps = [(node.token, node.chance) for node in path]
            steps += self._table.chances(path[-1].pair, self._doubt)[:1]
            prefix: tuple[int, ...] = ()
            value = 1.0
            for token, chance in steps[:max_depth]:
                parent, prefix, value = places[prefix], (*prefix, token), value * chance
                if prefix not in places:
                    if len(tokens) == max_nodes:
                        break
                    places[prefix] = len(tokens)
                    tokens.append(token)
                    parents.append(parent)
                    values.append(value)
        return heavy_first(tokens, parents, values, [source] * len(tokens))

    def _simulate(self, root: Visited) -> None:
        path = [root]
        while path[-1].children and len(path) <= self.SEARCH_DEPTH:
            path.append(self._select(path[-1]))
        leaf = path[-1]
        if leaf.children is None and len(path) <= self.SEARCH_DEPTH:
            leaf.children = [
                Visited(token, (leaf.pair[1], token), chance)
                for token, chance in self._table.chances(leaf.pair, self._doubt)
            ]
        reward = 1.0 + sum(node.chance for node in path[1:])
        reward += self._roll_out(leaf.pair, self.SEARCH_DEPTH + 1 - len(path))
        for node in path:
            node.num_visits += 1
            node.total += reward

    def _select(self, node: Visited) -> Visited:
        assert node.children
        explore = self.EXPLORE + log((node.num_visits + self.EXPLORE_GROWTH + 1) / self.EXPLORE_GROWTH)
        breadth = explore * sqrt(node.num_visits)

        def worth(child: Visited) -> float:
            mean = child.total / child.num_visits if child.num_visits else 0.0
            return mean + breadth * child.chance / (1 + child.num_visits)

        return max(node.children, key=worth)

    def _roll_out(self, pair: Pair, num_steps: int) -> float:
        """Sum of weights along a random continuation."""
        reward = 0.0
        for _ in range(num_steps):
            chances = self._table.chances(pair, self._doubt)
            if not chances:
                break
            token, chance = self._generator.choices(chances, [chance for _, chance in chances])[0]
            reward += chance
            pair = (pair[1], token)
        return reward

    def _paths(self, node: Visited, above: list[Visited]) -> Iterable[list[Visited]]:
        """Of every visited node below, the nodes that lead to it."""
        for child in node.children or ():
            if child.num_visits:
                path = [*above, child]
                yield path
                yield from self._paths(child, path)
