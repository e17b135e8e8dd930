"""POST /v1/embeddings, /pooling and /classify: one vector, matrix or row of class scores per input."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request, Response

from engine.errors import InvalidParameter
from engine.types import ChatPrompt, ModelInfo, PooledOutput, PoolingInfo, PoolingRequest, PoolingTask
from server.body import read_object
from server.chat_pipeline import chat_prompt
from server.context import ServerContext
from server.http_responses import json_response
from server.pooling.run import PoolingRun
from server.pooling.schemas import (
    ChatEmbeddingRequest,
    ClassifyRequest,
    EmbeddingRequest,
    InputFields,
    PoolingBody,
    PoolingFields,
)
from server.sampling import check_ids
from server.validation import parse

NUMBERS_AT_A_TIME = 65_536  # written without giving way to other requests


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()
    limits = context.config.limits

    async def answer(request: Request, kind: type[EmbeddingRequest], task: PoolingTask | None) -> Response:
        info = context.require_ready()
        body = await read_object(request, limits)
        has_messages = body.get("messages") is not None
        fields = parse(ChatEmbeddingRequest if has_messages else kind, body, limits, context.metrics)
        fields.check()
        model = context.resolve_model(fields.model, with_adapters=True)
        if task is None:
            task = _task_of(fields, info)
        activate = fields.use_activation if fields.normalize is None else fields.normalize
        base = base_request(fields, model, context, request, task=task, activate=activate, dimensions=fields.dimensions)
        prefix = prompt_text(info.pooling, fields.prompt_name) if task != "classify" else ""
        requests = _with_inputs(base, fields, info, prefix)
        outputs = await PoolingRun(context, requests, request.receive).collect()
        name, key = ("embedding", "embedding") if kind is EmbeddingRequest else ("pooling", "data")
        data = [
            {"object": name, "index": index, key: values}
            for index, values in enumerate(await _written(outputs, fields.encoding_format))
        ]
        if kind is not EmbeddingRequest and fields.encoding_format == "base64":
            data = [{**item, "shape": output.shape} for item, output in zip(data, outputs, strict=True)]
        answer_head = head("embd" if kind is EmbeddingRequest else "pool", "list", model)
        return json_response({**answer_head, "data": data, "usage": usage(outputs)})

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await answer(request, EmbeddingRequest, "embed")

    @router.post("/pooling")
    async def pooling(request: Request) -> Response:
        return await answer(request, PoolingBody, None)

    @router.post("/classify")
    @router.post("/v1/classify")
    async def classify(request: Request) -> Response:
        info = context.require_ready()
        fields = parse(ClassifyRequest, await read_object(request, limits), limits, context.metrics)
        fields.check()
        model = context.resolve_model(fields.model, with_adapters=True)
        base = base_request(fields, model, context, request, task="classify", activate=fields.use_activation)
        outputs = await PoolingRun(context, _with_inputs(base, fields, info), request.receive).collect()
        data = [_classified(index, output, info.pooling) for index, output in enumerate(outputs)]
        return json_response({**head("classify", "list", model), "data": data, "usage": usage(outputs)})

    return router


def base_request(
    fields: PoolingFields, model: str, context: ServerContext, request: Request, **options: Any
) -> PoolingRequest:
    """What all engine requests of one HTTP request share; the prompt is still empty."""
    limit_s = context.config.scheduler.max_request_s
    return PoolingRequest(
        prompt="",
        add_special_tokens=fields.add_special_tokens,
        truncate_prompt_tokens=fields.truncate_prompt_tokens,
        truncation_side=fields.truncation_side,
        priority=fields.priority,
        cache_salt=fields.cache_salt or "",
        deadline_s=limit_s if fields.timeout is None else min(fields.timeout, limit_s),
        tenant=request.state.tenant,
        client_request_id=request.state.request_id,
        adapter=context.adapter_of(model),
        **options,
    )


def head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The first fields of an answer."""
    return {"id": f"{prefix}-{secrets.token_hex(16)}", "object": kind, "created": int(time.time()), "model": model}


def usage(outputs: Sequence[PooledOutput]) -> dict[str, Any]:
    """Tokens of all inputs, special tokens included."""
    total = sum(output.num_prompt_tokens for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {"prompt_tokens": total, "total_tokens": total, "prompt_tokens_details": {"cached_tokens": cached}}


def numbers(output: PooledOutput) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The result as an array."""
    return np.frombuffer(output.data, dtype="<f4").reshape(output.shape)


def _task_of(fields: EmbeddingRequest, info: ModelInfo) -> PoolingTask:
    asked: PoolingTask | None = getattr(fields, "task", None)
    if asked is None and info.pooling is not None and "embed" not in info.pooling.tasks:
        return "classify"
    return asked or "embed"


def prompt_text(pooling: PoolingInfo | None, name: str | None) -> str:
    """What goes before a text: the named prompt, or the model's default. Raises InvalidParameter."""
    prompts = pooling.prompts if pooling is not None else {}
    if name is None:
        name = pooling.default_prompt if pooling is not None else ""
    if name and name not in prompts:
        known = ", ".join(sorted(prompts)) or "none"
        raise InvalidParameter(f"this model has no such prompt; it has: {known}", param="prompt_name")
    return prompts[name] if name else ""


def _with_inputs(base: PoolingRequest, fields: InputFields, info: ModelInfo, prefix: str = "") -> list[PoolingRequest]:
    """One request per input; `prefix` goes before texts. Raises InvalidParameter for ids outside of the vocabulary."""
    prompts: list[str | list[int] | ChatPrompt] = [
        prefix + given if isinstance(given, str) else given for given in fields.inputs
    ]
    params = ["input"] if len(prompts) == 1 else [f"input.{index}" for index in range(len(prompts))]
    if isinstance(fields, ChatEmbeddingRequest):
        prompts, params = [chat_prompt(fields)], ["messages"]
    for prompt, param in zip(prompts, params, strict=True):
        if isinstance(prompt, list):
            check_ids(prompt, info.vocab_size, param)
    return [
        msgspec.structs.replace(base, prompt=prompt, prompt_param=param)
        for prompt, param in zip(prompts, params, strict=True)
    ]


async def _written(outputs: Sequence[PooledOutput], encoding: str) -> list[Any]:
    """The results as they stand in the answer."""
    if encoding == "base64":
        return [base64.b64encode(output.data).decode() for output in outputs]
    written, num_numbers = [], 0
    for output in outputs:
        written.append(msgspec.Raw(msgspec.json.encode(numbers(output).tolist())))
        num_numbers += len(output.data) // 4
        if num_numbers > NUMBERS_AT_A_TIME:
            num_numbers = 0
            await asyncio.sleep(0)
    return written


def _classified(index: int, output: PooledOutput, pooling: PoolingInfo | None) -> dict[str, Any]:
    scores: list[float] = numbers(output).tolist()
    best = max(range(len(scores)), key=scores.__getitem__)
    labels = pooling.labels if pooling is not None else []
    label = labels[best] if best < len(labels) else None
    return {"index": index, "label": label, "probs": scores, "num_classes": len(scores)}
