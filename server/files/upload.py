"""Reads a multipart upload onto the disk as it arrives, within its limits. Never holds more than a part of it.

`python-multipart` parses; this module bounds and checks.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from engine.config import Limits
from engine.errors import InvalidParameter
from server.errors import ApiError, ClientDisconnected

FORM_BYTES = 16 * 1024  # of an upload beyond its file: the other fields and the borders between them
FIELD_BYTES = 1024
MAX_PARTS = 8
MAX_NAME_CHARS = 255


class Upload:
    """A form with one file: `fields` by name, the file's content at `path`, its name in `filename`."""

    def __init__(self, boundary: bytes, path: Path, max_bytes: int) -> None:
        self.path = path
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.is_complete = False
        self._max_bytes = max_bytes
        self._size = 0
        self._num_parts = 0
        self._file: BinaryIO | None = None
        self._name = self._header = self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._value = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._add_content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Raises ApiError. Called in a thread: it writes to the disk."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise ApiError(400, "the body is not a valid multipart form", code="invalid_form", close=True) from None

    def close(self) -> None:
        """Ends writing. What was written stays."""
        if self._file is not None:
            self._file.close()

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise ApiError(400, f"the form has more than {MAX_PARTS} fields", code="invalid_form", close=True)
        self._headers = {}
        self._value = bytearray()

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end].lower()

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header] = self._header_value
        self._header = self._header_value = b""

    def _begin_content(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"")
        if disposition != b"form-data" or not self._name:
            raise ApiError(400, "a part of the form has no name", code="invalid_form", close=True)
        if self._name == b"file":
            if self._file is not None:
                raise InvalidParameter("give one file per upload", param="file")
            self.filename = _file_name(options.get(b"filename", b""))
            self.path.touch(0o600, exist_ok=False)
            self._file = self.path.open("wb")

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._name == b"file":
            self._size += end - start
            if self._size > self._max_bytes:
                raise too_large(self._max_bytes)
            assert self._file is not None
            self._file.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > FIELD_BYTES:
            raise ApiError(
                400, f"a field of the form is longer than {FIELD_BYTES} bytes", code="invalid_form", close=True
            )

    def _end_part(self) -> None:
        if self._name != b"file":
            self.fields[self._name.decode("utf-8", "replace")] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.is_complete = True


async def receive(request: Request, path: Path, limits: Limits) -> Upload:
    """Reads the form of a request. The caller owns what is at `path` afterwards, complete or not.

    Raises ApiError, or ClientDisconnected when the sender leaves.
    """
    upload = Upload(_boundary(request), path, limits.max_file_bytes)
    length = request.headers.get("content-length", "")
    max_body = limits.max_file_bytes + FORM_BYTES
    if length.isdecimal() and (len(length) > 18 or int(length) > max_body):
        raise too_large(limits.max_file_bytes)
    try:
        async with asyncio.timeout(limits.upload_timeout_s):
            await _read(request, upload, max_body)
    except TimeoutError:
        message = f"the upload did not arrive within {limits.upload_timeout_s:g} seconds"
        raise ApiError(408, message, code="request_timeout", close=True) from None
    finally:
        await asyncio.to_thread(upload.close)
    if not upload.is_complete:
        raise ApiError(400, "the multipart form has no end", code="invalid_form")
    if upload.filename is None:
        raise InvalidParameter("file is required", param="file", code="missing_required_parameter")
    return upload


def too_large(max_bytes: int) -> ApiError:
    message = f"the file is larger than {max_bytes} bytes"
    return ApiError(413, message, type="request_too_large", param="file", close=True)


async def _read(request: Request, upload: Upload, max_body: int) -> None:
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        data = message.get("body", b"")
        size += len(data)
        if size > max_body:
            raise too_large(max_body - FORM_BYTES)
        await asyncio.to_thread(upload.feed, data)
        if not message.get("more_body", False):
            return


def _boundary(request: Request) -> bytes:
    kind: bytes = b""
    options: dict[bytes, bytes] = {}
    with suppress(ValueError):  # a header that cannot be parsed is not the one that is needed
        kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 70:
        message = "the Content-Type header must be multipart/form-data with a boundary"
        raise ApiError(400, message, code="invalid_content_type", close=True)
    return boundary


def _file_name(given: bytes) -> str:
    """The last part of a path, printable; only ever shown."""
    text = given.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    return "".join(char for char in text if char.isprintable())[:MAX_NAME_CHARS] or "upload.jsonl"
