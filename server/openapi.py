"""The OpenAPI document: what each route takes, with an example, and what it answers; bodies from the real models.

Routes read bodies and queries themselves, so FastAPI cannot see them. To document a new route, add a line to BODIES,
one to QUERIES when it reads its query, and one to `answers.ANSWERS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server import (
    adapters,
    admin,
    cache_admin,
    schemas,
    tokenize,
)
from server.answers import ANSWERS
from server.anthropic_errors import is_anthropic
from server.batches import routes as batches
from server.fields import Body
from server.files import paging
from server.files import routes as files
from server.messages import schema as messages_schema
from server.pooling import schemas as pooling_schemas
from server.responses import routes as responses
from server.responses import schema as responses_schema

_REF = "#/components/schemas/{name}"
_STREAMS = frozenset(
    {
        *((path, "post") for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")),
        ("/v1/responses/{response_id}", "get"),
    }
)
_CONTENT_TYPES = {
    **dict.fromkeys(("/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"), "text/plain"),
    "/v1/files/{file_id}/content": "application/octet-stream",
}
_HELLO = [{"role": "user", "content": "Say hello."}]


@dataclass(frozen=True)
class Doc:
    """The JSON body of a POST route. Several models: the body is one of them."""

    models: tuple[type[Body], ...]
    example: dict[str, Any]
    is_required: bool = field(default=True)


def _doc(*models: type[Body], is_required: bool = True, **example: Any) -> Doc:
    return Doc(models, example, is_required)


_SCORE = _doc(pooling_schemas.ScoreRequest, queries="cats", documents=["dogs", "stones"])
_RERANK = _doc(pooling_schemas.RerankRequest, query="cats", documents=["dogs", "stones"], top_n=1)
_CLASSIFY = _doc(pooling_schemas.ClassifyRequest, input="I like it")
BODIES: dict[str, Doc] = {
    "/v1/chat/completions": _doc(schemas.ChatRequest, messages=_HELLO, max_tokens=16),
    "/v1/completions": _doc(schemas.CompletionRequest, prompt="Once upon a time", max_tokens=16),
    "/v1/responses": _doc(responses_schema.ResponsesRequest, input="Say hello.", max_output_tokens=16),
    "/v1/responses/input_tokens": _doc(responses_schema.ResponsesRequest, input="Say hello."),
    "/v1/messages": _doc(messages_schema.MessagesRequest, model="", messages=_HELLO, max_tokens=16),
    "/v1/messages/count_tokens": _doc(messages_schema.CountTokensRequest, model="", messages=_HELLO),
    "/v1/embeddings": _doc(pooling_schemas.EmbeddingRequest, pooling_schemas.ChatEmbeddingRequest, input="a text"),
    "/pooling": _doc(pooling_schemas.PoolingBody, pooling_schemas.ChatEmbeddingRequest, input="a text"),
    **dict.fromkeys(("/classify", "/v1/classify"), _CLASSIFY),
    **dict.fromkeys(("/score", "/v1/score"), _SCORE),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), _RERANK),
    "/v1/batches": _doc(
        batches.BatchRequest, input_file_id="file-0123", endpoint="/v1/chat/completions", completion_window="24h"
    ),
    "/tokenize": _doc(tokenize.TextTokenizeRequest, tokenize.ChatTokenizeRequest, prompt="a text"),
    "/detokenize": _doc(tokenize.DetokenizeRequest, tokens=[97, 98]),
    "/v1/load_lora_adapter": _doc(adapters.LoadRequest, lora_name="my-adapter", lora_path="my-adapter"),
    "/v1/unload_lora_adapter": _doc(adapters.UnloadRequest, lora_name="my-adapter"),
    "/admin/drain": _doc(admin.DrainRequest, is_required=False, timeout_s=5),
    "/abort_requests": _doc(admin.AbortRequest, is_required=False, request_ids=["my-request"]),
    "/admin/log_level": _doc(admin.LogLevelRequest, level="info"),
    "/start_profile": _doc(admin.ProfileRequest, is_required=False, steps=10),
    "/admin/cache/pin": _doc(cache_admin.PinRequest, prompt="You are a helpful assistant.", ttl_s=3600),
    "/admin/cache/unpin": _doc(cache_admin.UnpinRequest, pin_id="pin-0123456789abcdef01234567"),
    "/admin/cache/clear": _doc(cache_admin.PrefixFields, cache_salt="project-a"),
}

_ORDER = {"type": "string", "enum": ["asc", "desc"], "default": "desc"}
_ID = {"type": "string", "minLength": 1, "maxLength": paging.MAX_TEXT}


def _limit(high: int, default: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 1, "maximum": high, "default": default}


# what routes read from their query: path -> method -> name -> schema
QUERIES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "/v1/files": {
        "get": {"purpose": _ID, "after": _ID, "limit": _limit(files.MAX_PAGE, files.MAX_PAGE), "order": _ORDER}
    },
    "/v1/batches": {"get": {"after": _ID, "limit": _limit(batches.MAX_PAGE, batches.DEFAULT_PAGE)}},
    "/v1/responses/{response_id}": {
        "get": {
            "stream": {"type": "boolean", "default": False},
            "starting_after": {"type": "integer", "minimum": 0, "maximum": responses.MAX_SEQUENCE_NUMBER},
        }
    },
    "/v1/responses/{response_id}/input_items": {
        "get": {"after": _ID, "limit": _limit(responses.MAX_PAGE, responses.DEFAULT_PAGE), "order": _ORDER}
    },
    "/sleep": {
        "post": {
            "level": {"type": "string", "enum": list(admin.SLEEP_LEVELS), "default": admin.SLEEP_LEVELS[0]},
            "mode": {"type": "string", "enum": list(admin.SLEEP_MODES), "default": admin.SLEEP_MODES[0]},
        }
    },
}
# POST routes that take none
WITHOUT_BODY = frozenset(
    {
        *("/sleep", "/wake_up", "/stop_profile", "/reset_prefix_cache"),
        *("/v1/responses/{response_id}/cancel", "/v1/batches/{batch_id}/cancel"),
    }
)
# POST routes that take a multipart form, with its schema
UPLOADS: dict[str, dict[str, Any]] = {
    "/v1/files": {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "contentMediaType": "application/octet-stream"},
            "purpose": {"const": "batch"},
            "expires_after[anchor]": {"const": "created_at"},
            "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
        },
    }
}

# Fields that take several forms, which their validators bring into one: the models tell only that one.
_IDS = {"type": "array", "items": {"type": "integer"}}
_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_TEXTS = {"anyOf": [*_STRINGS["anyOf"], _IDS, {"type": "array", "items": _IDS}]}
_POOLING = ("EmbeddingRequest", "PoolingBody", "ChatEmbeddingRequest", "ClassifyRequest")
_PAIR_FIELDS = ("queries", "text_1", "data_1", "documents", "text_2", "data_2", "items")
_FORMS: dict[tuple[str, str], dict[str, Any]] = {
    ("CompletionRequest", "prompt"): _TEXTS,
    **{(name, "input"): _TEXTS for name in _POOLING},
    **{("ScoreRequest", name): _STRINGS for name in _PAIR_FIELDS},
    ("CompletionRequest", "stop"): _STRINGS,
    ("ChatRequest", "stop"): _STRINGS,
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {"type": {"const": "error"}, "error": {"type": "object", "required": ["type", "message"]}},
}


def install(api: FastAPI) -> None:
    """Makes `api` serve the document that `document` builds."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = document(api)
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def document(api: FastAPI) -> dict[str, Any]:
    """The routes as FastAPI knows them, with bodies, answers, errors and keys."""
    built: dict[str, Any] = get_openapi(title=api.title, version=api.version, routes=api.routes)
    components = {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR, **_answer_components()}
    for path, operations in built["paths"].items():
        for method, operation in operations.items():
            doc = BODIES.get(path) if method == "post" else None
            if doc is not None:
                operation["requestBody"] = _request_body(doc, components)
            elif method == "post" and path in UPLOADS:
                form = {"multipart/form-data": {"schema": UPLOADS[path]}}
                operation["requestBody"] = {"required": True, "content": form}
            if (query := QUERIES.get(path, {}).get(method)) is not None:
                in_path = [given for given in operation.get("parameters", ()) if given["in"] == "path"]
                operation["parameters"] = in_path + [
                    {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in query.items()
                ]
            operation["responses"] = _responses(path, method)
    built["components"] = {
        "schemas": components,
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        },
    }
    built["security"] = [{"bearer": []}, {"header": []}, {}]
    return built


def _request_body(doc: Doc, components: dict[str, Any]) -> dict[str, Any]:
    names = [_add_model(model, components) for model in doc.models]
    refs = [{"$ref": _REF.format(name=name)} for name in names]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {
        "required": doc.is_required,
        "content": {"application/json": {"schema": schema, "example": doc.example}},
    }


def _add_model(model: type[Body], components: dict[str, Any]) -> str:
    """Parts are named after the whole: models of different routes may share a name."""
    name = model.__name__
    schema = model.model_json_schema(ref_template=_REF.format(name=f"{name}.{{model}}"))
    for part, definition in schema.pop("$defs", {}).items():
        components[f"{name}.{part}"] = definition
    for (owner, prop), form in _FORMS.items():
        if owner == name and prop in schema["properties"]:
            schema["properties"][prop] = form
    components[name] = schema
    return name


def _answer_components() -> dict[str, Any]:
    _, components = msgspec.json.schema_components(set(ANSWERS.values()), ref_template=_REF)
    return components


def _responses(path: str, method: str) -> dict[str, Any]:
    error = "AnthropicError" if is_anthropic(path) else "Error"
    kind = _CONTENT_TYPES.get(path, "application/json")
    schema: dict[str, Any] = {"type": "object" if kind == "application/json" else "string"}
    if (answer := ANSWERS.get((path, method))) is not None:
        schema = {"$ref": _REF.format(name=answer.__name__)}
    content: dict[str, Any] = {kind: {"schema": schema}}
    if (path, method) in _STREAMS:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    failure = {"content": {"application/json": {"schema": {"$ref": _REF.format(name=error)}}}}
    return {
        "200": {"description": "The answer", "content": content},
        "4XX": {"description": "The request is refused", **failure},
        "5XX": {"description": "The server cannot answer now", **failure},
    }
