"""From the body of another API to a chat request: sampling fields pass through, errors name the field that was sent."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from engine.errors import RequestError, UnsupportedParameter
from server.chat_pipeline import ChatJob
from server.context import ServerContext
from server.fields import Body
from server.schemas import ChatRequest
from server.validation import UNSUPPORTED, parse

KNOWN = frozenset({*ChatRequest.model_fields, *UNSUPPORTED})


def chat_request(
    context: ServerContext,
    body: Mapping[str, Any],
    own: Collection[str],
    translated: Mapping[str, Any],
) -> ChatRequest:
    """The chat request with the fields of `translated`, and those of `body` that chat knows and that are not `own`.

    own   names that the other API defines; they have been looked at
    Raises RequestError with chat's names in `param`; see `renamed`.
    """
    passed = {name: value for name, value in body.items() if name in KNOWN and name not in own}
    num_unknown = sum(1 for name in body if name not in KNOWN and name not in own)
    if num_unknown:
        context.metrics.http.unknown_fields.inc(num_unknown)
    return parse(ChatRequest, {**passed, **translated}, context.config.limits, context.metrics)


def refuse(body: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Raises UnsupportedParameter for fields of `refused` (name -> reason). null, false and 1 for n ask for nothing."""
    for name, reason in refused.items():
        value = body.get(name)
        if value is None or value is False or (name == "n" and value == 1):
            continue
        raise UnsupportedParameter(f"{name} {reason}", param=name)


def own_fields(kind: type[Body], *others: str) -> frozenset[str]:
    """Names under which `kind` takes its fields."""
    return frozenset({field.alias or name for name, field in kind.model_fields.items()} | set(others))


async def count_prompt_tokens(context: ServerContext, job: ChatJob) -> int:
    """Tokens of the prompt, as the engine will count them."""
    prompt = job.request.prompt
    if isinstance(prompt, list):
        return len(prompt)
    return len(await context.engine.tokenize(prompt, add_special_tokens=job.request.add_special_tokens))


@contextlib.contextmanager
def renamed(names: Mapping[str, str], *, whole: Collection[str] = ()) -> Iterator[None]:
    """Errors about a chat field, or about something inside it, name the field that it was made from.

    names   beginnings of chat's dotted paths -> what stands there in the other API; the longest one counts
    whole   those of them whose inside has another form there: the rest of the path is left out
    """
    try:
        yield
    except RequestError as error:
        if error.param is None:
            raise
        known = max((name for name in names if _is_inside(error.param, name)), key=len, default=None)
        if known is None:
            raise
        param = names[known] + ("" if known in whole else error.param[len(known) :])
        raise type(error)(str(error).replace(error.param, param), param=param, code=error.code) from None


def _is_inside(path: str, name: str) -> bool:
    return path == name or path.startswith(name + ".")
