"""How log lines look, in both processes: text for people, or one JSON object per line. Knows no content."""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec

MAX_LINE_CHARS = 8192
FIELDS = "fields"  # `extra={FIELDS: {...}}` gives a record values of its own


def setup(level: str, log_format: str) -> None:
    """Sends all loggers of this process to standard error. Called once, where a process begins."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def set_level(level: str) -> None:
    """For the running process."""
    logging.getLogger().setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """One line per record; a traceback follows on lines of its own. What clients sent cannot begin a line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # the library's name
        if "\n" in record.message or "\r" in record.message:
            record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)[:MAX_LINE_CHARS]


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message, the record's own fields, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MAX_LINE_CHARS],
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-MAX_LINE_CHARS:]
        return msgspec.json.encode(line).decode()
