"""Toy targets and drafters given by tables, and chance that is enumerated instead of drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from engine.speculation.tree import DraftTree
from engine.speculation.verifiers.common import Chance, Law

T = TypeVar("T", bound=Hashable)


@dataclass
class _Script:
    """Chance that follows `choices` and then takes the first possible branch, noting the others."""

    choices: list[int]
    probability: float = 1.0
    num_used: int = 0
    open: list[list[int]] = field(default_factory=list)

    def flip(self, probability: float) -> bool:
        probability = min(1.0, max(0.0, probability))
        return self._branch([1.0 - probability, probability]) == 1

    def draw(self, weights: Law) -> int:
        return self._branch((weights / weights.sum()).tolist())

    def _branch(self, chances: Sequence[float]) -> int:
        possible = [branch for branch, chance in enumerate(chances) if chance > 0.0]
        if self.num_used < len(self.choices):
            branch = self.choices[self.num_used]
        else:
            branch = possible[0]
            self.open += [[*self.choices, other] for other in possible[1:]]
            self.choices = [*self.choices, branch]
        self.num_used += 1
        self.probability *= chances[branch]
        return branch


def enumerate_outcomes(run: Callable[[Chance], T]) -> dict[T, float]:
    """Exact law of what `run` returns, over every way in which its chances can fall."""
    found: defaultdict[T, float] = defaultdict(float)
    todo: list[list[int]] = [[]]
    while todo:
        script = _Script(todo.pop())
        found[run(script)] += script.probability
        todo += script.open
    return dict(found)


Context = tuple[int, ...]


class Table:
    """A language model: a random distribution for each context, the same for equal seeds."""

    def __init__(self, size: int, seed: int, noise: float = 0.0, base: Table | None = None) -> None:
        """base, noise: logits are those of `base` with Gaussian noise of that standard deviation."""
        self.size = size
        self._seed = seed
        self._noise = noise
        self._base = base
        self._logits: dict[Context, Law] = {}

    def logits(self, context: Context) -> Law:
        if context not in self._logits:
            rng = np.random.default_rng([self._seed, *(token + 1 for token in context)])
            drawn = rng.normal(size=self.size)
            self._logits[context] = drawn if self._base is None else self._base.logits(context) + self._noise * drawn
        return self._logits[context]

    def law(self, context: Context) -> Law:
        weights = np.exp(self.logits(context) - self.logits(context).max())
        return weights / weights.sum()


class Nucleus(Table):
    """A table after temperature and top-p: some tokens have no mass at all."""

    def __init__(self, base: Table, temperature: float, top_p: float) -> None:
        super().__init__(base.size, 0)
        self._inner, self._temperature, self._top_p = base, temperature, top_p
        self._laws: dict[Context, Law] = {}

    def law(self, context: Context) -> Law:
        if context not in self._laws:
            z = self._inner.logits(context) / self._temperature
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]
            kept = np.zeros(self.size)
            kept[order[before < self._top_p]] = p[order[before < self._top_p]]
            self._laws[context] = kept / kept.sum()
        return self._laws[context]


def context_of(tree: DraftTree, node: int) -> Context:
    return tuple(tree.tokens[other] for other in tree.path(node))


def sampled_tree(draft: Table, prefix: Context, branching: Sequence[int], chance: Chance, kind: str) -> DraftTree:
    """branching[d] children of every node at depth d, drawn with (iid) or without (swor) replacement."""
    tokens: list[int] = []
    parents: list[int] = []
    q_rows: dict[int, Law] = {}
    level = [(-1, prefix)]
    for count in branching:
        following = []
        for node, context in level:
            q_rows[node] = draft.law(context)
            left = q_rows[node].copy()
            for _ in range(count):
                if left.sum() <= 0.0:
                    break
                token = chance.draw(left)
                if kind == "swor":
                    left[token] = 0.0
                following.append((len(tokens), (*context, token)))
                tokens.append(token)
                parents.append(node)
        level = following
    return with_rows(tokens, parents, q_rows, draft.size, kind)


def sampled_chains(draft: Table, prefix: Context, num_chains: int, depth: int, chance: Chance) -> DraftTree:
    """Independent chains that meet in the root only."""
    tokens: list[int] = []
    parents: list[int] = []
    q_rows: dict[int, Law] = {}
    for _ in range(num_chains):
        node, context = -1, prefix
        for _ in range(depth):
            q_rows[node] = draft.law(context)
            token = chance.draw(q_rows[node])
            tokens.append(token)
            parents.append(node)
            node, context = len(tokens) - 1, (*context, token)
    return with_rows(tokens, parents, q_rows, draft.size, "iid")


def with_rows(tokens: Sequence[int], parents: Sequence[int], q_rows: dict[int, Law], size: int, kind: str) -> DraftTree:
    rows = np.zeros((len(tokens) + 1, size))
    for node, row in q_rows.items():
        rows[node + 1] = row
    count = len(tokens)
    return DraftTree(
        tuple(tokens),
        tuple(parents),
        (1.0,) * count,
        ("toy",) * count,
        kind=kind,
        q=rows,  # type: ignore[arg-type]
    )


def sequences(size: int, length: int) -> Iterator[Context]:
    for index in np.ndindex(*(size,) * length):
        yield tuple(int(i) for i in index)


def sequence_law(target: Table, length: int) -> dict[Context, float]:
    """Exact law of the target's next `length` tokens."""
    found = {}
    for sequence in sequences(target.size, length):
        chance = 1.0
        for depth, token in enumerate(sequence):
            chance *= target.law(sequence[:depth])[token]
        found[sequence] = float(chance)
    return found
