"""What a step's result means for one request: tokens appended, its end found, the output to send.

Knows no blocks, rows or queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.scheduling.plan import Chunk, ChunkResult
from engine.scheduling.request import Request
from engine.types import FinishReason, KVUsage, SpeculationUsage, TokenLogprob, TokenOutput


class Ending(NamedTuple):
    """Why a request is over."""

    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None  # a `code` of engine.errors


def append_tokens(request: Request, token_ids: Sequence[int]) -> tuple[int, Ending | None]:
    """Appends chosen tokens up to the first that ends the request: how many, and the ending.

    A stop token is part of the output. That none comes before `min_tokens` is the sampler's promise.
    """
    family = request.family
    for count, token_id in enumerate(token_ids, start=1):
        request.token_ids.append(token_id)
        if token_id in family.stop_ids:
            return count, Ending("stop", stop_token_id=token_id)
        if request.num_output_tokens >= family.max_tokens:
            return count, Ending("length")
    return len(token_ids), None


def collect_prompt_logprobs(request: Request, chunk: Chunk, outcome: ChunkResult) -> None:
    """Adds what the chunk tells about the prompt. Positions known from before a preemption are skipped."""
    known = request.prompt_logprobs
    if known is not None and outcome.prompt_logprobs is not None:
        assert chunk.start + 1 <= len(known), "log-probabilities of prompt positions arrive in order"
        known.extend(outcome.prompt_logprobs[len(known) - chunk.start - 1 :])


def make_output(
    request: Request,
    num_new_tokens: int,
    logprobs: tuple[TokenLogprob, ...] | None,
    ending: Ending | None,
    block_bytes: int = 0,
) -> TokenOutput:
    """The output with the request's newest tokens. Once-only facts go with the first one that carries tokens."""
    if request.has_emitted and ending is None:
        return TokenOutput(
            request_id=request.request_id,
            choice=request.choice,
            token_ids=request.token_ids[-num_new_tokens:],
            logprobs=None if logprobs is None else list(logprobs[:num_new_tokens]),
            kv=_kv_usage(request, block_bytes),
            speculative=_speculation_usage(request),
        )
    is_first = not request.has_emitted and num_new_tokens > 0
    prompt_logprobs = None
    if is_first:
        request.has_emitted = True
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
    return TokenOutput(
        request_id=request.request_id,
        choice=request.choice,
        token_ids=request.token_ids[-num_new_tokens:] if num_new_tokens else [],
        logprobs=None if logprobs is None else list(logprobs[:num_new_tokens]),
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=request.num_cached_tokens if is_first else None,
        cache_miss=(request.cache_miss or None) if is_first else None,
        finish_reason=None if ending is None else ending.reason,
        stop_token_id=None if ending is None else ending.stop_token_id,
        error=None if ending is None else ending.error,
        queued_s=request.queued_s if is_first else None,
        num_preemptions=0 if ending is None else request.num_preemptions,
        kv=_kv_usage(request, block_bytes),
        speculative=_speculation_usage(request),
    )


def _speculation_usage(request: Request) -> SpeculationUsage | None:
    speculating = request.speculating
    if speculating is None:
        return None
    if speculating.usage is None:
        drafted, accepted = speculating.drafted, speculating.accepted
        speculating.usage = SpeculationUsage(
            steps=speculating.num_steps,
            drafted=sum(drafted.values()),
            accepted=sum(accepted.values()),
            by_source={source: (drafted[source], accepted[source]) for source in sorted(drafted)},
        )
    return speculating.usage


def _kv_usage(request: Request, block_bytes: int) -> KVUsage | None:
    policy = request.policy
    if policy is None:
        return None
    num_shared = 0 if request.is_compressed and not policy.plan.seals else request.num_published_blocks
    num_packed = request.num_dropped - request.num_evicted
    num_slots = max(table.num_slots for table in request.tables) + num_packed
    return KVUsage(
        policy=policy.plan.policy,
        peak_slots=max(request.peak_slots, num_slots),
        steady_slots=num_slots,
        evicted_tokens=request.num_evicted,
        merged_tokens=request.num_merged,
        released_bytes=request.num_blocks_released * block_bytes,
        private_bytes=sum(len(table.block_ids) for table in request.tables) * block_bytes // len(request.tables)
        + (len(request.packed) + len(request.side) - num_shared) * block_bytes,
        shared_bytes=num_shared * block_bytes,
        bits_per_value=policy.bits_per_value,
        format=policy.plan.format,
        rungs=list(request.rungs),
    )


def make_pooled_output(request: Request, outcome: ChunkResult) -> TokenOutput:
    """The whole output of a pooling request."""
    assert outcome.pooled is not None, "the last prompt chunk of a pooling row has a pooled result"
    data, shape = outcome.pooled
    return TokenOutput(
        request_id=request.request_id,
        choice=request.choice,
        num_cached_tokens=request.num_cached_tokens,
        finish_reason="stop",
        queued_s=request.queued_s,
        num_preemptions=request.num_preemptions,
        pooled=data,
        pooled_shape=shape,
    )
