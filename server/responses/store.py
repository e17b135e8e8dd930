"""Responses that were asked to be kept: in memory, per API key, bounded in number, bytes and time.

What one key stores never pushes out what another one stores, and no key learns of another's ids.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config import Limits
from engine.errors import CapacityError
from server.context import Abortable
from server.sse import encode


class Cancelled(Exception):
    """Somebody has cancelled or deleted the response."""


class Turn:
    """Items of one response, after those of the responses before it.

    A turn keeps the turns before it alive: deleting a response does not break what was chained to it.
    """

    def __init__(self, items: Sequence[dict[str, Any]], parent: Turn | None = None) -> None:
        self.items = tuple(items)
        self.parent = parent
        # bytes from the beginning of the conversation on, about; what responses share is counted for each of them
        self.size: int = sum(len(encode(item)) for item in self.items) + (parent.size if parent else 0)

    def all_items(self) -> Iterator[dict[str, Any]]:
        """From the beginning of the conversation on."""
        turns = [self]
        while (parent := turns[-1].parent) is not None:
            turns.append(parent)
        for turn in reversed(turns):
            yield from turn.items


@dataclass
class StoredResponse:
    """One response, finished or running in the background."""

    tenant: str
    response: dict[str, Any]  # as the API shows it now
    input: Turn  # what the model read, without instructions
    context: Turn  # and what it wrote: what the next response goes on from
    has_log: bool = False  # created with stream and background: its events can be read again
    log: list[bytes] = field(default_factory=list)  # frames; the index is the sequence number
    log_bytes: int = 0  # of the first `_num_counted` frames
    _num_counted: int = 0
    running: Abortable | None = None
    size: int = 0
    expires_at: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # a new one after each change

    @property
    def id(self) -> str:
        response_id: str = self.response["id"]
        return response_id

    @property
    def frames(self) -> list[bytes] | None:
        """Where the writer puts events; None when they are not kept."""
        return self.log if self.has_log else None

    def count_log(self) -> int:
        """Bytes of the log now."""
        self.log_bytes += sum(map(len, self.log[self._num_counted :]))
        self._num_counted = len(self.log)
        return self.log_bytes

    def cancel(self) -> None:
        """Ends the work, if it still runs."""
        if self.running is not None:
            self.running.abort(Cancelled())

    def notify(self) -> None:
        """Wakes those who wait for more of the log or for the end."""
        self.changed.set()
        self.changed = asyncio.Event()


class ResponseStore:
    """Forgets the oldest first; what still runs is kept, its number is bounded by the requests in flight."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._entries: dict[str, OrderedDict[str, StoredResponse]] = {}
        self._sizes: dict[str, int] = {}

    @property
    def is_on(self) -> bool:
        return self._limits.max_stored_responses > 0

    def put(self, entry: StoredResponse) -> None:
        """Adds the entry, or takes note that it has changed. One that is larger than all the room is forgotten."""
        own = self._entries.setdefault(entry.tenant, OrderedDict())
        if entry.id not in own:
            entry.expires_at = self._clock() + self._limits.stored_response_ttl_s
            own[entry.id] = entry
        size = _size(entry)
        self._sizes[entry.tenant] = self._sizes.get(entry.tenant, 0) + size - entry.size
        entry.size = size
        self._expire()
        self._make_room(entry.tenant)

    def log_has_grown(self, entry: StoredResponse) -> None:
        """Counts new events of a running response. Raises CapacityError when there is no room for them."""
        own = self._entries.get(entry.tenant)
        if own is None or entry.id not in own:
            return
        num_new = -entry.log_bytes + entry.count_log()
        entry.size += num_new
        self._sizes[entry.tenant] += num_new
        self._make_room(entry.tenant)
        limit = self._limits.max_stored_response_bytes
        if self._sizes[entry.tenant] > limit:
            raise CapacityError(
                f"the events of this API key's background responses take more than {limit} bytes; ask for fewer at a "
                "time, or without stream"
            )

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        self._expire()
        own = self._entries.get(tenant)
        return None if own is None else own.get(response_id)

    def delete(self, entry: StoredResponse) -> None:
        own = self._entries.get(entry.tenant)
        if own is None or own.pop(entry.id, None) is None:
            return
        self._sizes[entry.tenant] -= entry.size
        entry.size = 0
        if not own:
            del self._entries[entry.tenant], self._sizes[entry.tenant]

    def items(self, tenant: str) -> dict[str, dict[str, Any]]:
        """All input and output items of a key by their id, for references to them."""
        self._expire()
        entries = list(self._entries.get(tenant, OrderedDict()).values())
        return {item["id"]: item for entry in entries for turn in (entry.input, entry.context) for item in turn.items}

    def _expire(self) -> None:
        now = self._clock()
        for own in list(self._entries.values()):
            for entry in list(own.values()):
                if entry.expires_at > now:
                    break
                if entry.running is None:
                    self.delete(entry)

    def _make_room(self, tenant: str) -> None:
        if not self._is_full(tenant):
            return
        for entry in [entry for entry in self._entries[tenant].values() if entry.running is None]:
            self.delete(entry)
            if not self._is_full(tenant):
                return

    def _is_full(self, tenant: str) -> bool:
        limits = self._limits
        is_crowded = len(self._entries.get(tenant, ())) > limits.max_stored_responses
        return is_crowded or self._sizes.get(tenant, 0) > limits.max_stored_response_bytes


def _size(entry: StoredResponse) -> int:
    return len(encode(entry.response)) + entry.count_log() + entry.context.size
