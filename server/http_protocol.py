"""uvicorn's h11 protocol with what it lacks: time limits for slow senders and readers, JSON refusals, fast streams.

h11 and not httptools: only h11 bounds the size of a request head. Its cost per request is small; the cost per event of
a stream is what counts, and there an application may write past it, see WRITE_EXTENSION.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import ClassVar

import h11
import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from engine.config import Limits
from server.errors import ApiError

# In `scope["extensions"]`, for answers whose head has been sent without a length: a function that writes one part of
# the body at once, past all layers. It returns False, and has written nothing, when the application must use `send`:
# the socket takes no more for now, or the client is gone.
WRITE_EXTENSION = "kvasir.write"


class TimedProtocol(H11Protocol):
    """One connection. Use `protocol_class`, which sets the limits."""

    limits: ClassVar[Limits]
    _wrapped: ASGIApp
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _stalled_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wrapped = self.app
        self.app = self._run_app
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._head_is_late)

    def _run_app(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["http_version"] == "1.1":  # older clients get no chunks
            scope["extensions"] = {WRITE_EXTENSION: self._write}
        return self._wrapped(scope, receive, send)

    def _write(self, data: bytes) -> bool:
        """One chunk of chunked transfer coding, which h11 keeps no state about."""
        if self.flow.write_paused or self.conn.our_state is not h11.SEND_BODY or self.transport.is_closing():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_arrival()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_arrival()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # a close would wait for a reader that does not read
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this for bytes that are not HTTP and for heads that are too large."""
        limit = self.limits.max_header_bytes
        self._refuse(400, f"the request is not valid HTTP, or its head is larger than {limit} bytes", "invalid_http")

    def _watch_arrival(self) -> None:
        """Runs the timer while half a head, or the rest of a body that nobody reads, is on its way."""
        has_half_head = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        has_unread_body = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if not (has_half_head or has_unread_body):
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            seconds = self.limits.header_timeout_s
            self._refuse(408, f"the request head did not arrive within {seconds:g} seconds", "request_timeout")
        else:
            self.transport.close()

    def _watch_reader(self) -> None:
        self._stop_stall_timer()
        self._stalled_bytes = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self.limits.read_stall_s, self._check_reader)

    def _check_reader(self) -> None:
        if self.transport.get_write_buffer_size() >= self._stalled_bytes:
            self.transport.abort()
        else:
            self._watch_reader()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answers without the application, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = msgspec.json.encode(ApiError(status, message, code=code).body())
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def protocol_class(limits: Limits) -> type[TimedProtocol]:
    """The protocol with these limits, as uvicorn wants it: a class."""
    return type("LimitedProtocol", (TimedProtocol,), {"limits": limits})
