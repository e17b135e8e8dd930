"""GOOSE: a long spine of tokens copied from the context, with short branches of recycled candidates along it.

Source: GOOSE, anisotropic speculation trees. Its budget split and confidence schedule are not confirmed: here
the most valuable nodes of both sources are taken, which grows the spine tree wherever copying is the better guess, and
a plain candidate tree where nothing matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.speculation.base import RequestView, drafters
from engine.speculation.grow import grow
from engine.speculation.host import check_bounds
from engine.speculation.ngram import NgramIndex, NgramOptions
from engine.speculation.token_recycling import CandidateTable, Recycler, RecyclingState, TokenRecyclingOptions
from engine.speculation.tree import DraftTree


@dataclass(frozen=True, slots=True)
class GooseOptions:
    """Of prompt lookup and of Token Recycling; see there."""

    num_nodes: int = 60
    spine_tokens: int = 16
    max_depth: int = 16
    min_value: float = 0.01  # nodes less likely than this to be accepted are not drafted
    min_match: int = 2
    max_match: int = 4
    doubt: float = 2.0
    num_candidates: int = 8
    first: float = 0.4
    decay: float = 2.0
    learn_prompt: int = 1
    max_tokens: int = 65536
    max_scopes: int = 8

    def __post_init__(self) -> None:
        check_bounds("goose", self, num_nodes=(1, 1024), spine_tokens=(1, 1024), max_depth=(1, 1024))
        check_bounds("goose", self, min_value=(0.0, 1.0))
        _ = self.lookup, self.recycling  # whose bounds hold too

    @property
    def lookup(self) -> NgramOptions:
        return NgramOptions(self.min_match, self.max_match, self.spine_tokens, self.doubt)

    @property
    def recycling(self) -> TokenRecyclingOptions:
        return TokenRecyclingOptions(
            num_candidates=self.num_candidates,
            first=self.first,
            decay=self.decay,
            learn_prompt=self.learn_prompt,
            max_tokens=self.max_tokens,
            max_scopes=self.max_scopes,
        )


@dataclass(slots=True)
class GooseState(RecyclingState):
    index: NgramIndex | None = None


Tip = tuple[int, int]  # a node's token, and how many tokens of the spine lead to it; -1 beside the spine


@drafters.register("goose")
class Goose(Recycler):
    """One tree of two sources, which cover for each other: copied text, and what usually follows a token."""

    name = "goose"

    def __init__(self, **options: Any) -> None:
        """Keyword arguments are those of GooseOptions. Raises ConfigError for a value out of bounds."""
        self.options = chosen = GooseOptions(**options)
        super().__init__(chosen.num_candidates, chosen.max_tokens, chosen.max_scopes, bool(chosen.learn_prompt))
        self._lookup = chosen.lookup
        self._rates = chosen.recycling.rates

    def _start(self, prompt: Sequence[int]) -> GooseState:
        state = super()._start(prompt)
        index = NgramIndex(self._lookup, {})
        index.read(prompt, 0)
        return GooseState(state.last, prompt=state.prompt, index=index)

    def _read(self, state: RecyclingState, view: RequestView, start: int) -> None:
        super()._read(state, view, start)
        _index(state).read(view.token_ids, start)

    def _guess(self, state: RecyclingState, view: RequestView, max_nodes: int, max_depth: int) -> DraftTree:
        options, index = self.options, _index(state)
        agreeing, place = index.match(view.token_ids)
        spine = index.continuation(view.token_ids, place, options.spine_tokens) if agreeing else []
        table = self._table(state, view)

        def children(tip: Tip) -> Iterator[tuple[int, float, Tip]]:
            return self._children(tip, spine, agreeing, table)

        return grow(
            (view.token_ids[-1], 0),
            children,
            source=self.name,
            max_nodes=min(max_nodes, options.num_nodes),
            max_depth=min(max_depth, options.max_depth),
            min_value=options.min_value,
        )

    def _children(
        self, tip: Tip, spine: Sequence[int], agreeing: int, table: CandidateTable
    ) -> Iterator[tuple[int, float, Tip]]:
        """The spine's next token and the recycled candidates, the likeliest first. A candidate that is the spine's
        token confirms it; the others share what the spine leaves."""
        token, position = tip
        candidates = table.candidates(token)
        if not 0 <= position < len(spine):
            for candidate, chance in zip(candidates, self._rates, strict=False):
                yield candidate, chance, (candidate, -1)
            return
        copied, matched = spine[position], agreeing + position
        rate = matched / (matched + self.options.doubt)
        others = []
        for candidate, chance in zip(candidates, self._rates, strict=False):
            if candidate == copied:
                rate = 1.0 - (1.0 - rate) * (1.0 - chance)
            else:
                others.append((candidate, chance))
        children = [(candidate, chance * (1.0 - rate), (candidate, -1)) for candidate, chance in others]
        children.append((copied, rate, (copied, position + 1)))
        children.sort(key=lambda child: -child[1])
        yield from children

    @property
    def state_bytes(self) -> int:
        indexes = sum(_index(request.state).num_bytes for request in self._requests.values())
        return super().state_bytes + indexes


def _index(state: RecyclingState) -> NgramIndex:
    assert isinstance(state, GooseState)
    assert state.index is not None
    return state.index
