"""What a step in flight will have done to its requests, as far as that is known before its results are.

Knows one request and its chunk; never rows, queues or outputs.
"""

from __future__ import annotations

from engine.scheduling.cache_manager import CacheManager
from engine.scheduling.plan import Chunk
from engine.scheduling.request import Request

# Stands where the token will be; no model has it, so that a step that reads it instead of the real one fails.
TO_COME = -1


def is_predictable(request: Request, chunk: Chunk) -> bool:
    """Whether the request computes the chunk and, if that samples, gets one token: whatever comes out of the step.

    Grammars append tokens or wait, guesses are accepted or not, caches shrink, and prompts that are filtered are others
    afterwards.
    """
    owner = request.family
    return (
        request.policy is None
        and not owner.may_shrink
        and request.speculating is None
        and owner.request.constraint is None
        and owner.request.pooling is None
        and chunk.taps is None
    )


def assume(request: Request, chunk: Chunk, cache: CacheManager) -> None:
    """The request as it will be when the step in flight has been committed, but for the token itself.

    One that reaches its number of tokens gets none: it has nothing left to compute, and so no part in the next step.
    """
    cache.advance(request, chunk.num_tokens)
    if chunk.is_sampling and chunk.output_index + 1 < request.family.max_tokens:
        request.token_ids.append(TO_COME)
        request.awaits_token = True


def settle(request: Request) -> None:
    """The results are there: the place of the token is empty again, and may be filled."""
    if request.awaits_token:
        request.token_ids.pop()
        request.awaits_token = False
