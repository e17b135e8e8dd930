"""From a JSON object to a checked request: the one place that words validation errors."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from engine.config import Limits
from engine.errors import InvalidParameter, RequestError, UnsupportedParameter
from engine.metrics import Metrics
from server.constraints import CONSTRAINT_FIELDS
from server.fields import Body

MAX_PROBLEMS = 5

# Fields that ask for something this server does not do. Ignoring them would give an answer that only looks right.
_LATER = "is not supported by this server"
_CONSTRAINT = "constrains the output in a way that this server does not support"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(("regex_schema", "guided_decoding", "stop_regex"), _CONSTRAINT),
    **dict.fromkeys(("repetition_detection", "logits_processors", "logit_processors"), _CONSTRAINT),
    "custom_logit_processor": "would run foreign code, which this server never does",
    "functions": "was replaced by tools; send those",
    "function_call": "was replaced by tool_choice; send that",
    **dict.fromkeys(("use_beam_search", "length_penalty", "logprob_token_ids", "prompt_embeds"), _LATER),
    **dict.fromkeys(("top_n_sigma", "xtc_probability", "dry_multiplier", "mirostat"), _LATER),
    **dict.fromkeys(("session_params", "vllm_xargs"), _LATER),
    **dict.fromkeys(("audio", "web_search_options", "mm_processor_kwargs"), _LATER),
    **dict.fromkeys(("lora_path", "return_hidden_states", "kv_transfer_params"), _LATER),
}
# What asks for nothing, besides null and false.
_NEUTRAL: dict[str, float] = {
    "length_penalty": 1,
    "top_n_sigma": -1,
    "mirostat": 0,
    "xtc_probability": 0,
    "dry_multiplier": 0,
}
# Fields that change the answer of a chat request and have no meaning elsewhere.
CHAT_ONLY = frozenset(
    {"tools", "tool_choice", "documents", "chat_template", "thinking_budget", "thinking_token_budget"}
)

_TEXT_OF_TYPE = {
    "missing": "is required",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}
_CODE_OF_TYPE = {"missing": "missing_required_parameter", "invalid_value": "invalid_value"}

Request = TypeVar("Request", bound=Body)


def parse(kind: type[Request], body: dict[str, Any], limits: Limits, metrics: Metrics) -> Request:
    """Raises InvalidParameter or UnsupportedParameter; counts fields that nobody knows."""
    known = kind.model_fields
    refuse_unsupported({name: value for name, value in body.items() if name not in known})
    for name in CHAT_ONLY.difference(known):
        if body.get(name) not in (None, "none"):
            raise UnsupportedParameter(f"{name} belongs to chat requests; leave it out here", param=name)
    for name in CONSTRAINT_FIELDS.difference(known):
        if body.get(name) not in (None, False, {"type": "text"}):
            raise UnsupportedParameter(f"{name} constrains generated text; leave it out here", param=name)
    request = validated(kind, body, limits)
    num_unknown = sum(1 for name in body if name not in known and name not in _HARMLESS)
    if num_unknown:
        metrics.http.unknown_fields.inc(num_unknown)
    return request


def validated(kind: type[Request], body: dict[str, Any], limits: Limits) -> Request:
    """The schema alone. Raises InvalidParameter."""
    try:
        return kind.model_validate(body, context=limits)
    except ValidationError as error:
        raise _worded(error) from None


# fields that are looked at here and need no place in a schema
_HARMLESS = frozenset({*UNSUPPORTED, "guided_decoding_backend"})


def refuse_unsupported(body: dict[str, Any]) -> None:
    """Raises UnsupportedParameter for a field that would have changed the answer; neutral values ask for nothing."""
    for name, reason in UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and value is not False and value != _NEUTRAL.get(name):
            raise UnsupportedParameter(f"{name} {reason}; leave it out", param=name)


def _worded(error: ValidationError) -> RequestError:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    first = problems[0]
    text = "; ".join(f"{_path(problem) or 'the body'} {_text(problem)}" for problem in problems[:MAX_PROBLEMS])
    if len(problems) > MAX_PROBLEMS:
        text += f"; and {len(problems) - MAX_PROBLEMS} more"
    code = _CODE_OF_TYPE.get(first["type"], "invalid_type")
    return InvalidParameter(text, param=_path(first) or None, code=code)


def _path(problem: ErrorDetails) -> str:
    """Dotted path of field names and indices; the tags of alternatives are left out."""
    return ".".join(str(part) for part in problem["loc"] if not str(part).startswith("#"))


def _text(problem: ErrorDetails) -> str:
    return _TEXT_OF_TYPE.get(problem["type"], problem["msg"])
