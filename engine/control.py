"""Operators' actions on a running engine: a table of named handlers on its side, calls with answers on the client's.

An action runs between two steps, in the thread that steps, so it may touch whatever a step touches. Knows no action.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

from engine import ipc
from engine.error_codes import to_exception
from engine.errors import CapacityError, InvalidParameter, KvasirError, RequestError

logger = logging.getLogger(__name__)

Payload = dict[str, Any]  # what msgpack can carry: None, booleans, numbers, strings, bytes, lists, dicts
Handler = Callable[[Payload], Payload]


class Controls:
    """The actions that one engine offers, by name. `engine.launch` fills the table."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def add(self, name: str, handler: Handler) -> None:
        """Offers an action. Its handler raises a KvasirError for what the caller may be told. Raises ValueError."""
        if name in self._handlers:
            raise ValueError(f"there is an action {name!r} already")
        self._handlers[name] = handler

    def names(self) -> list[str]:
        return sorted(self._handlers)

    def call(self, name: str, payload: Payload) -> Payload:
        """Does it. Raises what the handler raises, and InvalidParameter for a name that nobody offers."""
        handler = self._handlers.get(name)
        if handler is None:
            raise InvalidParameter(f"this engine has no action {name!r}", param="name", code="unsupported_parameter")
        return handler(payload)

    def answer(self, message: ipc.Control) -> ipc.ControlReply:
        """The same for a call that came over the wire: errors become part of the answer."""
        try:
            return ipc.ControlReply(message.call_id, self.call(message.name, message.payload))
        except KvasirError as error:
            retry_after_s = error.retry_after_s if isinstance(error, CapacityError) else 1
            return ipc.ControlReply(
                message.call_id,
                code=getattr(error, "code", "internal_error"),
                message=str(error),
                param=getattr(error, "param", None),
                retry_after_s=retry_after_s,
            )
        except Exception:  # an action that fails must not end the requests
            logger.exception("the action %s failed", message.name)
            return ipc.ControlReply(message.call_id, code="internal_error", message=f"the action {message.name} failed")


class ControlCalls:
    """The client's side: who waits for which answer."""

    def __init__(self, send: Callable[[ipc.Control], bool]) -> None:
        """send(message) queues it for the engine process; False when there is none."""
        self._send = send
        self._call_ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Payload]] = {}

    async def call(self, name: str, payload: Payload, timeout_s: float) -> Payload:
        """The handler's answer. Raises what it raised, EngineDead when the engine ends first, EngineError when late."""
        call_id = next(self._call_ids)
        waiting = self._waiting[call_id] = asyncio.get_running_loop().create_future()
        try:
            if not self._send(ipc.Control(call_id, name, payload)):
                raise to_exception("engine_dead", "no engine process is connected")
            async with asyncio.timeout(timeout_s):
                answer: Payload = await waiting
                return answer
        except TimeoutError:
            raise to_exception(
                "internal_error", f"the engine did not do {name!r} within {timeout_s:g} seconds"
            ) from None
        finally:
            del self._waiting[call_id]

    def take(self, reply: ipc.ControlReply) -> None:
        waiting = self._waiting.get(reply.call_id)
        if waiting is None or waiting.done():
            return  # its caller has given up
        if reply.code is None:
            waiting.set_result(reply.payload)
            return
        error = to_exception(reply.code, reply.message, retry_after_s=reply.retry_after_s)
        if isinstance(error, RequestError):
            error.param = reply.param
        waiting.set_exception(error)

    def lost(self) -> None:
        """The engine process is gone, and with it all answers."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(to_exception("engine_dead"))
