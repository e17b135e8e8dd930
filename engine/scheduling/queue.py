"""Who waits, and who is next: priority first, then round robin over tenants, then arrival order inside a tenant."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from typing import Any, Generic, TypeVar

from engine.scheduling.request import Request

T = TypeVar("T")


class LazyHeap(Generic[T]):
    """A priority queue whose items can be discarded from anywhere in O(log n) amortised time.

    Discarded entries stay in the heap until they come up, or until they outnumber the live ones. Items are hashable.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, T]] = []
        self._live: dict[T, int] = {}
        self._serial = itertools.count()

    def __len__(self) -> int:
        return len(self._live)

    def push(self, key: Any, item: T) -> None:
        """Smaller keys come first, equal ones in order of insertion. An item that is already here moves."""
        serial = next(self._serial)
        self._live[item] = serial
        heapq.heappush(self._heap, (key, serial, item))

    def discard(self, item: T) -> bool:
        """Returns whether the item was here."""
        if self._live.pop(item, None) is None:
            return False
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = [entry for entry in self._heap if self._live.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
        return True

    def first(self) -> tuple[Any, T] | None:
        """Smallest key and its item."""
        heap, live = self._heap, self._live
        while heap:
            key, serial, item = heap[0]
            if live.get(item) == serial:
                return key, item
            heapq.heappop(heap)
        return None


class WaitingQueue:
    """Waiting requests. All operations take O(log n) amortised time; nothing scans the queue.

    Within a priority every tenant with waiting requests is served once per round, so a request waits for at most
    (its place among its tenant's) rounds of (number of tenants) admissions, whatever other tenants send.
    """

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[str, LazyHeap[Request]]] = {}
        self._priorities: LazyHeap[int] = LazyHeap()
        self._ages: LazyHeap[Request] = LazyHeap()
        self.num_tokens = 0  # to be computed for those who wait; choices of one prompt count it once

    def __len__(self) -> int:
        return len(self._ages)

    def push(self, request: Request) -> None:
        """A request that comes back after preemption takes its place by arrival again."""
        level = self._levels.get(request.priority)
        if level is None:
            level = self._levels[request.priority] = OrderedDict()
            self._priorities.push(request.priority, request.priority)
        if request.tenant not in level:
            level[request.tenant] = LazyHeap()
        level[request.tenant].push(request.order, request)
        self._ages.push(request.waiting_since_s, request)
        self.num_tokens += _token_weight(request)

    def first(self) -> Request | None:
        """The request to run next. Stays the same until it is taken, discarded, or a more urgent one comes."""
        urgent = self._priorities.first()
        if urgent is None:
            return None
        head = next(iter(self._levels[urgent[1]].values())).first()
        assert head is not None, "tenants without waiting requests leave the rotation"
        return head[1]

    def take(self, request: Request) -> None:
        """Removes the first request and moves its tenant to the end of the rotation."""
        self.discard(request)
        level = self._levels.get(request.priority)
        if level is not None and request.tenant in level:
            level.move_to_end(request.tenant)

    def discard(self, request: Request) -> bool:
        """Removes a request from anywhere; returns whether it was here."""
        if not self._ages.discard(request):
            return False
        level = self._levels[request.priority]
        level[request.tenant].discard(request)
        self.num_tokens -= _token_weight(request)
        if not len(level[request.tenant]):
            del level[request.tenant]
            if not level:
                del self._levels[request.priority]
                self._priorities.discard(request.priority)
        return True

    def oldest_since_s(self) -> float | None:
        """When the longest waiting request began to wait."""
        head = self._ages.first()
        return None if head is None else head[0]


def _token_weight(request: Request) -> int:
    return request.num_tokens if request.choice == 0 else 1
