"""From the fields of a request to `SamplingParams`: request value, else the model's own default, else neutral."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.config import Config
from engine.errors import InvalidParameter
from engine.types import ModelInfo, SamplingParams
from server.constraints import constraint_of
from server.schemas import SamplingFields

NEUTRAL = SamplingParams()
GREEDY_BELOW = 1e-5


def sampling_params(
    fields: SamplingFields,
    info: ModelInfo,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """`max_tokens` None means as much as fits. Raises InvalidParameter for what does not suit the model."""
    if max_tokens is not None and max_tokens > info.max_model_len:
        raise InvalidParameter(
            f"max_tokens must be at most {info.max_model_len}, the context of this model", param="max_tokens"
        )
    if max_tokens is not None and fields.min_tokens > max_tokens:
        raise InvalidParameter(f"min_tokens must be at most max_tokens, which is {max_tokens}", param="min_tokens")
    for name, ids in (
        ("logit_bias", fields.logit_bias),
        ("allowed_token_ids", fields.allowed_token_ids),
        ("stop_token_ids", fields.stop_token_ids),
    ):
        check_ids(ids, info.logits_size, name)
    temperature = _default(fields, info, "temperature")
    top_k, top_p = max(_default(fields, info, "top_k"), 0), _default(fields, info, "top_p")
    if top_p == 0:  # only the best token: what a vanishing share would leave
        top_k, top_p = 1, 1.0
    return SamplingParams(
        max_tokens=max_tokens or 0,
        min_tokens=fields.min_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=_default(fields, info, "min_p"),
        typical_p=_default(fields, info, "typical_p"),
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=_default(fields, info, "repetition_penalty"),
        logit_bias=fields.logit_bias,
        allowed_token_ids=fields.allowed_token_ids,
        stop_token_ids=fields.stop_token_ids,
        ignore_eos=fields.ignore_eos,
        seed=fields.seed if fields.seed is not None and fields.seed != -1 else 0,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def request_options(fields: SamplingFields, config: Config) -> dict[str, Any]:
    """The fields of `GenerationRequest` that are the same for all routes."""
    limit_s = config.scheduler.max_request_s
    return {
        "seed_given": fields.seed is not None and fields.seed != -1,
        "stop": fields.stop,
        "include_stop_str_in_output": fields.include_stop_str_in_output or fields.no_stop_trim,
        "skip_special_tokens": fields.skip_special_tokens,
        "spaces_between_special_tokens": fields.spaces_between_special_tokens,
        "bad_words": fields.bad_words,
        "truncate_prompt_tokens": fields.truncate_prompt_tokens,
        "truncation_side": fields.truncation_side,
        "priority": fields.priority,
        "cache_salt": fields.salt,
        "kv_policy": fields.kv_policy,
        "speculative": fields.speculative,
        "constraint": constraint_of(fields),
        "deadline_s": limit_s if fields.timeout is None else min(fields.timeout, limit_s),
    }


def check_ids(ids: Iterable[int], size: int, param: str) -> None:
    """Raises InvalidParameter when an id is not below `size`."""
    if max(ids, default=0) >= size:
        raise InvalidParameter(
            f"{param} has a token id outside of the vocabulary; ids go up to {size - 1}", param=param
        )


def _default(fields: SamplingFields, info: ModelInfo, name: str) -> Any:
    value = getattr(fields, name)
    if value is None:
        value = info.generation_defaults.get(name)
    return getattr(NEUTRAL, name) if value is None else value
