"""When a request has waited or lived too long. Checking costs O(1) while nothing is due."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.errors import CapacityError, DeadlineExceeded
from engine.scheduling.queue import LazyHeap
from engine.scheduling.request import Family


class Deadlines:
    """Two limits per family: until its first step, and until its end. All times in seconds of the scheduler's clock."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._first_step: LazyHeap[Family] = LazyHeap()
        self._end: LazyHeap[Family] = LazyHeap()

    def arrived(self, family: Family) -> None:
        limit_s = self._config.max_request_s
        asked_s = family.request.deadline_s
        self._first_step.push(family.arrival_s + self._config.max_queue_wait_s, family)
        self._end.push(family.arrival_s + (limit_s if asked_s is None else min(asked_s, limit_s)), family)

    def started(self, family: Family) -> None:
        self._first_step.discard(family)

    def ended(self, family: Family) -> None:
        self._first_step.discard(family)
        self._end.discard(family)

    def next_expired(self, now: float) -> tuple[Family, str] | None:
        """A family that is past a limit, and the error code to end it with. The caller ends it and asks again."""
        for heap, code in ((self._end, DeadlineExceeded.code), (self._first_step, CapacityError.code)):
            head = heap.first()
            if head is not None and head[0] <= now:
                return head[1], code
        return None
