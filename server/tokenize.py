"""POST /tokenize and /detokenize, also below /v1. Both peers' shapes go in, and both come out."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator

from engine.errors import InvalidParameter
from server.body import read_object
from server.chat_pipeline import chat_prompt
from server.context import ServerContext
from server.fields import Body, Flag, Text, token_ids
from server.http_responses import json_response
from server.sampling import check_ids
from server.schemas import ChatFields
from server.validation import parse


class TextTokenizeRequest(Body):
    """vLLM's names, then llama.cpp's."""

    model: Text | None = None
    prompt: Text | None = None
    content: Text | None = None
    add_special_tokens: Flag | None = None
    add_special: Flag | None = None
    return_token_strs: Flag = False
    with_pieces: Flag = False


class ChatTokenizeRequest(ChatFields):
    model: Text | None = None
    return_token_strs: Flag = False
    with_pieces: Flag = False
    add_special_tokens: Flag = False  # templates bring their own


class DetokenizeRequest(Body):
    model: Text | None = None
    tokens: Annotated[list[int], BeforeValidator(token_ids)]


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()
    limits, engine = context.config.limits, context.engine

    @router.post("/tokenize")
    @router.post("/v1/tokenize", include_in_schema=False)
    async def tokenize(request: Request) -> Response:
        info = context.require_ready()
        body = await read_object(request, limits)
        fields: ChatTokenizeRequest | TextTokenizeRequest
        if body.get("messages") is not None:
            fields = parse(ChatTokenizeRequest, body, limits, context.metrics)
            tokens = await engine.tokenize(
                chat_prompt(fields, trusts_template=context.config.server.trust_request_chat_template),
                add_special_tokens=fields.add_special_tokens,
            )
        else:
            fields = parse(TextTokenizeRequest, body, limits, context.metrics)
            tokens = await engine.tokenize(_text(fields), add_special_tokens=_adds_special(fields))
        context.resolve_model(fields.model, with_adapters=True)
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": info.max_model_len, "tokens": tokens}
        if fields.return_token_strs or fields.with_pieces:
            pieces = [engine.token_text(token) for token in tokens]
            answer["token_strs"] = pieces
            if fields.with_pieces:
                answer["tokens"] = [{"id": id, "piece": piece} for id, piece in zip(tokens, pieces, strict=True)]
        return json_response(answer)

    @router.post("/detokenize")
    @router.post("/v1/detokenize", include_in_schema=False)
    async def detokenize(request: Request) -> Response:
        info = context.require_ready()
        fields = parse(DetokenizeRequest, await read_object(request, limits), limits, context.metrics)
        context.resolve_model(fields.model, with_adapters=True)
        check_ids(fields.tokens, info.vocab_size, "tokens")
        text = await engine.detokenize(fields.tokens)
        return json_response({"prompt": text, "content": text})

    return router


def _text(fields: TextTokenizeRequest) -> str:
    given = [text for text in (fields.prompt, fields.content) if text is not None]
    if len(given) != 1:
        raise InvalidParameter(
            "exactly one of prompt, content and messages is required",
            param="prompt",
            code="invalid_value" if given else "missing_required_parameter",
        )
    return given[0]


def _adds_special(fields: TextTokenizeRequest) -> bool:
    """Each peer's default for its own field name."""
    if fields.add_special_tokens is not None:
        return fields.add_special_tokens
    if fields.content is not None:
        return bool(fields.add_special)
    return True
