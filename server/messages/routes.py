"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.body import read_object
from server.chat_bridge import count_prompt_tokens, refuse
from server.chat_pipeline import collect
from server.context import ServerContext
from server.http_responses import json_response
from server.messages.schema import REFUSED, CountTokensRequest, MessagesRequest
from server.messages.translate import chat_job
from server.messages.writer import MessageWriter
from server.sse import stream_answer
from server.validation import validated


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()
    limits = context.config.limits

    @router.post("/v1/messages")
    async def create_message(request: Request) -> Response:
        context.require_ready()
        body = await read_object(request, limits)
        refuse(body, REFUSED)
        fields = validated(MessagesRequest, body, limits)
        fields.check()
        state = request.state
        job = await chat_job(context, body, fields, tenant=state.tenant, request_id=state.request_id)
        shows_thinking = fields.thinking is None or fields.thinking.display != "omitted"
        writer = MessageWriter(job, shows_thinking=shows_thinking)
        if fields.stream:
            return await stream_answer(context, [job.request], request, writer, writer, answer_id=writer.answer_id)
        return json_response(writer.whole(await collect(context, job, request.receive)))

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        context.require_ready()
        body = await read_object(request, limits)
        refuse(body, REFUSED)
        fields = validated(CountTokensRequest, body, limits)
        fields.check()
        state = request.state
        job = await chat_job(context, body, fields, tenant=state.tenant, request_id=state.request_id)
        return json_response({"input_tokens": await count_prompt_tokens(context, job)})

    return router
