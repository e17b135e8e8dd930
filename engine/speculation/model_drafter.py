"""What drafters share that guess with a small language model: its cache, its passes level by level, noise and trees.

A drafter of this kind only says how its tree grows (`Growth`). Torch-free: tensors are behind `DraftRunner`.

Two ways to draw. Where the walk verifies, any distinct tokens will do, and the best are those that the target itself is
about to draw: the drafter adds the target's own noise (keyed by seed and place) to its log-probabilities and takes the
top. Where a rule asks for q, tokens are drawn with noise of their own, and rows of q go along with the tree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from engine import noise
from engine.speculation.base import RequestView, TapRows, Taps
from engine.speculation.draft_cache import Branch, CachedText, DraftCache
from engine.speculation.draft_rows import DraftRunner, Draw, Pick, RowPass
from engine.speculation.grow import heavy_first
from engine.speculation.tree import EMPTY, DraftTree, Kind

GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in kernels.sampling


@dataclass(slots=True)
class Level:
    """What the model says after one open node: one pick per draw that the growth has asked for there."""

    node: int
    picks: list[Pick]


@dataclass
class Growth(ABC):
    """The tree of one request while it grows. Subclasses add nodes and say after which of them to ask the model.

    Whether a node is added may depend on everything above it and on how many there are, but never on the token that is
    drawn for it: `swor` and `iid` drafts would not be distributed as q any more.
    """

    view: RequestView
    source: str
    max_nodes: int
    max_depth: int
    kind: Kind = "delta"
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    q: dict[int, np.ndarray] = field(default_factory=dict)
    num_draws: int = 0  # so far: numbers the noise of sampled drafts

    @property
    def is_sampled(self) -> bool:
        return self.kind != "delta"

    @property
    def num_left(self) -> int:
        return self.max_nodes - len(self.tokens)

    @property
    def num_candidates(self) -> int:
        """Tokens that a pick needs to have."""
        return 1

    def draws_after(self, node: int) -> int:
        """Independent draws after an open node."""
        return 1

    @abstractmethod
    def grow(self, level: Sequence[Level]) -> list[int]:
        """Adds nodes below the open ones, which come in order. Returns the nodes that are open next, ascending."""

    def add(self, parent: int, token: int, value: float) -> int:
        """The new node. Siblings must come in the order in which they were drawn."""
        self.tokens.append(int(token))
        self.parents.append(parent)
        above = 1.0 if parent < 0 else self.values[parent]
        self.values.append(min(max(0.0, float(value)), above))
        self.depths.append(1 if parent < 0 else self.depths[parent] + 1)
        return len(self.tokens) - 1

    def depth(self, node: int) -> int:
        return 0 if node < 0 else self.depths[node]

    def value(self, node: int) -> float:
        return 1.0 if node < 0 else self.values[node]

    def key(self, node: int, draw: int) -> int | None:
        """Of the noise of one draw after a node."""
        view = self.view
        if view.temperature < GREEDY_BELOW:
            return None
        output_index = len(view.token_ids) - view.num_prompt_tokens
        if not self.is_sampled and draw == 0:
            return self.key_at(self.depth(node))
        self.num_draws += 1
        step = noise.row_key(view.seed, view.choice, output_index, noise.Purpose.DRAFT)
        return noise.subkey(step, self.num_draws)

    def keys(self, count: int) -> Sequence[int | None]:
        """`key_at` of the first depths."""
        view = self.view
        if view.temperature < GREEDY_BELOW:
            return (None,) * count
        return noise.row_keys(view.seed, view.choice, len(view.token_ids) - view.num_prompt_tokens, count)

    def key_at(self, depth: int) -> int | None:
        """Of the target's own noise for the token `depth` places behind the root's next one."""
        view = self.view
        if view.temperature < GREEDY_BELOW:
            return None
        return noise.row_key(view.seed, view.choice, len(view.token_ids) - view.num_prompt_tokens + depth)

    def tree(self) -> DraftTree:
        sources = (self.source,) * len(self.tokens)
        if not self.tokens:
            return EMPTY
        if not self.is_sampled:
            return heavy_first(self.tokens, self.parents, self.values, sources)
        tree = DraftTree(tuple(self.tokens), tuple(self.parents), tuple(self.values), sources)
        order = _depth_first(tree)
        places = {-1: -1, **{node: place for place, node in enumerate(order)}}
        parents = tuple(places[tree.parents[node]] for node in order)
        rows = np.zeros((max(parents) + 2, len(next(iter(self.q.values())))), dtype=np.float32)
        for node in {tree.parents[node] for node in order}:
            rows[places[node] + 1] = self.q[node]
        return DraftTree(
            tokens=tuple(tree.tokens[node] for node in order),
            parents=parents,
            values=tuple(tree.values[node] for node in order),
            sources=sources,
            kind=self.kind,
            q=rows,
        )


@dataclass(slots=True)
class Job:
    """One request during a `propose`."""

    place: int
    growth: Growth
    text: CachedText
    open: list[int]
    branches: dict[int, Branch]  # of the nodes whose path is in the cache and not continued yet


class ModelDrafter(ABC):
    """A drafter on a small language model. `attach` gives it the model, before anything is asked of it."""

    name: str
    needs: Taps = Taps()
    kind: ClassVar[Kind] = "swor"  # of its drafts, where a rule that uses q verifies them
    verifier: ClassVar[str] = "rrs"  # the rule that accepts most of them

    def __init__(self) -> None:
        self._runner: DraftRunner | None = None
        self._cache: DraftCache | None = None

    def attach(self, runner: DraftRunner, cache: DraftCache) -> None:
        """The model and the accounts of its cache, which several drafters may share."""
        self._runner = runner
        self._cache = cache

    @abstractmethod
    def start(self, view: RequestView, max_nodes: int, max_depth: int, kind: Kind) -> Growth:
        """An empty tree of at most so many nodes, both numbers at least 1."""

    def admit(self, key: str, token_ids: Sequence[int], tenant: str) -> None:
        """Forgets a request of that name. The prompt is computed when it is first guessed for."""
        self.drop(key)

    def fork(self, key: str, child: str) -> None:
        """As `admit`."""
        self.drop(child)

    def propose(self, views: Sequence[RequestView], caps: Sequence[int]) -> list[DraftTree]:
        runner, cache = self._parts()
        busy = {self._key(view.key) for view in views}
        jobs, passes = [], []
        for place, (view, cap) in enumerate(zip(views, caps, strict=True)):
            max_depth = min(view.max_depth, runner.max_len - len(view.token_ids))
            if cap <= 0 or max_depth <= 0:
                continue
            text = cache.get(self._key(view.key))
            todo = _catch_up(cache, text, view, busy)
            if todo is None:
                continue
            kind: Kind = self.kind if view.samples and view.temperature >= GREEDY_BELOW else "delta"
            growth = self.start(view, cap, max_depth, kind)
            passes.append(todo)
            jobs.append(Job(place, growth, text, [-1], {-1: text.main}))
        trees = [EMPTY] * len(views)
        if jobs:
            self._draft(runner, cache, jobs, passes, busy)
            for job in jobs:
                trees[job.place] = job.growth.tree()
        return trees

    def on_commit(
        self, key: str, tree: DraftTree, accepted: Sequence[int], new_tokens: Sequence[int], taps: TapRows
    ) -> None:
        text = None if self._cache is None else self._cache.find(self._key(key))
        if text is not None and self._cache is not None:
            self._cache.settle(text, new_tokens)

    def drop(self, key: str) -> None:
        if self._cache is not None:
            self._cache.drop(self._key(key))

    @property
    def state_bytes(self) -> int:
        return 0 if self._runner is None else self._runner.num_bytes

    def _key(self, key: str) -> str:
        return f"{self.name}:{key}"

    def _parts(self) -> tuple[DraftRunner, DraftCache]:
        assert self._runner is not None, f"drafter {self.name} has no model yet; attach one"
        assert self._cache is not None, "attached together"
        return self._runner, self._cache

    def _draft(
        self, runner: DraftRunner, cache: DraftCache, jobs: list[Job], passes: list[RowPass], busy: Collection[str]
    ) -> None:
        """Computes what is missing of the texts, one pass each, and grows the trees: level by level, all at once."""
        logits = runner.compute(passes)
        for job in jobs:
            job.text.num_tokens = len(job.growth.view.token_ids)
        while True:
            _ask(runner, jobs, logits)
            passes = []
            copies: list[tuple[int, int]] = []
            for job in jobs:
                _open_branches(cache, job, busy, passes, copies)
            jobs = [job for job in jobs if job.open]
            if not jobs:
                return
            logits = runner.compute(passes, copies)


def _catch_up(cache: DraftCache, text: CachedText, view: RequestView, busy: Collection[str]) -> RowPass | None:
    """What of the text is not in the cache yet, its last token in any case; None when there is no room for it."""
    num_tokens = len(view.token_ids)
    cache.settle(text, view.token_ids[text.num_tokens :])
    cache.cut(text, num_tokens - 1)
    if not cache.reserve(text, text.main, num_tokens, busy):
        return None
    return RowPass(view.token_ids[text.num_tokens :], text.num_tokens, text.main.block_ids)


def _ask(runner: DraftRunner, jobs: Sequence[Job], logits: Any) -> None:
    """One pick for every draw of every open node, handed to the growths, which open the next level."""
    draws, laws = [], []
    counts: list[list[int]] = []
    row = 0
    for job in jobs:
        growth = job.growth
        counts.append([growth.draws_after(node) for node in job.open])
        for node, count in zip(job.open, counts[-1], strict=True):
            temperature = growth.view.temperature
            draws += [Draw(row, temperature, growth.key(node, draw)) for draw in range(count)]
            if growth.is_sampled:
                laws.append((growth, node, Draw(row, temperature, None)))
            row += 1
    found = iter(runner.pick(logits, draws, max(job.growth.num_candidates for job in jobs)))
    if laws:
        rows = runner.laws(logits, [draw for _, _, draw in laws])
        for (growth, node, _), q in zip(laws, rows, strict=True):
            growth.q[node] = q
    for job, numbers in zip(jobs, counts, strict=True):
        level = [
            Level(node, [next(found) for _ in range(count)]) for node, count in zip(job.open, numbers, strict=True)
        ]
        job.open = job.growth.grow(level)


def _open_branches(
    cache: DraftCache, job: Job, busy: Collection[str], passes: list[RowPass], copies: list[tuple[int, int]]
) -> None:
    """A path in the cache for every open node: the first one below a node continues the path there, others copy it.

    Nodes for which there is no room are not continued, whatever their tokens are.
    """
    growth, text = job.growth, job.text
    following: dict[int, list[int]] = {}
    for node in job.open:
        following.setdefault(growth.parents[node], []).append(node)
    found: dict[int, Branch] = {}
    for parent, nodes in following.items():
        branch = job.branches[parent]
        for node in nodes:
            own = branch
            if node != nodes[0]:
                pairs = cache.fork(text, branch, busy)
                if pairs is None:
                    continue
                copies += pairs
                own = text.others[-1]
            if cache.reserve(text, own, text.num_tokens + len(own.tokens) + 1, busy):
                found[node] = own
    job.open = [node for node in job.open if node in found]
    job.branches = found
    for node in job.open:
        own = found[node]
        passes.append(RowPass((growth.tokens[node],), text.num_tokens + len(own.tokens), own.block_ids))
        own.tokens.append(growth.tokens[node])


def _depth_first(tree: DraftTree) -> list[int]:
    """Nodes with all of a child's descendants before its next sibling, siblings as they are."""
    children = tree.children
    order: list[int] = []
    stack = list(reversed(children[0]))
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(children[node + 1]))
    return order
