"""From a JSON object to a checked request: the one place that words validation errors."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from engine.config import Limits
from engine.errors import InvalidParameter, RequestError, UnsupportedParameter
from engine.metrics import Metrics
from server.fields import Body

MAX_PROBLEMS = 5

# Fields that ask for something this server does not do. Ignoring them would give an answer that only looks right.
_LATER = "is not supported by this server"
_CONSTRAINT = "constrains the output, which this server does not support"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(("structured_outputs", "structural_tag", "grammar", "regex", "regex_schema"), _CONSTRAINT),
    **dict.fromkeys(("ebnf", "json_schema", "guided_json", "guided_regex", "guided_choice"), _CONSTRAINT),
    **dict.fromkeys(("guided_grammar", "guided_decoding", "stop_regex", "thinking_token_budget"), _CONSTRAINT),
    **dict.fromkeys(("repetition_detection", "logits_processors", "logit_processors"), _CONSTRAINT),
    "custom_logit_processor": "would run foreign code, which this server never does",
    **dict.fromkeys(("tools", "functions", "function_call"), _LATER),
    **dict.fromkeys(("suffix", "use_beam_search", "logprob_token_ids", "prompt_embeds"), _LATER),
    **dict.fromkeys(("documents", "audio", "web_search_options", "mm_processor_kwargs"), _LATER),
    **dict.fromkeys(("lora_path", "return_hidden_states", "kv_transfer_params"), _LATER),
    **dict.fromkeys(("kv_policy", "speculative"), _LATER),
    "chat_template": "is chosen by the operator (--chat-template)",
}

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
    refuse_unsupported(body)
    try:
        request = kind.model_validate(body, context=limits)
    except ValidationError as error:
        raise _worded(error) from None
    num_unknown = sum(1 for name in body if name not in kind.model_fields and name not in _HARMLESS)
    if num_unknown:
        metrics.http.unknown_fields.inc(num_unknown)
    return request


# fields that are looked at here and need no place in a schema
_HARMLESS = frozenset({*UNSUPPORTED, "response_format", "tool_choice"})


def refuse_unsupported(body: dict[str, Any]) -> None:
    """Raises UnsupportedParameter for a field that would have changed the answer. null and false ask for nothing."""
    for name, reason in UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and value is not False:
            raise UnsupportedParameter(f"{name} {reason}; leave it out", param=name)
    response_format = body.get("response_format")
    if response_format is not None and response_format != {"type": "text"}:
        raise UnsupportedParameter(
            'response_format can only be {"type": "text"} here; leave it out', param="response_format"
        )
    if body.get("tool_choice") not in (None, "none"):
        raise UnsupportedParameter('tool_choice can only be "none" here; leave it out', param="tool_choice")


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
