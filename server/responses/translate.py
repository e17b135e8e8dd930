"""From a Responses body to a chat job: conversation, tools, format, and what to drop when it does not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from engine.errors import InvalidParameter, PromptTooLong, RequestError
from engine.types import ChatPrompt
from server.chat_bridge import chat_request, count_prompt_tokens, own_fields, renamed
from server.chat_pipeline import ChatJob, prepare
from server.context import ServerContext
from server.responses.input import ItemReference
from server.responses.items import to_messages, user_item, with_id
from server.responses.schema import REFUSED, FunctionTool, ResponsesRequest
from server.responses.store import ResponseStore, StoredResponse, Turn

OWN = own_fields(ResponsesRequest, *REFUSED)
WHOLE = frozenset({"messages"})  # items and messages do not correspond one to one
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "tool_choice.function": "tool_choice",
}


def conversation(fields: ResponsesRequest, store: ResponseStore, tenant: str) -> Turn:
    """The items that the model reads. Raises RequestError (404) for ids that are not stored."""
    parent = None
    if fields.previous_response_id is not None:
        previous = find(store, tenant, fields.previous_response_id, "previous_response_id")
        if previous.response["status"] not in ("completed", "incomplete"):
            raise InvalidParameter(
                f"the previous response has no answer to go on from: it is {previous.response['status']}",
                param="previous_response_id",
            )
        parent = previous.context
    if isinstance(fields.input, str):
        return Turn([with_id(user_item(fields.input))], parent)
    known: dict[str, dict[str, Any]] | None = None
    items = []
    for index, item in enumerate(fields.input):
        if isinstance(item, ItemReference):
            known = store.items(tenant) if known is None else known
            if item.id not in known:
                raise RequestError(
                    "no stored response has that item; send the item itself",
                    param=f"input.{index}.id",
                    code="item_not_found",
                )
            items.append(known[item.id])
        else:
            items.append(with_id(item.model_dump(exclude_none=True)))
    return Turn(items, parent)


def require_store(store: ResponseStore, param: str) -> None:
    """Raises InvalidParameter when nothing is stored here."""
    if not store.is_on:
        raise InvalidParameter(
            f"{param} needs stored responses, which are off; set --max-stored-responses above 0",
            param=param,
            code="unsupported_parameter",
        )


def find(store: ResponseStore, tenant: str, response_id: str, param: str) -> StoredResponse:
    """Raises RequestError (404), also for what another key has stored, and InvalidParameter without a store."""
    require_store(store, param)
    entry = store.get(tenant, response_id)
    if entry is None:
        raise RequestError(
            "there is no such response: it was not stored, has expired or was pushed out by newer ones",
            param=param,
            code="previous_response_not_found" if param == "previous_response_id" else "response_not_found",
        )
    return entry


async def chat_job(
    context: ServerContext,
    body: dict[str, Any],
    fields: ResponsesRequest,
    turn: Turn,
    *,
    tenant: str,
    request_id: str,
) -> ChatJob:
    """Raises RequestError with the names of the Responses API in `param`."""
    tools = _callable_tools(fields)
    translated = {
        "model": fields.model,
        "messages": to_messages(fields.instructions, turn.all_items()),
        "max_completion_tokens": fields.max_output_tokens,
        "reasoning_effort": fields.effort,
        "verbosity": fields.text.verbosity,
        "response_format": _response_format(fields),
        "tools": [{"type": "function", "function": _function(tool)} for tool in tools] or None,
        "tool_choice": _tool_choice(fields),
        "parallel_tool_calls": body.get("parallel_tool_calls") if tools else None,
        "logprobs": True if fields.has_logprobs else None,
        "top_logprobs": fields.top_logprobs if fields.has_logprobs else None,
        "stream": fields.stream,
        "service_tier": fields.service_tier,
        "user": fields.user,
    }
    if not translated["messages"]:
        raise InvalidParameter("input must hold at least one item", param="input")
    with renamed({**NAMES, **_tool_names(fields, tools)}, whole=WHOLE):
        chat = chat_request(context, body, OWN, {k: v for k, v in translated.items() if v is not None})
        job = await prepare(context, chat, tenant=tenant, request_id=request_id)
    job = dataclasses.replace(job, request=msgspec.structs.replace(job.request, prompt_param="input"))
    return await _fitted(context, job) if fields.truncation == "auto" else job


async def _fitted(context: ServerContext, job: ChatJob) -> ChatJob:
    """Drops the oldest messages until prompt and output fit; the system message and the last user message stay.

    Cuts are made before user messages only, so that no result of a call stays without the call.
    """
    prompt = job.request.prompt
    assert isinstance(prompt, ChatPrompt)
    max_len = context.require_ready().max_model_len
    # half of the context at most is kept free for an output, however much was asked for
    room = max_len - max(1, min(job.request.sampling.max_tokens, max_len // 2))

    async def fits(candidate: ChatJob) -> bool:
        try:
            return await count_prompt_tokens(context, candidate) <= room
        except PromptTooLong:  # so long that it is not even counted
            return False

    if await fits(job):
        return job
    num_fixed = 1 if prompt.messages[0]["role"] in ("system", "developer") else 0
    cuts = [i for i, message in enumerate(prompt.messages) if message["role"] == "user" and i > num_fixed]
    low, high = 0, len(cuts)  # cuts[low - 1] is too long, cuts[high] fits or is not there
    while low < high:
        middle = (low + high) // 2
        if await fits(_without(job, prompt, num_fixed, cuts[middle])):
            high = middle
        else:
            low = middle + 1
    # when nothing fits the engine refuses what is left, with the numbers
    return _without(job, prompt, num_fixed, cuts[min(low, len(cuts) - 1)]) if cuts else job


def _without(job: ChatJob, prompt: ChatPrompt, begin: int, end: int) -> ChatJob:
    messages = [*prompt.messages[:begin], *prompt.messages[end:]]
    shorter = msgspec.structs.replace(prompt, messages=messages)
    return dataclasses.replace(job, request=msgspec.structs.replace(job.request, prompt=shorter))


def _response_format(fields: ResponsesRequest) -> dict[str, Any] | None:
    shape = fields.text.format
    if shape is None or shape.type == "text":
        return None
    if shape.type == "json_object":
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {
            name: value for name, value in shape.model_dump(by_alias=True, exclude_none=True).items() if name != "type"
        },
    }


def _callable_tools(fields: ResponsesRequest) -> list[FunctionTool]:
    """With allowed_tools only those that may be called: the model needs to see no others."""
    choice = fields.tool_choice
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        names = {tool["name"] for tool in choice["tools"]}
        return [tool for tool in fields.tools if tool.name in names]
    return fields.tools


def _function(tool: FunctionTool) -> dict[str, Any]:
    return tool.model_dump(exclude={"type"}, exclude_none=True)


def _tool_choice(fields: ResponsesRequest) -> Any:
    choice = fields.tool_choice
    if not fields.tools or choice is None:
        return None
    if isinstance(choice, str):
        return choice
    if choice["type"] == "allowed_tools":
        return choice["mode"]
    return {"type": "function", "function": {"name": choice["name"]}}


def _tool_names(fields: ResponsesRequest, tools: list[FunctionTool]) -> dict[str, str]:
    """Where chat has a tool -> where it stood in the body."""
    places = {id(tool): index for index, tool in enumerate(fields.tools)}
    names = {f"tools.{index}": f"tools.{places[id(tool)]}" for index, tool in enumerate(tools)}
    return names | {f"{chat}.function": own for chat, own in names.items()}
