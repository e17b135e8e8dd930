"""Asking host drafters without an engine: views of made-up requests, and a step loop over a known text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.speculation.base import NO_TAPS, Drafter, RequestView, TapRows
from engine.speculation.tree import EMPTY, DraftTree


def view(
    token_ids: Sequence[int],
    num_prompt_tokens: int | None = None,
    *,
    key: str = "request",
    tenant: str = "",
    adapter: str = "",
    max_depth: int = 1 << 30,
) -> RequestView:
    """Without `num_prompt_tokens` all tokens are the prompt's."""
    num_prompt_tokens = len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
    return RequestView(key, token_ids, num_prompt_tokens, tenant=tenant, adapter=adapter, max_depth=max_depth)


def guess(drafter: Drafter, token_ids: Sequence[int], cap: int = 16, **fields: object) -> DraftTree:
    """The draft for a request of which the drafter may know nothing yet."""
    (tree,) = drafter.propose([view(token_ids, **fields)], [cap])  # type: ignore[arg-type]
    return tree


def finish(
    drafter: Drafter, prompt: Sequence[int], output: Sequence[int], *, key: str = "old", tenant: str = ""
) -> None:
    """A request that runs from its prompt to its end, with one guess asked for on the way."""
    drafter.admit(key, prompt, tenant)
    drafter.on_commit(key, EMPTY, (), output[:1], NO_TAPS)
    guess(drafter, [*prompt, *output[:1]], num_prompt_tokens=len(prompt), key=key, tenant=tenant)
    drafter.on_commit(key, EMPTY, (), output[1:], NO_TAPS)
    drafter.drop(key)


def candidates(rows: Sequence[Sequence[int]]) -> TapRows:
    return TapRows(topk_ids=np.array(rows, dtype=np.int32))


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    """Token paths from the root to every node."""
    return {tuple(tree.tokens[node] for node in tree.path(last)) for last in range(len(tree))}
