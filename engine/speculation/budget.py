"""How many nodes each request may have verified: what a whole batch gains by them, against what they cost.

Knows trees, values and seconds; no tokens and no model. `select` and `Load` are the arithmetic, `LoadAwareBudget` puts
cost table and calibration around it. A node is worth its row where it brings more tokens than the time it takes
would bring without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.speculation.tree import DraftTree

_FEW = 64  # nodes that are looked at one by one faster than with arrays

Counts = NDArray[np.int64]
Seconds = NDArray[np.float64]
Cost = Callable[[Counts], Seconds]


@dataclass(frozen=True, slots=True)
class Selection:
    """
    nodes  of each tree, ascending, every node's parent among them
    gain   expected tokens of the step, roots included
    rate   gain per second
    """

    nodes: tuple[tuple[int, ...], ...]
    gain: float
    rate: float

    @property
    def num_nodes(self) -> int:
        return sum(map(len, self.nodes))


@dataclass(frozen=True, slots=True)
class Load:
    """A step as it would be without drafts.

    num_decodes        requests that decode in it, each one row
    num_prompt_tokens  prompt tokens that wait for room in it
    max_rows           rows that a step may have
    """

    num_decodes: int
    num_prompt_tokens: int = 0
    max_rows: int = 1 << 30

    def num_prompt_rows(self, num_nodes: int) -> int:
        """Prompt tokens that still go along with so many drafted nodes."""
        return max(0, min(self.num_prompt_tokens, self.max_rows - self.num_decodes - num_nodes))


def select(
    trees: Sequence[Sequence[float]],
    weights: Sequence[float],
    cost: Cost,
    *,
    plain_cost: float,
    load: Load,
    max_nodes: int,
    base_gain: float | None = None,
    least_rate: float = 0.0,
) -> Selection:
    """The nodes that make the batch fastest.

    trees       P(reached and accepted) of every node of each request's draft, parents before children and no value
                above its parent's
    weights     what a token of each request is worth against the others
    cost        seconds of steps by their numbers of rows
    plain_cost  seconds of the step of `load.num_decodes` rows without drafts and prompts
    max_nodes   over all requests: what free cache blocks allow
    base_gain   what the step brings without these drafts; default: one token of each request
    least_rate  gain per second that could be had otherwise: nodes that bring less are left out

    Without waiting prompts this maximises gain / time over all connected sets of nodes: as values never rise along a
    path, the best set of n nodes is the n most valuable ones, and every n is looked at, because a cost with steps in it
    has several best places. The best rate of pure decoding then is the price of time in a step that has prompts too:
    what prompts would lose, in seconds of later steps, must be made up by tokens at that price.
    """
    sizes = [len(values) for values in trees]
    if sum(sizes) <= _FEW and load.num_prompt_tokens == 0:
        gain = sum(weights) if base_gain is None else base_gain
        return _select_few(trees, weights, cost, plain_cost, load, max_nodes, gain, least_rate)
    values = np.fromiter((value for tree in trees for value in tree), dtype=np.float64, count=sum(sizes))
    values *= np.repeat(np.asarray(weights, dtype=np.float64), sizes)
    most = max(0, min(len(values), max_nodes, load.max_rows - load.num_decodes))
    ranked = np.argsort(-values, kind="stable")[:most]  # among equals parents come first, as they do in a tree
    counts = np.arange(most + 1)
    gains = np.concatenate(([sum(weights) if base_gain is None else base_gain], values[ranked])).cumsum()
    times = cost(load.num_decodes + counts)
    times[0] = plain_cost
    best = int(np.argmax(gains / times))
    rate = max(float(gains[best] / times[best]), least_rate)
    if load.num_prompt_tokens > 0:
        times = _times_with_prompts(load, cost, counts)
    if load.num_prompt_tokens > 0 or rate == least_rate:
        best = int(np.argmax(gains - rate * times))
    owners = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.cumsum(sizes) - sizes
    kept = np.sort(ranked[:best])
    nodes: list[list[int]] = [[] for _ in sizes]
    for tree, node in zip(owners[kept].tolist(), (kept - starts[owners[kept]]).tolist(), strict=True):
        nodes[tree].append(node)
    return Selection(tuple(map(tuple, nodes)), float(gains[best]), float(gains[best] / times[best]))


def _select_few(
    trees: Sequence[Sequence[float]],
    weights: Sequence[float],
    cost: Cost,
    plain_cost: float,
    load: Load,
    max_nodes: int,
    base_gain: float,
    least_rate: float,
) -> Selection:
    """`select` without waiting prompts and without arrays, each of which costs as much as looking at a few nodes."""
    found = [
        (-value * weight, tree, node)
        for tree, (values, weight) in enumerate(zip(trees, weights, strict=True))
        for node, value in enumerate(values)
    ]
    found.sort()  # among equals parents come first, as they do in a tree
    del found[max(0, min(max_nodes, load.max_rows - load.num_decodes)) :]
    times = cost(np.arange(load.num_decodes, load.num_decodes + len(found) + 1)).tolist()
    times[0] = plain_cost
    gains = [base_gain]
    for value, _, _ in found:
        gains.append(gains[-1] - value)
    rates = [gain / seconds for gain, seconds in zip(gains, times, strict=True)]
    best = rates.index(max(rates))
    if rates[best] <= least_rate:
        excess = [gain - least_rate * seconds for gain, seconds in zip(gains, times, strict=True)]
        best = excess.index(max(excess))
    nodes: list[list[int]] = [[] for _ in trees]
    for _, tree, node in found[:best]:
        nodes[tree].append(node)
    return Selection(tuple([tuple(sorted(own)) for own in nodes]), gains[best], rates[best])


def _times_with_prompts(load: Load, cost: Cost, num_nodes: Counts) -> Seconds:
    """Seconds of the step, and of the later one that computes the prompt tokens that the nodes displace."""
    full = load.num_decodes + load.num_prompt_rows(0)
    prompt_rows = np.clip(load.max_rows - load.num_decodes - num_nodes, 0, load.num_prompt_tokens)
    displaced = load.num_prompt_rows(0) - prompt_rows
    each = float(cost(np.array([full]))[0]) / full
    times: Seconds = cost(load.num_decodes + num_nodes + prompt_rows) + displaced * each
    return times


def prune(tree: DraftTree, nodes: Sequence[int]) -> DraftTree:
    """The tree of the nodes that were selected. A sampled draft stays whole: who chooses by looking at a sampled token
    changes the distribution of those that are left."""
    return tree if tree.kind != "delta" or len(nodes) == len(tree) else tree.select(nodes)
