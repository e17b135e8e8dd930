"""The lines of a batch's input file: what each must have, and where each is found again. Knows no engine.

The same checks serve /v1/batches and `kvasir batch`; the request bodies themselves are checked when they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import Limits
from server.body import parse_object
from server.errors import ApiError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_ID_CHARS = 512
MAX_PROBLEMS = 100  # told of one file


@dataclass(frozen=True, slots=True)
class Line:
    """One request: bytes `start` to `start + size` of the file."""

    number: int  # from 1 on, empty lines counted
    start: int
    size: int
    custom_id: str


@dataclass(frozen=True, slots=True)
class Problem:
    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


@dataclass
class Scan:
    """What is in a file. With problems nothing of it runs."""

    lines: list[Line] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    model: str | None = None  # that all requests name


def scan(path: Path, limits: Limits, endpoint: str | None) -> Scan:
    """Reads the whole file once, line by line. For a thread of its own.

    endpoint   that all requests must name; None: any of ENDPOINTS
    """
    result = Scan()
    seen: dict[str, int] = {}
    models: set[str | None] = set()
    for number, start, data in _raw_lines(path, limits.max_body_bytes):
        if len(result.lines) == limits.max_batch_lines:
            result.problems.append(
                Problem("too_many_lines", f"a batch may have at most {limits.max_batch_lines} requests", number)
            )
            return result
        request = _check(number, data, limits, endpoint, seen, result.problems)
        if request is not None:
            models.add(request["body"].get("model") or None)
            result.lines.append(Line(number, start, len(data), request["custom_id"]))
        if len(models) > 1:
            message = "all requests of a batch must name the same model"
            result.problems.append(Problem("mismatched_model", message, number, "body.model"))
            return result
        if len(result.problems) >= MAX_PROBLEMS:
            return result
    if not result.lines and not result.problems:
        result.problems.append(Problem("empty_file", "the input file has no requests"))
    result.model = next(iter(models), None)
    return result


def read_line(path: Path, line: Line, limits: Limits) -> dict[str, Any]:
    """A request that was scanned before."""
    with path.open("rb") as file:
        file.seek(line.start)
        return parse_object(file.read(line.size), limits)


def _raw_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, start and bytes of the lines that are not empty. One that is too long is cut, which its check notices."""
    with path.open("rb") as file:
        number = start = 0
        while data := file.readline(max_bytes + 2):
            number += 1
            if len(data) == max_bytes + 2 and not data.endswith(b"\n"):
                while (rest := file.readline(max_bytes)) and not rest.endswith(b"\n"):
                    continue
            if stripped := data.rstrip(b"\r\n"):
                yield number, start, stripped
            start = file.tell()


def _check(
    number: int, data: bytes, limits: Limits, endpoint: str | None, seen: dict[str, int], problems: list[Problem]
) -> dict[str, Any] | None:
    """The request, or None with a problem noted."""

    def wrong(code: str, message: str, param: str | None = None) -> None:
        problems.append(Problem(code, message, number, param))

    if len(data) > limits.max_body_bytes:
        wrong("line_too_large", f"a line may have at most {limits.max_body_bytes} bytes")
        return None
    try:
        request = parse_object(data, limits)
    except ApiError as error:
        wrong("invalid_json_line", str(error).replace("the request body", "the line", 1))
        return None
    custom_id, body = request.get("custom_id"), request.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        wrong("invalid_custom_id", f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters", "custom_id")
    elif custom_id in seen:
        wrong("duplicate_custom_id", f"custom_id is that of line {seen[custom_id]}; each must be unique", "custom_id")
    elif request.get("method") != "POST":
        wrong("invalid_method", "method must be POST", "method")
    elif request.get("url") not in (ENDPOINTS if endpoint is None else (endpoint,)):
        expected = endpoint or f"one of {', '.join(ENDPOINTS)}"
        wrong("invalid_url" if endpoint is None else "mismatched_url", f"url must be {expected}", "url")
    elif not isinstance(body, dict):
        wrong("invalid_body", "body must be an object", "body")
    elif body.get("stream") or body.get("background"):
        name = "stream" if body.get("stream") else "background"
        wrong("invalid_body", f"{name} has no meaning in a batch; leave it out", f"body.{name}")
    elif not isinstance(body.get("model") or "", str):
        wrong("invalid_body", "model must be a string", "body.model")
    else:
        seen[custom_id] = number
        return request
    return None
