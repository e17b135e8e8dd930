"""Suffix decoding: follow what most often followed the longest text that ends here, in the request and recent outputs.

Source: Oliaro et al. 2024, "SuffixDecoding", arXiv:2411.04975. Differs: indexes of short runs answer what the suffix
trees would (`occurrences.py`), over the most recent `max_hits` occurrences; a count is trusted less where fewer tokens
agree, for which the budget is larger (`factor` is 1 in the paper); outputs are shared within a tenant and adapter only,
and the oldest leave when their bytes exceed a cap.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.speculation.base import RequestView, drafters
from engine.speculation.grow import grow
from engine.speculation.host import HostDrafter, check_bounds
from engine.speculation.occurrences import Hit, Occurrences
from engine.speculation.tree import EMPTY, DraftTree

MIB = 1 << 20
OWN = 0  # number of the only sequence in a request's index

Places = list[tuple[list[int], int]]  # occurrences that agree so far: tokens, and the index of the next one


@dataclass(frozen=True, slots=True)
class SuffixOptions:
    """After a match of m tokens at most factor * m + offset tokens are drafted, and `max_tokens` in any case."""

    max_match: int = 24  # longest match
    min_match: int = 1  # shortest match
    long_match: int = 3  # length of the second index, for matches that hide among many short ones
    factor: float = 2.0
    offset: float = 0.0
    doubt: float = 2.0  # added to counts, divided by the number of tokens that agree
    min_probability: float = 0.1  # nodes less likely than this to be accepted are not drafted
    max_tokens: int = 16
    branches: int = 4  # children of a node at most; 1 drafts chains
    max_hits: int = 16  # most recent occurrences of a run that are counted
    shared_mib: float = 64.0  # memory for recent outputs, of all tenants together; 0 looks at the request alone

    def __post_init__(self) -> None:
        check_bounds("suffix", self, min_match=(1, 16), long_match=(self.min_match, 64))
        check_bounds("suffix", self, max_match=(self.long_match, 256), factor=(0.0, 100.0), offset=(-100.0, 100.0))
        check_bounds(
            "suffix", self, doubt=(0.0, 100.0), min_probability=(0.0, 1.0), max_tokens=(1, 1024), branches=(1, 64)
        )
        check_bounds("suffix", self, branches=(1, 64), max_hits=(1, 4096), shared_mib=(0.0, 65536.0))


class RecentOutputs:
    """Outputs of the server, old and running, by tenant and adapter. Beyond the cap the oldest are forgotten, first
    those of the scope that holds most, so that a busy tenant does not push out the others."""

    def __init__(self, options: SuffixOptions) -> None:
        self._options = options
        self._scopes: dict[tuple[str, str], Occurrences] = {}
        self._sequences: dict[tuple[str, str], OrderedDict[int, None]] = {}  # of each scope, the oldest first
        self._next = 0
        self.num_bytes = 0

    def begin(self) -> int:
        """The number of a new output."""
        self._next += 1
        return self._next

    def append(self, scope: tuple[str, str], sequence: int, tokens: Sequence[int]) -> None:
        index = self._scopes.get(scope)
        if index is None:
            index = self._scopes[scope] = _new_index(self._options)
            self._sequences[scope] = OrderedDict()
        self.num_bytes -= index.num_bytes
        index.append(sequence, tokens)
        self.num_bytes += index.num_bytes
        self._sequences[scope][sequence] = None
        while self.num_bytes > self._options.shared_mib * MIB:
            self._evict(max(self._scopes, key=lambda scope: self._scopes[scope].num_bytes))

    def find(self, scope: tuple[str, str], text: Sequence[int], besides: int) -> list[Hit]:
        index = self._scopes.get(scope)
        return index.find(text, besides) if index else []

    def contains(self, scope: tuple[str, str], sequence: int) -> bool:
        return sequence in self._sequences.get(scope, ())

    def forget(self, tenant: str) -> None:
        for scope in [scope for scope in self._scopes if scope[0] == tenant]:
            self._drop_scope(scope)

    def _evict(self, scope: tuple[str, str]) -> None:
        index, sequences = self._scopes[scope], self._sequences[scope]
        oldest, _ = sequences.popitem(last=False)
        self.num_bytes -= index.num_bytes
        index.remove(oldest)
        self.num_bytes += index.num_bytes
        if not sequences:
            self._drop_scope(scope)

    def _drop_scope(self, scope: tuple[str, str]) -> None:
        self.num_bytes -= self._scopes.pop(scope).num_bytes
        del self._sequences[scope]


@dataclass(slots=True)
class SuffixState:
    own: Occurrences  # in prompt and output
    scope: tuple[str, str] | None = None  # tenant and adapter, once known
    sequence: int = 0  # number among the recent outputs


@drafters.register("suffix")
class Suffix(HostDrafter[SuffixState]):
    """Trees of variable size. The value of a node is the product of count(node) / (count(parent) + doubt / agreeing
    tokens) along its path: the paper's relative counts, but the fewer tokens agree the less a count is trusted."""

    name = "suffix"

    def __init__(self, **options: Any) -> None:
        """Keyword arguments are those of SuffixOptions. Raises ConfigError for a value out of bounds."""
        super().__init__()
        self.options = SuffixOptions(**options)
        self._shared = RecentOutputs(self.options)

    def _start(self, prompt: Sequence[int]) -> SuffixState:
        state = SuffixState(_new_index(self.options))
        state.own.append(OWN, prompt)
        return state

    def _read(self, state: SuffixState, view: RequestView, start: int) -> None:
        tokens = list(view.token_ids[start:])
        state.own.append(OWN, tokens)
        state.scope = (view.tenant, view.adapter)
        self._share(state, tokens[max(0, view.num_prompt_tokens - start) :])

    def _share(self, state: SuffixState, tokens: Sequence[int]) -> None:
        if state.scope is None or not tokens or not self.options.shared_mib:
            return
        if not self._shared.contains(state.scope, state.sequence):  # not begun, or evicted since
            state.sequence = self._shared.begin()
        self._shared.append(state.scope, state.sequence, tokens)

    def _finish(self, state: SuffixState, unread: Sequence[int]) -> None:
        self._share(state, unread)

    def _guess(self, state: SuffixState, view: RequestView, max_nodes: int, max_depth: int) -> DraftTree:
        text = list(view.token_ids[-self.options.max_match :])
        max_nodes = min(max_nodes, self.options.max_tokens)
        best, best_score = self._best(state.own.find(text), max_nodes, max_depth)
        if best_score < max_nodes:
            scope = (view.tenant, view.adapter)
            shared, score = self._best(self._shared.find(scope, text, state.sequence), max_nodes, max_depth)
            if score > best_score:
                return shared
        return best

    def _best(self, hits: Sequence[Hit], max_nodes: int, max_depth: int) -> tuple[DraftTree, float]:
        """The tree with the greatest expected number of accepted tokens, over all lengths of the match; and that
        number. `hits` are ordered by length, the longest first."""
        options = self.options
        best, best_score = EMPTY, 0.0
        places: Places = []
        for rank, hit in enumerate(hits):
            places.append((hit.tokens, hit.end))
            if rank + 1 < len(hits) and hits[rank + 1].length == hit.length:
                continue
            # of matches with the same occurrences only the longest counts: its budget and its values are the greatest
            budget = min(max_nodes, int(options.factor * hit.length + options.offset))
            if best_possible(len(places), hit.length, budget, options.doubt) <= best_score:
                continue
            tree = grow(
                (places, hit.length),
                self._children,
                source=self.name,
                max_nodes=budget,
                max_depth=max_depth,
                min_value=options.min_probability,
            )
            score = sum(tree.values)
            if score > best_score:
                best, best_score = tree, score
        return best, best_score

    def _children(self, branch: tuple[Places, int]) -> Iterator[tuple[int, float, tuple[Places, int]]]:
        """What followed the places, behind a text that agrees with so many tokens; the most frequent first."""
        places, agreeing = branch
        total = len(places) + self.options.doubt / agreeing
        if len(places) == 1:
            ((tokens, place),) = places
            if place < len(tokens):
                yield tokens[place], 1 / total, ([(tokens, place + 1)], agreeing + 1)
            return
        followers: dict[int, Places] = {}
        for tokens, place in places:
            if place < len(tokens):
                followers.setdefault(tokens[place], []).append((tokens, place + 1))
        # stable: of equally frequent ones the longer and more recent match leads
        ranked = sorted(followers.items(), key=lambda item: -len(item[1]))
        for token, found in ranked[: self.options.branches]:
            yield token, len(found) / total, (found, agreeing + 1)

    def forget(self, tenant: str) -> None:
        """Wipe a tenant's outputs."""
        self._shared.forget(tenant)

    @property
    def state_bytes(self) -> int:
        return self._shared.num_bytes + sum(request.state.own.num_bytes for request in self._requests.values())


def best_possible(num_places: int, agreeing: int, budget: int, doubt: float) -> float:
    """The score of a tree if all of so many places went on alike: no match as long as this has a better one."""
    value, score = 1.0, 0.0
    for matched in range(agreeing, agreeing + budget):
        value *= num_places / (num_places + doubt / matched)
        score += value
    return score


def _new_index(options: SuffixOptions) -> Occurrences:
    return Occurrences((options.min_match, options.long_match), options.max_hits)
