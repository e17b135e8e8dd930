"""Drafts in a step: how many guessed tokens a decoding row may check, and what became of them. Integers only.

Drafts take what a step has left over, tokens and blocks. Nobody waits or gives way for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.scheduling.request import Request
from engine.speculation.base import TapRows
from engine.speculation.tree import EMPTY, DraftTree


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step gave to one request that speculates: for those who guess. Of steps that had neither a draft nor
    something to show, only a request's first is told; the others can be seen from its tokens.
    """

    request: Request
    draft: DraftTree | None  # as checked
    accepted: tuple[int, ...]  # nodes of it
    num_new_tokens: int
    taps: TapRows | None = None


@dataclass(slots=True)
class DraftCounters:
    """Over all requests. They only grow; see EngineStats."""

    num_steps: int = 0
    num_emitted: int = 0
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    reached_at_depth: list[int] = field(default_factory=list)
    accepted_at_depth: list[int] = field(default_factory=list)


def max_depth(request: Request) -> int:
    """How many tokens a path of a draft may have. The step adds one more, which is not guessed."""
    return max(0, min(request.family.max_tokens - request.num_output_tokens - 1, _until_compaction(request)))


def _until_compaction(request: Request) -> int:
    """Tokens that a draft may have because of the request's cache policy: a cache shrinks after an ordinary step, so no
    guess is read by, or reads, what would be gone or packed by then.
    """
    point = None if request.cache_plan is None else request.cache_plan.next_point(request.num_computed_tokens)
    return request.family.max_tokens if point is None else point - request.num_computed_tokens - 2


def fitting_draft(request: Request, max_nodes: int, max_model_len: int) -> DraftTree:
    """The draft of a row that lacks one token, cut to what may be checked."""
    speculating = request.speculating
    if speculating is None or not speculating.draft.tokens or not request.has_emitted:
        return EMPTY
    if request.cache_plan is not None and request.cache_plan.classes:
        return EMPTY  # what is left unpacked is summed up token by token
    # every node has a slot of its own, and rows end with the context
    max_nodes = min(max_nodes, max_model_len - request.num_tokens)
    draft, plan = speculating.draft, request.cache_plan
    if plan is not None and plan.steps_singly:
        draft = draft.first_path()
    return draft.within(max_nodes, max_depth(request))


def count_draft(
    request: Request, draft: DraftTree, accepted: Sequence[int], num_new_tokens: int, counters: DraftCounters
) -> None:
    """Adds what became of a draft to the request's numbers and to those of all. Tokens after an end are lost."""
    speculating = request.speculating
    assert speculating is not None, "only requests that speculate have drafts"
    accepted = accepted[:num_new_tokens]
    speculating.usage = None
    speculating.num_steps += 1
    counters.num_steps += 1
    counters.num_emitted += num_new_tokens
    for source, number in Counter(draft.sources).items():
        speculating.drafted[str(source)] += number
        counters.drafted[str(source)] += number
    for source, number in Counter([draft.sources[node] for node in accepted]).items():
        speculating.accepted[str(source)] += number
        counters.accepted[str(source)] += number
    deepest = min(max(draft.depths), len(accepted) + 1)
    missing = deepest - len(counters.reached_at_depth)
    counters.reached_at_depth += [0] * missing
    counters.accepted_at_depth += [0] * missing
    for depth in range(deepest):
        counters.reached_at_depth[depth] += 1
        counters.accepted_at_depth[depth] += depth < len(accepted)
