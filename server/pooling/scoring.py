"""POST /score and /rerank: how well texts fit together, by a cross-encoder or by the cosine of two embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request, Response

from engine.errors import UnsupportedParameter
from engine.types import PooledOutput, PoolingInfo, PoolingRequest, TextPair
from server.body import read_object
from server.context import ServerContext
from server.http_responses import json_response
from server.pooling.embeddings import base_request, head, numbers, prompt_text, usage
from server.pooling.run import PoolingRun
from server.pooling.schemas import PoolingFields, RerankRequest, ScoreRequest
from server.validation import parse


@dataclass(frozen=True)
class Pairs:
    """The texts to be compared, by index, and the names of their fields in errors."""

    firsts: tuple[str, ...]  # one for all, or as many as seconds
    seconds: tuple[str, ...]
    first_param: str
    second_param: str
    max_second_tokens: int | None = None


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()
    limits = context.config.limits

    @router.post("/score")
    @router.post("/v1/score")
    async def score(request: Request) -> Response:
        context.require_ready()
        fields = parse(ScoreRequest, await read_object(request, limits), limits, context.metrics)
        fields.check()
        model = context.resolve_model(fields.model, with_adapters=True)
        pairs = Pairs(fields.first, fields.second, "queries", "documents", fields.max_tokens_per_doc)
        scores, outputs = await _scores(pairs, fields, model, context, request)
        data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
        return json_response({**head("score", "list", model), "data": data, "usage": usage(outputs)})

    @router.post("/rerank")
    @router.post("/v1/rerank")
    @router.post("/v2/rerank")
    async def rerank(request: Request) -> Response:
        context.require_ready()
        fields = parse(RerankRequest, await read_object(request, limits), limits, context.metrics)
        fields.check()
        model = context.resolve_model(fields.model, with_adapters=True)
        documents = fields.candidates
        pairs = Pairs((fields.query,), documents, "query", "documents", fields.max_tokens_per_doc)
        scores, outputs = await _scores(pairs, fields, model, context, request)
        best = sorted(range(len(scores)), key=lambda index: -scores[index])  # equal scores keep their order
        results: list[dict[str, Any]] = []
        for index in best[: fields.top_n or None]:
            document = {"document": {"text": documents[index]}} if fields.return_documents else {}
            results.append({"index": index, **document, "relevance_score": scores[index]})
        return json_response({**head("rerank", "rerank", model), "results": results, "usage": usage(outputs)})

    return router


async def _scores(
    pairs: Pairs, fields: PoolingFields, model: str, context: ServerContext, request: Request
) -> tuple[list[float], list[PooledOutput]]:
    """One score per second text. Raises UnsupportedParameter when the model cannot compare texts."""
    pooling = context.require_ready().pooling
    if pooling is not None and "classify" in pooling.tasks and len(pooling.labels) == 1:
        base = base_request(fields, model, context, request, task="classify", activate=fields.use_activation)
        outputs = await PoolingRun(context, _crossed(base, pairs), request.receive).collect()
        return [float(numbers(output)[0]) for output in outputs], outputs
    if pooling is not None and "embed" not in pooling.tasks:
        raise UnsupportedParameter(
            f"this model tells {len(pooling.labels)} classes apart; scores need one label or embeddings", param="model"
        )
    base = base_request(fields, model, context, request, task="embed", activate=True)
    requests = _apart(base, _prompted(pairs, pooling))
    outputs = await PoolingRun(context, requests, request.receive).collect()
    vectors = np.stack([numbers(output) for output in outputs]).astype(np.float64)
    firsts, seconds = vectors[: len(pairs.firsts)], vectors[len(pairs.firsts) :]
    products: list[float] = (firsts * seconds).sum(axis=1).tolist()
    return [min(max(product, -1.0), 1.0) for product in products], outputs


def _prompted(pairs: Pairs, pooling: PoolingInfo | None) -> Pairs:
    """With the model's own prompts for queries and documents before the texts, where it has such."""
    names = pooling.prompts if pooling is not None else {}
    query = "query" if "query" in names else None
    document = next((name for name in ("document", "passage", "corpus") if name in names), None)
    before_first, before_second = prompt_text(pooling, query), prompt_text(pooling, document)
    return replace(
        pairs,
        firsts=tuple(before_first + text for text in pairs.firsts),
        seconds=tuple(before_second + text for text in pairs.seconds),
    )


def _crossed(base: PoolingRequest, pairs: Pairs) -> list[PoolingRequest]:
    """One request per pair."""
    firsts = pairs.firsts * (len(pairs.seconds) if len(pairs.firsts) == 1 else 1)
    return [
        msgspec.structs.replace(
            base,
            prompt=TextPair(first=first, second=second, max_second_tokens=pairs.max_second_tokens),
            prompt_param=_param(pairs.second_param, index, pairs.seconds),
        )
        for index, (first, second) in enumerate(zip(firsts, pairs.seconds, strict=True))
    ]


def _apart(base: PoolingRequest, pairs: Pairs) -> list[PoolingRequest]:
    """One request per text: the first ones, then the second ones."""
    limits = [limit for limit in (pairs.max_second_tokens, base.truncate_prompt_tokens) if limit not in (None, -1)]
    keep = min(limits, default=base.truncate_prompt_tokens)
    firsts = [
        msgspec.structs.replace(base, prompt=text, prompt_param=_param(pairs.first_param, index, pairs.firsts))
        for index, text in enumerate(pairs.firsts)
    ]
    seconds = [
        msgspec.structs.replace(
            base,
            prompt=text,
            prompt_param=_param(pairs.second_param, index, pairs.seconds),
            truncate_prompt_tokens=keep,
        )
        for index, text in enumerate(pairs.seconds)
    ]
    return firsts + seconds


def _param(name: str, index: int, texts: Sequence[str]) -> str:
    return name if len(texts) == 1 else f"{name}.{index}"
