"""Replays a trace: a JSONL file with one request a line. Knows no server.

timestamp    seconds, of any clock; never falling
one of       prompt (text or token ids), messages, prompt_tokens (a number: random content of that length)
max_tokens   longest answer
fields       further fields of the request's body; optional
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.client import Request
from loadtest.workloads import Conversation, Workload, single

CONTENTS = ("prompt", "messages", "prompt_tokens")
KNOWN = ("timestamp", *CONTENTS, "max_tokens", "fields")


class TraceError(ValueError):
    """The message names file, line, field and remedy."""


@dataclass(frozen=True)
class Line:
    timestamp: float
    request: Request


def read(path: Path, *, vocab_size: int, seed: int = 0) -> list[Line]:
    """`vocab_size`: random prompts are token ids below it, or words when it is 0. Raises TraceError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read the trace {path}: {error}; give a JSONL file in UTF-8") from error
    lines: list[Line] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        if raw.strip():
            line = _parse(raw, f"{path}, line {number}", vocab_size, seed + number)
            if lines and line.timestamp < lines[-1].timestamp:
                raise TraceError(
                    f"{path}, line {number}: timestamp {line.timestamp:g} is before the {lines[-1].timestamp:g} above; "
                    "sort the lines by time"
                )
            lines.append(line)
    if not lines:
        raise TraceError(f"the trace {path} has no line")
    return lines


def conversations(lines: Sequence[Line]) -> Iterator[Conversation]:
    return (single(line.request) for line in lines)


def _parse(raw: str, where: str, vocab_size: int, seed: int) -> Line:
    try:
        line = json.loads(raw)
    except ValueError as error:
        raise TraceError(f"{where}: no JSON ({error})") from error
    if not isinstance(line, dict):
        raise TraceError(f"{where}: {type(line).__name__} instead of an object")
    if unknown := sorted(set(line) - set(KNOWN)):
        raise TraceError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(KNOWN)}")
    given = [name for name in CONTENTS if name in line]
    if len(given) != 1:
        raise TraceError(f"{where}: {' and '.join(given) or 'no content'}; give exactly one of {', '.join(CONTENTS)}")
    timestamp: Any = line.get("timestamp")
    max_tokens: Any = line.get("max_tokens")
    fields: Any = line.get("fields", {})
    if not _is_number(timestamp):
        raise TraceError(f"{where}: timestamp is {timestamp!r}; give seconds as a number")
    if not _is_count(max_tokens):
        raise TraceError(f"{where}: max_tokens is {max_tokens!r}; give a whole number of at least 1")
    if not isinstance(fields, dict):
        raise TraceError(f"{where}: fields is {type(fields).__name__}; give an object")
    content = _content(given[0], line[given[0]], where, vocab_size, seed)
    return Line(float(timestamp), Request(**content, max_tokens=max_tokens, fields=fields))


def _content(name: str, value: Any, where: str, vocab_size: int, seed: int) -> dict[str, Any]:
    if name == "prompt_tokens":
        if not _is_count(value):
            raise TraceError(f"{where}: prompt_tokens is {value!r}; give a whole number of at least 1")
        return {"prompt": next(Workload(1, value, vocab_size=vocab_size, seed=seed).prompts())}
    if name == "messages":
        if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
            raise TraceError(f"{where}: messages is {value!r:.60}; give a list of objects with role and content")
        return {"messages": value}
    is_ids = isinstance(value, list) and value and all(type(token) is int for token in value)
    if not is_ids and not isinstance(value, str):
        raise TraceError(f"{where}: prompt is {value!r:.60}; give text or a list of token ids")
    return {"prompt": value}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1
