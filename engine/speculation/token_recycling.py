"""Token Recycling: remember the best candidates seen behind every token, and grow them into a tree of fixed shape.

Source: Luo et al. 2024, "Turning Trash into Treasure", arXiv:2408.08696. Differs: the template is made from assumed
acceptance by rank (the paper's own shape is not reproduced); the table also learns which token followed which in
prompts; tables are kept per tenant and adapter, and forget the longest unused tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from engine.speculation.base import RequestView, TapRows, Taps, drafters
from engine.speculation.grow import grow, heavy_first
from engine.speculation.host import ENTRY_BYTES, INT_BYTES, HostDrafter, Scopes, check_bounds
from engine.speculation.tree import DraftTree

ROW_BYTES = ENTRY_BYTES + INT_BYTES + 88  # of a row, besides 4 for every candidate
HIGHEST_TOKEN = (1 << 31) - 1  # what a row can hold


@dataclass(frozen=True, slots=True)
class TokenRecyclingOptions:
    """The candidate of rank r = 1, 2, ... is taken to be accepted with probability first / r**decay: measured."""

    num_candidates: int = 8  # per token
    num_nodes: int = 80  # of the template
    max_depth: int = 6
    first: float = 0.4
    decay: float = 2.0
    learn_prompt: int = 1  # 0: rows of decoding steps alone, as in the paper
    max_tokens: int = 65536  # rows of a table
    max_scopes: int = 8  # tables: pairs of tenant and adapter

    def __post_init__(self) -> None:
        check_bounds("token_recycling", self, num_candidates=(1, 64), num_nodes=(1, 1024), max_depth=(1, 64))
        check_bounds("token_recycling", self, first=(0.0, 1.0), decay=(0.0, 10.0), learn_prompt=(0, 1))
        check_bounds("token_recycling", self, max_tokens=(1, 1 << 24), max_scopes=(1, 65536))

    @property
    def rates(self) -> tuple[float, ...]:
        """Assumed acceptance by rank; of all ranks together never more than certain."""
        raw = [self.first / (rank + 1) ** self.decay for rank in range(self.num_candidates)]
        scale = min(1.0, 1.0 / sum(raw)) if sum(raw) else 1.0
        return tuple(rate * scale for rate in raw)


class CandidateTable:
    """Token -> the tokens that are likeliest behind it, best first. The last writer wins."""

    def __init__(self, num_candidates: int, max_tokens: int) -> None:
        self._num_candidates = num_candidates
        self._max_tokens = max_tokens
        self._rows: dict[int, array[int]] = {}  # the longest unchanged first

    def candidates(self, token: int) -> Sequence[int]:
        return self._rows.get(token, ())

    def update(self, tokens: Sequence[int], topk_ids: Iterable[Sequence[int]]) -> None:
        """Overwrite the rows of `tokens` with the ids in the same place, without duplicates and padding."""
        for token, ids in zip(tokens, topk_ids, strict=False):
            distinct = dict.fromkeys(value for value in ids if 0 <= value <= HIGHEST_TOKEN)
            self._write(token, array("i", list(distinct)[: self._num_candidates]))

    def follow(self, tokens: Sequence[int]) -> None:
        """Put what followed each token first in its row."""
        for token, follower in pairwise(tokens):
            if 0 <= follower <= HIGHEST_TOKEN:
                row = self._rows.get(token)
                if row is None:
                    self._write(token, array("i", (follower,)))
                elif row[0] != follower:
                    kept = [other for other in row if other != follower][: self._num_candidates - 1]
                    self._write(token, array("i", [follower, *kept]))

    def _write(self, token: int, row: array[int]) -> None:
        if not row:
            return
        if self._rows.pop(token, None) is None and len(self._rows) >= self._max_tokens:
            del self._rows[next(iter(self._rows))]
        self._rows[token] = row

    @property
    def num_bytes(self) -> int:
        return len(self._rows) * (ROW_BYTES + 4 * self._num_candidates)


@dataclass(slots=True)
class RecyclingState:
    last: int | None  # the request's newest token, the root of the next step
    scope: tuple[str, str] | None = None
    prompt: tuple[int, ...] = ()  # until its tenant and adapter are known


class Recycler(HostDrafter[RecyclingState]):
    """Keeps candidate tables up to date with what the model's passes show."""

    def __init__(self, num_candidates: int, max_tokens: int, max_scopes: int, learn_prompt: bool) -> None:
        super().__init__()
        self.needs = Taps(topk=num_candidates)
        self._learn_prompt = learn_prompt
        self._tables = Scopes(lambda: CandidateTable(num_candidates, max_tokens), max_scopes)

    def _start(self, prompt: Sequence[int]) -> RecyclingState:
        return RecyclingState(prompt[-1] if prompt else None, prompt=tuple(prompt) if self._learn_prompt else ())

    def _read(self, state: RecyclingState, view: RequestView, start: int) -> None:
        state.last = view.token_ids[-1]

    def _table(self, state: RecyclingState, view: RequestView) -> CandidateTable:
        """The view's table, which now knows the request's prompt."""
        state.scope = (view.tenant, view.adapter)
        table = self._tables.get(*state.scope)
        if state.prompt:
            table.follow(state.prompt)
            state.prompt = ()
        return table

    def on_commit(
        self, key: str, tree: DraftTree, accepted: Sequence[int], new_tokens: Sequence[int], taps: TapRows
    ) -> None:
        super().on_commit(key, tree, accepted, new_tokens, taps)
        request = self._requests.get(key)
        if request is None:
            return
        state = request.state
        if taps.topk_ids is not None and state.scope is not None and state.last is not None:
            # of a token that the tree holds twice the earlier row wins: it stands on the likelier path
            rows = (state.last, *tree.tokens)
            self._tables.get(*state.scope).update(rows[::-1], taps.topk_ids[: len(rows)][::-1].tolist())
        if new_tokens:
            state.last = new_tokens[-1]

    def forget(self, tenant: str) -> None:
        """Wipe what a tenant's requests have taught."""
        self._tables.forget(tenant)

    @property
    def state_bytes(self) -> int:
        waiting = sum(8 * len(request.state.prompt) for request in self._requests.values())
        return self._tables.num_bytes + waiting


@drafters.register("token_recycling")
class TokenRecycling(Recycler):
    """Guesses at every step, also in text that nothing like it was seen before. A start-up prompt warms it."""

    name = "token_recycling"

    def __init__(self, **options: Any) -> None:
        """Keyword arguments are those of TokenRecyclingOptions. Raises ConfigError for a value out of bounds."""
        self.options = chosen = TokenRecyclingOptions(**options)
        super().__init__(chosen.num_candidates, chosen.max_tokens, chosen.max_scopes, bool(chosen.learn_prompt))
        self._template = template(chosen.rates, chosen.num_nodes, chosen.max_depth)

    def _guess(self, state: RecyclingState, view: RequestView, max_nodes: int, max_depth: int) -> DraftTree:
        table = self._table(state, view)
        tokens: list[int] = []
        parents: list[int] = []
        values: list[float] = []
        # of the root and each node of the template: its place in the tree and candidates; None where the table ends
        filled: list[tuple[int, Sequence[int]] | None] = [(-1, table.candidates(view.token_ids[-1]))]
        for node in self._template:
            above = filled[node.parent + 1]
            if above is None or node.depth > max_depth or node.rank >= len(above[1]) or len(tokens) == max_nodes:
                filled.append(None)
                continue
            token = above[1][node.rank]
            filled.append((len(tokens), table.candidates(token)))
            tokens.append(token)
            parents.append(above[0])
            values.append(node.value)
        return heavy_first(tokens, parents, values, [self.name] * len(tokens))


@dataclass(frozen=True, slots=True)
class TemplateNode:
    parent: int  # index in the template, -1 for the root
    rank: int  # among its parent's candidates
    depth: int
    value: float


def template(rates: Sequence[float], num_nodes: int, max_depth: int) -> tuple[TemplateNode, ...]:
    """The `num_nodes` nodes with the greatest product of rates along their path, the most valuable first."""

    def ranks(_: None) -> Iterator[tuple[int, float, None]]:
        return ((rank, rate, None) for rank, rate in enumerate(rates) if rate > 0.0)

    tree = grow(None, ranks, source="", max_nodes=num_nodes, max_depth=max_depth)
    order = sorted(range(len(tree)), key=lambda node: -tree.values[node])  # stable: parents stay first
    places = {-1: -1, **{node: place for place, node in enumerate(order)}}
    depths = tree.depths
    return tuple(
        TemplateNode(places[tree.parents[node]], tree.tokens[node], depths[node], tree.values[node]) for node in order
    )
