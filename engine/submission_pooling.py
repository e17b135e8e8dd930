"""From a PoolingRequest and its token ids to the EngineRequest that the core takes: what the model offers, and limits.

Pure functions; they know the model's figures and no text.
"""

from __future__ import annotations

from engine.errors import InvalidParameter, PromptTooLong, UnsupportedParameter
from engine.submission import check_prompt, context_limit
from engine.types import EngineRequest, ModelInfo, PoolingInfo, PoolingParams, PoolingRequest, SamplingParams


def require_pooling(request: PoolingRequest, info: ModelInfo) -> PoolingParams:
    """What the engine is to do for a request. Raises UnsupportedParameter and InvalidParameter."""
    pooling = info.pooling
    if pooling is None:
        raise UnsupportedParameter(
            "this model generates text and has no pooler; start the server with --pooling last (or mean, cls, "
            "weighted) to serve embeddings from it",
            param="model",
        )
    if request.task not in pooling.tasks:
        raise UnsupportedParameter(
            f"this model does not offer {request.task!r}; it serves {', '.join(_routes(info))}", param="model"
        )
    if request.dimensions is not None:
        _check_dimensions(request, pooling)
    activate = request.activate
    if activate is None:
        activate = request.task == "classify" or pooling.normalize
    # class scores of a decoder come from its last token, and those of an encoder from its own head
    method = "last" if request.task == "classify" else pooling.method
    return PoolingParams(task=request.task, method=method, activate=activate, dimensions=request.dimensions)


def build_pooling(
    request: PoolingRequest,
    request_id: str,
    token_ids: list[int],
    params: PoolingParams,
    info: ModelInfo,
    *,
    adapter: str = "",
    elapsed_s: float = 0.0,
) -> EngineRequest:
    """Checks the prompt, which may fill the whole context. Raises InvalidParameter and PromptTooLong.

    adapter     key of the loaded adapter of that name
    elapsed_s   time already spent of `request.deadline_s`
    """
    check_prompt(token_ids, info, request.prompt_param)
    limit = context_limit(info)
    if len(token_ids) > limit:
        raise PromptTooLong(
            f"this model takes at most {limit} tokens; the input has {len(token_ids)}; shorten it or give "
            "truncate_prompt_tokens",
            param=request.prompt_param,
        )
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=token_ids,
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
        priority=request.priority,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        deadline_s=None if request.deadline_s is None else max(request.deadline_s - elapsed_s, 0.0),
        pooling=params,
        adapter=adapter,
    )


def _check_dimensions(request: PoolingRequest, pooling: PoolingInfo) -> None:
    """Only embeddings that were trained for it may be cut; their own size is always right."""
    wanted, size, allowed = request.dimensions, pooling.embedding_size, pooling.matryoshka_dimensions
    assert wanted is not None
    if request.task == "classify":
        raise InvalidParameter("dimensions belongs to embeddings; leave it out", param="dimensions")
    if wanted == size:
        return
    if allowed and wanted not in allowed:
        choices = ", ".join(map(str, [*allowed, size][:20]))
        raise InvalidParameter(f"dimensions is {wanted}; this model allows {choices}", param="dimensions")
    if not allowed and not pooling.matryoshka:
        raise UnsupportedParameter(
            f"this model's embeddings have {size} numbers and are not made to be cut; leave dimensions out (an "
            "operator who knows better starts the server with --matryoshka)",
            param="dimensions",
        )
    if not 1 <= wanted <= size:
        raise InvalidParameter(f"dimensions is {wanted}; give 1 to {size}", param="dimensions")


def _routes(info: ModelInfo) -> list[str]:
    """What to use instead, for messages."""
    tasks = info.pooling.tasks if info.pooling is not None else []
    served = ["/v1/completions"] if info.can_generate else []
    if "embed" in tasks:
        served.append("/v1/embeddings")
    if "classify" in tasks:
        served.append("/classify")
    return [*served, "/pooling", "/score", "/rerank"]
