"""What may enter the queue: refuses what can never run and what would have to wait too long. Changes nothing."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.errors import InvalidParameter, PromptTooLong, QueueFull, QueueTokensFull
from engine.scheduling.cache_manager import CacheManager
from engine.scheduling.compression import CachePlan, ResolvedPolicy
from engine.types import EngineRequest

MAX_RETRY_AFTER_S = 30


def check_servable(
    request: EngineRequest, cache: CacheManager, max_model_len: int, policy: ResolvedPolicy | None = None
) -> int:
    """Output tokens that the request may produce: what it asks for, cut to what the context length leaves.

    Raises PromptTooLong when prompt and output could not run even with the whole pool, InvalidParameter for a
    request without prompt, output or choices, or with a choice that the engine would have to ignore.
    """
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    if num_prompt == 0:
        raise InvalidParameter("the prompt has no tokens; give at least one", param="prompt")
    if max_tokens < 1:
        raise InvalidParameter(f"max_tokens is {max_tokens}; give at least 1", param="max_tokens")
    if request.num_choices < 1:
        raise InvalidParameter(f"n is {request.num_choices}; give at least 1", param="n")
    if request.pooling is not None:
        return _check_pooling(request, cache, max_model_len)
    if num_prompt >= max_model_len:
        raise PromptTooLong(
            f"the prompt has {num_prompt} tokens, max_model_len is {max_model_len} and output needs at least one; "
            "shorten the prompt",
            param="prompt",
        )
    max_tokens = min(max_tokens, max_model_len - num_prompt)
    # the last token is only returned, never fed back: it needs no slot
    if not cache.fits_alone(num_prompt + max_tokens - 1, None if policy is None else policy.plan):
        raise PromptTooLong(
            f"{num_prompt} prompt tokens plus max_tokens {max_tokens} exceed the {cache.num_slots} tokens that the KV "
            "cache holds; lower max_tokens or shorten the prompt",
            param="max_tokens",
        )
    return max_tokens


def check_provided(request: EngineRequest, plan: CachePlan | None) -> None:
    """Raises InvalidParameter for what a prompt cannot have whose keys and values the model does not compute."""
    if plan is None or not plan.num_provided:
        return
    if request.sampling.prompt_logprobs is not None:
        raise InvalidParameter(
            f"kv_policy {plan.policy!r} supplies the prompt, so there are no prompt_logprobs; leave one of them out",
            param="prompt_logprobs",
        )
    if request.adapter:
        raise InvalidParameter(
            f"kv_policy {plan.policy!r} supplies the prompt, which knows nothing of adapter {request.adapter!r}; leave "
            "one of them out",
            param="kv_policy",
        )


def _check_pooling(request: EngineRequest, cache: CacheManager, max_model_len: int) -> int:
    """No output follows the prompt, so it may fill the whole context. Returns the 0 tokens of output."""
    num_prompt, limit = len(request.prompt_token_ids), min(max_model_len, cache.num_slots)
    if request.num_choices != 1:
        raise InvalidParameter(f"n is {request.num_choices}; a pooling request has one result", param="n")
    if num_prompt > limit:
        raise PromptTooLong(f"the input has {num_prompt} tokens, the limit is {limit}; shorten it", param="input")
    return 0


def check_queue(
    config: SchedulerConfig,
    *,
    num_waiting: int,
    num_free_rows: int,
    waiting_tokens: int,
    new_tokens: int,
    num_cache_slots: int,
    oldest_waiting_s: float,
) -> None:
    """Raises QueueFull when so many requests or prompt tokens wait already that another one would wait too long.

    Free rows count as room: what arrives between two steps of an idle engine does not wait for anything.
    A single request always finds an empty queue open, however long its prompt.
    """
    # the queue moves about as fast as it did for the one that waits longest
    retry_after_s = min(max(1, round(oldest_waiting_s)), MAX_RETRY_AFTER_S)
    limit = config.max_waiting_requests + num_free_rows
    if num_waiting >= limit:
        raise QueueFull(f"{num_waiting} requests wait, the bound is {limit}; retry later", retry_after_s=retry_after_s)
    token_limit = int(config.max_waiting_pools * num_cache_slots)
    if num_waiting and waiting_tokens + new_tokens > token_limit:
        raise QueueTokensFull(
            f"{waiting_tokens} prompt tokens wait and this request has {new_tokens}, the bound is {token_limit}; "
            "retry later",
            retry_after_s=retry_after_s,
        )
