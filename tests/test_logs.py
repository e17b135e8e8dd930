"""Log lines: JSON with fields, text that clients cannot forge lines in."""

from __future__ import annotations

import json
import logging
import sys

from engine.logs import FIELDS, JsonFormatter, TextFormatter


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("a.logger", logging.INFO, "file", 1, message, None, None)
    made.__dict__.update(extra)
    return made


def test_a_json_line_has_the_records_fields() -> None:
    line = JsonFormatter().format(record("request r1: done", **{FIELDS: {"request_id": "r1", "output_tokens": 3}}))
    told = json.loads(line)
    assert "\n" not in line
    assert (told["level"], told["logger"], told["message"]) == ("info", "a.logger", "request r1: done")
    assert (told["request_id"], told["output_tokens"]) == ("r1", 3)
    assert told["time"].endswith("Z")


def test_a_json_line_carries_the_traceback() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        line = JsonFormatter().format(record("failed", exc_info=sys.exc_info()))
    assert "ValueError: no" in json.loads(line)["traceback"]


def test_what_a_client_sent_begins_no_line() -> None:
    line = TextFormatter().format(record("bad id a\r\n2030-01-01 ERROR forged"))
    assert "\n" not in line
    assert "\r" not in line
    assert len(TextFormatter().format(record("x" * 100_000))) < 10_000
