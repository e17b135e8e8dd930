"""From a GenerationRequest and its token ids to the EngineRequest that the core takes: room, limits, seed.

Pure functions; they know the model's figures and no text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import msgspec

from engine.config import Limits
from engine.errors import InvalidParameter, PromptTooLong, UnsupportedParameter
from engine.sampling_params import validate
from engine.types import CompiledConstraint, EngineRequest, GenerationRequest, ModelInfo

SEED_BITS = 63


def truncate(token_ids: list[int], request: GenerationRequest, limit: int) -> list[int]:
    """The last `truncate_prompt_tokens` tokens, or the first; -1 keeps what leaves room for one token of output."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return token_ids
    if keep < -1 or keep == 0:
        raise InvalidParameter(
            f"truncate_prompt_tokens is {keep}; give -1 or at least 1", param="truncate_prompt_tokens"
        )
    keep = limit - 1 if keep == -1 else keep
    return token_ids[-keep:] if request.truncation_side == "left" else token_ids[:keep]


def with_time_left(request: EngineRequest, created_s: float) -> EngineRequest:
    """The request as it is sent now: its deadline counts from `created_s`, a time of `time.monotonic`."""
    if request.deadline_s is None:
        return request
    left_s = request.deadline_s - (time.monotonic() - created_s)
    return msgspec.structs.replace(request, deadline_s=max(left_s, 0.0))


def context_limit(info: ModelInfo) -> int:
    """Tokens of prompt plus output that a request may have: the context, or what the cache can ever hold."""
    return min(info.max_model_len, info.kv_cache_tokens)


def build(
    request: GenerationRequest,
    request_id: str,
    token_ids: list[int],
    bad_words_ids: Sequence[tuple[int, ...]],
    info: ModelInfo,
    *,
    is_strict: bool,
    grammar: str | None = None,
    adapter: str = "",
    limits: Limits | None = None,
    elapsed_s: float = 0.0,
) -> EngineRequest:
    """Fits the request into the context.

    is_strict   refuse instead of cutting max_tokens when prompt plus max_tokens exceed the context
    grammar     the compiled constraint
    adapter     key of the loaded adapter of that name
    limits      bounds on the sizes of lists; None sets none
    elapsed_s   time already spent of `request.deadline_s`
    Raises UnsupportedParameter, InvalidParameter and PromptTooLong.
    """
    require_generation(info)
    check_prompt(token_ids, info, request.prompt_param)
    max_tokens = _fit_output(request, len(token_ids), info, is_strict)
    sampling = msgspec.structs.replace(
        request.sampling,
        max_tokens=max_tokens,
        min_tokens=min(request.sampling.min_tokens, max_tokens),
        seed=request.sampling.seed if request.seed_given else secrets.randbits(SEED_BITS),
        bad_words_ids=(*request.sampling.bad_words_ids, *bad_words_ids),
    )
    validate(sampling, logits_size=info.logits_size, max_model_len=info.max_model_len, limits=limits)
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=token_ids,
        sampling=sampling,
        num_choices=request.num_choices,
        priority=request.priority,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        deadline_s=None if request.deadline_s is None else max(request.deadline_s - elapsed_s, 0.0),
        kv_policy=request.kv_policy,
        speculative=request.speculative,
        constraint=None if grammar is None else CompiledConstraint(grammar, request.constraint_after or ""),
        adapter=adapter,
    )


def require_generation(info: ModelInfo) -> None:
    """Raises UnsupportedParameter when the model has no language head."""
    if not info.can_generate:
        raise UnsupportedParameter(
            f"this model ({info.architecture}) generates no text; it serves embeddings or class scores: see "
            "/v1/embeddings, /pooling, /classify, /score and /rerank",
            param="model",
        )


def check_prompt(token_ids: list[int], info: ModelInfo, param: str) -> None:
    """Raises InvalidParameter for a prompt that is empty or has ids outside of the vocabulary."""
    if not token_ids:
        raise InvalidParameter("the prompt has no tokens; give at least one", param=param)
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= info.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidParameter(
            f"token id {wrong} is not in the vocabulary; ids are 0 to {info.vocab_size - 1}", param=param
        )


def _fit_output(request: GenerationRequest, num_prompt_tokens: int, info: ModelInfo, is_strict: bool) -> int:
    limit = context_limit(info)
    room = limit - num_prompt_tokens
    asked = request.sampling.max_tokens
    if room < 1 or (is_strict and asked > room):
        raise PromptTooLong(
            f"this model's maximum context length is {limit} tokens; the prompt has {num_prompt_tokens} and "
            f"{max(asked, 1)} were requested for the output; shorten the prompt or lower max_tokens",
            param=request.prompt_param,
        )
    return min(asked, room) if asked > 0 else room
