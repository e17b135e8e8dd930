"""The socket of a child process, as a protocol of asyncio: what arrives is handed over in the same turn of the loop.

A stream's reader would take one turn more and a dozen calls for every message. Knows nothing of what is said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Conversation(asyncio.Protocol):
    """Keeps nothing, so that there is nothing to bound. `ended` is the end, and raises what brought it about."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        """take   gets what arrives; what it raises ends the conversation"""
        self._take = take
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        if self.ended.done():
            return
        try:
            self._take(data)
        except Exception as error:
            self.ended.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
