"""The `input` of POST /v1/responses: a text or items. Types that this server cannot read are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from server.fields import Body, ShortText, Text, at_most, one_of, wrong_value

ITEM_TYPES = ("message", "reasoning", "function_call", "function_call_output", "item_reference")


def _part_type(value: Any) -> Any:
    if value not in ("input_text", "output_text", "text", "refusal"):
        raise wrong_value('must be "input_text": this model reads text only')
    return value


class TextPart(Body):
    type: Annotated[str, BeforeValidator(_part_type)]
    text: Text | None = None
    refusal: Text | None = None


def _text_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "#text"
    return "#parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[Text, Tag("#text")]
    | Annotated[list[TextPart], Field(fail_fast=True), at_most("max_content_parts"), Tag("#parts")],
    Discriminator(
        _text_kind, custom_error_type="invalid_type", custom_error_message="must be a string or an array of parts"
    ),
]


class MessageItem(Body):
    type: Literal["message"] = "message"
    id: ShortText | None = None
    role: Annotated[str, one_of("user", "assistant", "system", "developer")]
    content: Content


def _json_object(value: str) -> str:
    try:
        arguments = msgspec.json.decode(value)
    except (msgspec.MsgspecError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise wrong_value("must be the text of a JSON object")
    return value


class FunctionCallItem(Body):
    type: Literal["function_call"]
    id: ShortText | None = None
    call_id: ShortText
    name: Text
    arguments: Annotated[Text, AfterValidator(_json_object)]


class FunctionCallOutputItem(Body):
    type: Literal["function_call_output"]
    id: ShortText | None = None
    call_id: ShortText
    output: Content


class ReasoningPart(Body):
    type: Annotated[str, one_of("summary_text", "reasoning_text", "text")]
    text: Text


class ReasoningItem(Body):
    type: Literal["reasoning"]
    id: ShortText | None = None
    summary: Annotated[list[ReasoningPart], Field(fail_fast=True), at_most("max_content_parts")] = Field(
        default_factory=list
    )
    content: Annotated[list[ReasoningPart], Field(fail_fast=True), at_most("max_content_parts")] | None = None


class ItemReference(Body):
    type: Literal["item_reference"] = "item_reference"
    id: ShortText


def _item_kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    if kind is None:
        # messages and references may leave their type out
        kind = "message" if "role" in value else "item_reference"
    return f"#{kind}" if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("#message")]
    | Annotated[ReasoningItem, Tag("#reasoning")]
    | Annotated[FunctionCallItem, Tag("#function_call")]
    | Annotated[FunctionCallOutputItem, Tag("#function_call_output")]
    | Annotated[ItemReference, Tag("#item_reference")],
    Discriminator(
        _item_kind,
        custom_error_type="invalid_value",
        custom_error_message=f"must be an item of type {', '.join(ITEM_TYPES)}",
    ),
]
Items = Annotated[list[Item], Field(fail_fast=True), at_most("max_messages")]
Input = Annotated[
    Annotated[Text, Tag("#text")] | Annotated[Items, Tag("#items")],
    Discriminator(
        lambda value: "#text" if isinstance(value, str) else "#items" if isinstance(value, list) else None,
        custom_error_type="invalid_type",
        custom_error_message="must be a string or an array of items",
    ),
]
