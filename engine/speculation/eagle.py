"""A trained layer guesses the target's next hidden state from its last one: a chain, with the runners-up beside it.

Source: Li et al. 2024, "EAGLE", arXiv:2401.15077, and "EAGLE-2", arXiv:2406.16858. Differs: only the likeliest path is
continued, siblings are leaves, which cost no pass of the layer; and its context begins where the target's hidden states
were first seen, be it in the middle of the prompt: behind a prefix hit, or behind a step in which nobody looked.
Torch-free: tensors are behind `HeadRunner`. An entry of a context is a token's hidden state, and the token behind it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine import noise
from engine.speculation.base import RequestView, TapRows, Taps, drafters
from engine.speculation.draft_cache import DraftCache
from engine.speculation.grow import heavy_first
from engine.speculation.host import check_bounds
from engine.speculation.tree import EMPTY, DraftTree

GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in kernels.sampling
MAX_PENDING = 512  # hidden states kept for a request until it is guessed for; older ones are forgotten

Rows = NDArray[np.float32]  # [n, C]


class HeadPass(NamedTuple):
    """Entries to add to a context, and the chain to draft behind them."""

    token_ids: Sequence[int]  # of each entry
    hidden: Rows  # of each entry
    start: int  # index of the first
    block_ids: Sequence[int]  # with room for all entries and all drafted ones but the last
    temperature: float
    keys: Sequence[int | None]  # of the noise of each token; as many as tokens are wanted, at least one
    min_log_prob: float  # the chain ends with the token at which its log q falls below


class Candidates(NamedTuple):
    """Of one place: the token of the chain, then those that came closest, [k] each."""

    token_ids: Sequence[int]
    log_probs: Sequence[float]  # log q at the request's temperature (greedy: at 1)


class HeadRunner(Protocol):
    """The layer with a paged cache of its own. `engine.execution.eagle.runner` has the real one."""

    block_size: int
    num_blocks: int  # block 0 is padding
    max_len: int  # entries of one context

    def draft(self, passes: Sequence[HeadPass], count: int) -> list[list[Candidates]]:
        """Adds the entries, then drafts. Of each pass, `count` candidates for every place of its chain."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class EagleOptions:
    max_depth: int = 5  # tokens of the chain at most
    width: int = 3  # candidates of a place, the chain's among them
    min_value: float = 0.05  # what is less likely to be accepted is not guessed

    def __post_init__(self) -> None:
        check_bounds("eagle", self, max_depth=(1, 64), width=(1, 32), min_value=(0.0, 1.0))


@dataclass(slots=True)
class Context:
    """What is known of one request: entries [base, base + num_cached) are in the cache, `pending` follow.

    num_tokens  of the text
    base        place in the text of the first entry's hidden state
    """

    num_tokens: int
    base: int = 0
    num_cached: int = 0
    pending: list[Rows] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        return sum([len(rows) for rows in self.pending])

    @property
    def end(self) -> int:
        """Place in the text of the first token whose hidden state has not been seen."""
        return self.base + self.num_cached + self.num_pending

    def see(self, first: int, rows: Rows) -> None:
        """Hidden states of the text's tokens from place `first` on. Behind a gap, a new context begins."""
        if first > self.end:
            self.base, self.num_cached, self.pending = first, 0, []
        rows = rows[self.end - first :]
        if len(rows):
            self.pending.append(rows)
        if self.num_pending > MAX_PENDING:
            end, kept = self.end, np.concatenate(self.pending)[-MAX_PENDING:]
            self.base, self.num_cached, self.pending = end - len(kept), 0, [kept]

    def restart(self) -> None:
        """What was in the cache is gone."""
        self.base, self.num_cached = self.base + self.num_cached, 0


@drafters.register("eagle")
class Eagle:
    """A chain of the layer's choices, each with the best of the others beside it."""

    name = "eagle"
    needs = Taps(hidden_last=True)

    def __init__(self, **options: float) -> None:
        self.options = EagleOptions(**options)  # type: ignore[arg-type]
        self._contexts: dict[str, Context] = {}
        self._runner: HeadRunner | None = None
        self._cache: DraftCache | None = None

    def attach(self, runner: HeadRunner, cache: DraftCache) -> None:
        """The layer and the accounts of its cache, before anything is asked."""
        self._runner = runner
        self._cache = cache

    def admit(self, key: str, token_ids: Sequence[int], tenant: str) -> None:
        self.drop(key)
        self._contexts[key] = Context(len(token_ids), base=len(token_ids))

    def fork(self, key: str, child: str) -> None:
        """The child's own first step shows what it needs."""
        parent = self._contexts.get(key)
        self.drop(child)
        if parent is not None:
            self._contexts[child] = Context(parent.num_tokens, base=parent.num_tokens)

    def on_commit(
        self, key: str, tree: DraftTree, accepted: Sequence[int], new_tokens: Sequence[int], taps: TapRows
    ) -> None:
        context = self._contexts.get(key)
        if context is None:
            return
        root = context.num_tokens - 1
        context.num_tokens += len(new_tokens)
        if taps.hidden is None:
            return
        rows = taps.hidden[[0, *(node + 1 for node in accepted)]]
        if taps.hidden_before is not None and len(taps.hidden_before):
            rows = np.concatenate((taps.hidden_before, rows))
            root -= len(taps.hidden_before)
        if context.num_cached == 0 and not context.pending:
            context.base = root
        context.see(root, rows)

    def drop(self, key: str) -> None:
        self._contexts.pop(key, None)
        if self._cache is not None:
            self._cache.drop(key)

    @property
    def state_bytes(self) -> int:
        held = sum([rows.nbytes for context in self._contexts.values() for rows in context.pending])
        return held + (0 if self._runner is None else self._runner.num_bytes)

    def propose(self, views: Sequence[RequestView], caps: Sequence[int]) -> list[DraftTree]:
        runner, cache = self._runner, self._cache
        assert runner is not None, "drafter eagle has no head yet; attach one"
        assert cache is not None, "attached together"
        busy = {view.key for view in views}
        places, passes = [], []
        for place, (view, cap) in enumerate(zip(views, caps, strict=True)):
            todo = self._todo(runner, cache, view, min(cap, view.max_depth, self.options.max_depth), busy)
            if todo is not None:
                places.append(place)
                passes.append(todo)
        trees = [EMPTY] * len(views)
        if passes:
            drafts = runner.draft(passes, self.options.width)
            for place, levels in zip(places, drafts, strict=True):
                trees[place] = self._tree(levels, caps[place])
                context = self._contexts[views[place].key]
                context.num_cached += context.num_pending
                context.pending = []
                cache.get(views[place].key).num_tokens = context.num_cached
        return trees

    def _todo(
        self, runner: HeadRunner, cache: DraftCache, view: RequestView, depth: int, busy: Collection[str]
    ) -> HeadPass | None:
        """What of the context is not in the cache yet, and the keys of a chain. None where nothing can be guessed."""
        context, num_tokens = self._contexts.get(view.key), len(view.token_ids)
        if depth <= 0 or context is None or context.num_tokens != num_tokens:
            return None
        if not context.pending or context.end != num_tokens - 1:
            return None
        text = cache.get(view.key)
        if text.num_tokens < context.num_cached or context.num_cached + context.num_pending + depth > runner.max_len:
            context.restart()
        cache.cut(text, context.num_cached)
        num_entries = context.num_cached + context.num_pending
        depth = min(depth, runner.max_len - num_entries)
        while depth > 0 and not cache.reserve(text, text.main, num_entries + depth - 1, busy):
            depth -= 1
        if depth <= 0:
            return None
        first = context.base + context.num_cached + 1
        return HeadPass(
            token_ids=view.token_ids[first:num_tokens],
            hidden=context.pending[0] if len(context.pending) == 1 else np.concatenate(context.pending),
            start=context.num_cached,
            block_ids=text.main.block_ids,
            temperature=view.temperature,
            keys=_keys(view, depth),
            min_log_prob=math.log(self.options.min_value) if self.options.min_value > 0.0 else -math.inf,
        )

    def _tree(self, levels: Sequence[Candidates], max_nodes: int) -> DraftTree:
        """The most valuable of the candidates. A value never rises along the chain, so parents are among them."""
        found: list[tuple[float, int, int]] = []  # value, depth, token; the chain's own token first of its depth
        above = 1.0
        for depth, level in enumerate(levels):
            values = [min(1.0, math.exp(log_prob)) * above for log_prob in level.log_probs]
            found += [(value, depth, token) for value, token in zip(values, level.token_ids, strict=True)]
            above = values[0]
        width = len(levels[0].token_ids)
        worth = [i for i, (value, _, _) in enumerate(found) if value >= self.options.min_value or i % width == 0]
        best = sorted(sorted(worth, key=lambda i: (-found[i][0], i))[:max_nodes])
        nodes: dict[int, int] = {}  # the chain's node of each depth
        tokens: list[int] = []
        parents: list[int] = []
        kept: list[float] = []
        for i in best:
            value, depth, token = found[i]
            if depth > 0 and depth - 1 not in nodes:
                continue  # the chain was cut above, among equals
            if i % width == 0:
                nodes[depth] = len(tokens)
            tokens.append(token)
            parents.append(nodes[depth - 1] if depth > 0 else -1)
            kept.append(value)
        return heavy_first(tokens, parents, kept, (self.name,) * len(tokens))


def _keys(view: RequestView, depth: int) -> list[int | None]:
    """The target's own noise for the places behind the root's next one."""
    if view.temperature < GREEDY_BELOW:
        return [None] * depth
    first = len(view.token_ids) - view.num_prompt_tokens
    return [noise.row_key(view.seed, view.choice, first + place) for place in range(depth)]
