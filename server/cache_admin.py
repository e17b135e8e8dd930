"""Operators' routes for the prefix cache: statistics, pin, unpin, clear by prefix or by tenant, reset."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from engine.errors import InvalidParameter
from engine.types import GenerationRequest, SamplingParams
from server.admin import read_body
from server.auth import require_admin
from server.chat_pipeline import chat_prompt
from server.context import ServerContext
from server.fields import Body, Flag, Label, Number, Text, TokenIds
from server.generation import Generation
from server.http_responses import json_response
from server.sampling import check_ids
from server.schemas import ChatFields
from server.validation import validated

MAX_TTL_S = 30 * 24 * 3600.0


class Owner(Body):
    """Whose blocks: a tenant as the statistics name it, or its API key; and one of its salts."""

    tenant: Text | None = None
    api_key: Text | None = None
    cache_salt: Label | None = None


class PrefixFields(Owner):
    """Which beginning: text as for /v1/completions, token ids, or messages as for /v1/chat/completions."""

    model: Text | None = None  # an adapter has a cache of its own
    prompt: Text | None = None
    token_ids: TokenIds | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: Flag = False


class PinRequest(PrefixFields):
    ttl_s: Annotated[Number, Field(gt=0, le=MAX_TTL_S)] | None = None
    compute: Flag = True  # what is not cached yet


class UnpinRequest(Body):
    pin_id: Text


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.get("/admin/cache")
    async def statistics(request: Request) -> Response:
        require_admin(request, context.keyring, context.config.server)
        return json_response(await context.engine.control("cache_stats"))

    @router.post("/admin/cache/pin")
    async def pin(request: Request) -> Response:
        """Keeps a beginning in the cache until it is unpinned, cleared or too old."""
        fields = await read_body(request, context, PinRequest)
        payload = await _prefix(fields, context)
        answer = await context.engine.control("cache_pin", {**payload, "ttl_s": fields.ttl_s})
        if fields.compute and answer["pinned_blocks"] < answer["prefix_blocks"]:
            if answer["pin_id"] is not None:
                await context.engine.control("cache_unpin", {"pin_id": answer["pin_id"]})
            await _compute(request, context, payload, context.resolve_model(fields.model, with_adapters=True))
            answer = await context.engine.control("cache_pin", {**payload, "ttl_s": fields.ttl_s})
        return json_response(answer)

    @router.post("/admin/cache/unpin")
    async def unpin(request: Request) -> Response:
        fields = await read_body(request, context, UnpinRequest)
        return json_response(await context.engine.control("cache_unpin", {"pin_id": fields.pin_id}))

    @router.post("/admin/cache/clear")
    async def clear(request: Request) -> Response:
        """Forgets what begins with a prefix, or without one all of a tenant, or of one of its salts. Pins go too."""
        fields = await read_body(request, context, PrefixFields)
        if _num_prompts(fields):
            payload = await _prefix(fields, context)
        else:
            payload = {"tenant": _tenant(fields, context), "cache_salt": fields.cache_salt}
        return json_response(await context.engine.control("cache_clear", payload))

    @router.post("/reset_prefix_cache")
    async def reset(request: Request) -> Response:
        """vLLM's name: forgets everything. Running requests keep what they have."""
        require_admin(request, context.keyring, context.config.server)
        return json_response({"success": True, **await context.engine.control("cache_reset")})

    return router


def _num_prompts(fields: PrefixFields) -> int:
    return sum(given is not None for given in (fields.prompt, fields.token_ids, fields.messages))


def _tenant(fields: Owner, context: ServerContext) -> str:
    """Raises InvalidParameter when it is not told, where there are keys."""
    if fields.api_key is not None:
        tenant = context.keyring.tenant_of(fields.api_key)
        if tenant is None:
            raise InvalidParameter("that API key is not one of this server's", param="api_key")
        return tenant
    if fields.tenant is None and context.keyring:
        raise InvalidParameter("tell whose blocks are meant, by tenant or api_key", param="tenant")
    return fields.tenant or ""


async def _prefix(fields: PrefixFields, context: ServerContext) -> dict[str, Any]:
    """What the engine's actions take. Raises InvalidParameter."""
    info = context.require_ready()
    if _num_prompts(fields) != 1:
        raise InvalidParameter("exactly one of prompt, token_ids and messages is required", param="prompt")
    model = context.resolve_model(fields.model, with_adapters=True)
    adapter = context.engine.adapters.get(model)
    ids = fields.token_ids
    if ids is not None:
        check_ids(ids, info.vocab_size, "token_ids")
    elif fields.prompt is not None:
        ids = await context.engine.tokenize(fields.prompt)
    else:
        chat = validated(
            ChatFields,
            {"messages": fields.messages, "add_generation_prompt": fields.add_generation_prompt},
            context.config.limits,
        )
        ids = await context.engine.tokenize(chat_prompt(chat), add_special_tokens=False)
    return {
        "token_ids": ids,
        "tenant": _tenant(fields, context),
        "cache_salt": fields.cache_salt,
        "adapter": "" if adapter is None else adapter.key,
    }


async def _compute(request: Request, context: ServerContext, payload: dict[str, Any], model: str) -> None:
    """Has the engine read the prefix once, as its owner."""
    generation_request = GenerationRequest(
        prompt=payload["token_ids"],
        sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        tenant=payload["tenant"],
        cache_salt=payload["cache_salt"] or "",
        adapter=context.adapter_of(model),
        client_request_id=request.state.request_id,
    )
    async with Generation(context, [generation_request], request.receive) as generation:
        await generation.collect()
