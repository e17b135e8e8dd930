"""Field types of request bodies: strict, bounded by `Limits` (the validation context), never echoing a value.

null means absent everywhere; 16.0 is an integer, true is not, "16" is not.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
LABEL = re.compile(r"[A-Za-z0-9._-]+")


def wrong_type(expected: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_type", "must be {expected}", {"expected": expected})


def wrong_value(problem: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{problem}", {"problem": problem})


class Body(BaseModel):
    """An object in a request."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


def limit_of(info: ValidationInfo, name: str) -> int:
    limit: int = getattr(info.context, name)
    return limit


def _integer(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type("an integer")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type("a number")
    try:
        value = float(value)
    except OverflowError:
        raise wrong_value("is out of range") from None
    if not math.isfinite(value):
        raise wrong_value("must be finite")
    return float(value)


Integer = Annotated[int, BeforeValidator(_integer)]
Number = Annotated[float, BeforeValidator(_number)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]


def between(low: float, high: float | str, *, above: bool = False) -> AfterValidator:
    """low <= value <= high, or low < value with `above`. A string names the field of `Limits` that is the bound."""

    def check(value: float, info: ValidationInfo) -> float:
        top = limit_of(info, high) if isinstance(high, str) else high
        if (value <= low if above else value < low) or value > top:
            start = f"above {low:g}" if above else f"at least {low:.15g}"
            raise wrong_value(f"must be {start} and at most {top:.15g}")
        return value

    return AfterValidator(check)


def at_most(limit_name: str, *, low: int = 0) -> BeforeValidator:
    """Counts before anything inside is looked at."""

    def check(value: Any, info: ValidationInfo) -> Any:
        limit = limit_of(info, limit_name)
        if isinstance(value, list) and not low <= len(value) <= limit:
            raise wrong_value(f"must have {low} to {limit} entries")
        return value

    return BeforeValidator(check)


def one_of(*allowed: str) -> BeforeValidator:
    """One of a few words."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise wrong_value(f"must be one of {', '.join(allowed)}")
        return value

    return BeforeValidator(check)


def _named_choice(value: Any) -> dict[str, Any]:
    """A name alone, or an object with `name` and options, whose values the engine checks."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise wrong_type("a name, or an object with a name and options")
    return dict(value)


def _speculative(value: Any) -> dict[str, Any]:
    """Drafters' names alone, false, or an object, whose values the engine checks."""
    if value is False:
        return {"off": True}
    if isinstance(value, (str, list)):
        return {"drafters": value}
    if not isinstance(value, dict):
        raise wrong_type("an object with drafters, max_nodes, verifier or off")
    return {name: entry for name, entry in value.items() if entry is not None}


Speculative = Annotated[dict[str, Any], BeforeValidator(_speculative)]
NamedChoice = Annotated[dict[str, Any], BeforeValidator(_named_choice)]


def _seed(value: int) -> int:
    if not INT64_MIN <= value <= INT64_MAX:
        raise wrong_value("must fit into 64 bits")
    return value


def _label(value: str, info: ValidationInfo) -> str:
    limit = limit_of(info, "max_label_chars")
    if len(value) > limit or not LABEL.fullmatch(value):
        raise wrong_value(f"must be 1 to {limit} characters of A-Z a-z 0-9 . _ -")
    return value


def _short(value: str, info: ValidationInfo) -> str:
    limit = limit_of(info, "max_label_chars")
    if len(value) > limit:
        raise wrong_value(f"must have at most {limit} characters")
    return value


def _token_id(value: Any) -> int:
    token_id = _integer(value)
    if not 0 <= token_id <= INT32_MAX:
        raise wrong_value("must be a token id of the vocabulary")
    return token_id


def token_ids(value: Any) -> list[int]:
    """A list of token ids; the upper end of the vocabulary is checked later. Fast for long lists."""
    if not isinstance(value, list):
        raise wrong_type("an array of token ids")
    if set(map(type, value)) - {int}:
        value = [_token_id(item) for item in value]
    elif value and not (min(value) >= 0 and max(value) <= INT32_MAX):
        raise wrong_value("must hold token ids of the vocabulary")
    return list(value)


def _bounded_ids(limit_name: str, *, may_be_empty: bool) -> BeforeValidator:
    def check(value: Any, info: ValidationInfo) -> tuple[int, ...]:
        limit = limit_of(info, limit_name)
        if isinstance(value, list) and len(value) > limit:
            raise wrong_value(f"must have at most {limit} entries")
        ids = token_ids(value)
        if not ids and not may_be_empty:
            raise wrong_value("must not be empty; leave it out to allow all")
        return tuple(ids)

    return BeforeValidator(check)


def _strings(limit_name: str, *, single: bool) -> BeforeValidator:
    """A list of short, non-empty strings; with `single` also one string alone."""

    def check(value: Any, info: ValidationInfo) -> tuple[str, ...]:
        limit, max_chars = limit_of(info, limit_name), limit_of(info, "max_stop_chars")
        items = [value] if single and isinstance(value, str) else value
        if not isinstance(items, list):
            raise wrong_type("a string or an array of strings" if single else "an array of strings")
        if len(items) > limit:
            raise wrong_value(f"must have at most {limit} entries")
        if not all(isinstance(item, str) for item in items):
            raise wrong_type("a string or an array of strings" if single else "an array of strings")
        if not all(1 <= len(item) <= max_chars for item in items):
            raise wrong_value(f"must hold strings of 1 to {max_chars} characters")
        return tuple(items)

    return BeforeValidator(check)


def _small_object(value: Any, limit: int, what: str = "an object") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(what)
    if len(value) > limit:
        raise wrong_value(f"must have at most {limit} entries")
    return value


def _logit_bias(value: Any, info: ValidationInfo) -> dict[int, float]:
    value = _small_object(value, limit_of(info, "max_logit_bias"), "an object from token ids to numbers")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        # the key is not shown in the error: it is the client's text
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= INT32_MAX):
            raise wrong_value('must have token ids of the vocabulary as keys, for instance "42"')
        bias[int(key)] = min(max(_number(amount), -100.0), 100.0)
    return bias


def _metadata(value: Any, info: ValidationInfo) -> dict[str, Any]:
    return _small_object(value, limit_of(info, "max_metadata"))


def _template_kwargs(value: Any, info: ValidationInfo) -> dict[str, Any]:
    value = _small_object(value, limit_of(info, "max_template_kwargs"))
    if not all(item is None or isinstance(item, str | int | float) for item in value.values()):
        raise wrong_value("must hold strings, numbers, booleans and nulls only")
    return {name: item for name, item in value.items() if item is not None}


TokenIds = Annotated[list[int], BeforeValidator(token_ids)]
Seed = Annotated[Integer, AfterValidator(_seed)]
Label = Annotated[Text, AfterValidator(_label)]
ShortText = Annotated[Text, AfterValidator(_short)]
StopStrings = Annotated[tuple[str, ...], _strings("max_stop_strings", single=True)]
BadWords = Annotated[tuple[str, ...], _strings("max_bad_words", single=False)]
StopTokenIds = Annotated[tuple[int, ...], _bounded_ids("max_stop_token_ids", may_be_empty=True)]
AllowedTokenIds = Annotated[tuple[int, ...], _bounded_ids("max_logit_bias", may_be_empty=False)]
LogitBias = Annotated[dict[int, float], BeforeValidator(_logit_bias)]
Metadata = Annotated[dict[str, Any], BeforeValidator(_metadata)]
TemplateKwargs = Annotated[dict[str, Any], BeforeValidator(_template_kwargs)]
