"""From a Messages body to a chat job: blocks become chat messages, thinking and tools chat's fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidParameter
from server.chat_bridge import chat_request, own_fields, renamed
from server.chat_pipeline import THINKING_SWITCHES, ChatJob, prepare
from server.context import ServerContext
from server.messages.schema import (
    REFUSED,
    Block,
    CountTokensRequest,
    DocumentBlock,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)

OWN = own_fields(MessagesRequest, *REFUSED, "chat_template_kwargs")
NAMES = {
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "tool_choice.function": "tool_choice",
    "messages": "messages",
}
ERROR_MARK = "Error: "


async def chat_job(
    context: ServerContext, body: dict[str, Any], fields: CountTokensRequest, *, tenant: str, request_id: str
) -> ChatJob:
    """Raises RequestError with the names of the Messages API in `param`."""
    translated = {
        "model": fields.model,
        "messages": _chat_messages(fields),
        "continue_final_message": True if _has_prefill(fields) else None,
        "tools": [{"type": "function", "function": _function(tool)} for tool in fields.tools] or None,
        "chat_template_kwargs": _template_kwargs(body, fields),
        **_tool_choice(fields),
        **_output(fields),
    }
    if isinstance(fields, MessagesRequest):
        translated |= {
            "max_completion_tokens": fields.max_tokens,
            "stop": fields.stop_sequences,
            "stream": fields.stream,
            "thinking_token_budget": fields.thinking.budget_tokens if fields.thinking is not None else None,
        }
    names = {f"tools.{index}.function": f"tools.{index}" for index in range(len(fields.tools))}
    names |= {f"tools.{index}.function.parameters": f"tools.{index}.input_schema" for index in range(len(fields.tools))}
    with renamed({**NAMES, **names}, whole={"messages"}):
        chat = chat_request(context, body, OWN, {k: v for k, v in translated.items() if v is not None})
        return await prepare(context, chat, tenant=tenant, request_id=request_id)


def _chat_messages(fields: CountTokensRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    system = fields.system if isinstance(fields.system, str) else "\n".join(block.text for block in fields.system)
    if system:
        messages.append({"role": "system", "content": system})
    for message in fields.messages:
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            messages.append(_assistant(message.content))
        else:
            messages += _user(message.role, message.content)
    return messages


def _assistant(blocks: Sequence[Block]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, DocumentBlock | ToolResultBlock):
            raise InvalidParameter(f"a {block.type} block belongs into a user message", param="messages")
    answer: dict[str, Any] = {"role": "assistant", "content": _content(texts) if texts else None}
    if any(thoughts):
        answer["reasoning_content"] = "\n".join(thoughts)
    if calls:
        answer["tool_calls"] = calls
    return answer


def _user(role: str, blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own; the order stays."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []

    def flush() -> None:
        if texts:
            messages.append({"role": role, "content": _content(texts)})
            texts.clear()

    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, DocumentBlock):
            texts.append(_document(block))
        elif isinstance(block, ToolResultBlock):
            flush()
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        else:
            raise InvalidParameter(f"a {block.type} block belongs into an assistant message", param="messages")
    flush()
    return messages or [{"role": role, "content": ""}]


def _result(block: ToolResultBlock) -> str:
    """Templates know no failed results: the text says it."""
    if isinstance(block.content, str):
        text = block.content
    else:
        text = "\n".join(part.text if isinstance(part, TextBlock) else _document(part) for part in block.content)
    return ERROR_MARK + text if block.is_error else text


def _document(block: DocumentBlock) -> str:
    source = block.source
    if isinstance(source.content, list):
        text = "\n".join(part.text for part in source.content)
    else:
        text = source.content if source.content is not None else source.data or ""
    return "\n".join(part for part in (block.title, block.context, text) if part)


def _content(texts: Sequence[str]) -> str | list[dict[str, Any]]:
    """One block alone as its text, several as text parts: how they are joined is up to the template."""
    if len(texts) == 1:
        return texts[0]
    return [{"type": "text", "text": text} for text in texts]


def _has_prefill(fields: CountTokensRequest) -> bool:
    """A last assistant message is the beginning of the answer. Raises InvalidParameter when it ends in a call."""
    last = fields.messages[-1]
    if last.role != "assistant":
        return False
    if not isinstance(last.content, str) and any(isinstance(block, ToolUseBlock) for block in last.content):
        raise InvalidParameter("the results of the last message's tool_use blocks are missing", param="messages")
    return True


def _function(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return function


def _tool_choice(fields: CountTokensRequest) -> dict[str, Any]:
    choice = fields.tool_choice
    if choice is None or not fields.tools:
        return {}
    chosen: dict[str, Any] = {
        "auto": "auto",
        "any": "required",
        "none": "none",
        "tool": {"type": "function", "function": {"name": choice.name}},
    }
    return {
        "tool_choice": chosen[choice.type],
        "parallel_tool_calls": False if choice.disable_parallel_tool_use else None,
    }


def _template_kwargs(body: dict[str, Any], fields: CountTokensRequest) -> Any:
    """Thinking is switched by the template; without the field it is as the model has it."""
    kwargs = body.get("chat_template_kwargs")
    if fields.thinking is None or (kwargs is not None and not isinstance(kwargs, dict)):
        return kwargs
    return {**(kwargs or {}), **dict.fromkeys(THINKING_SWITCHES, fields.thinking.type != "disabled")}


def _output(fields: CountTokensRequest) -> dict[str, Any]:
    config = fields.output_config
    if config is None:
        return {}
    shape = None
    if config.format is not None:
        shape = {"type": "json_schema", "json_schema": {"name": "output", "schema": config.format.json_schema}}
    return {"reasoning_effort": config.effort, "response_format": shape}
