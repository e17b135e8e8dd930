"""Whether the core's queue has room, decided in the front end: an answer at once, however long a step takes.

The core decides in the end; this is its bound, evaluated on the core's last report plus what was sent since.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from engine.config import SchedulerConfig
from engine.errors import QueueFull, QueueTokensFull
from engine.types import EngineStats

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1, 30
RATE_WINDOW_S = 10.0


class Admission:
    """Estimates what waits in the core."""

    def __init__(self, scheduler: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_waiting = scheduler.max_waiting_requests
        self._max_waiting_pools = scheduler.max_waiting_pools
        self._max_num_seqs = scheduler.max_num_seqs
        self._clock = clock
        self._starts: deque[float] = deque(maxlen=256)  # when requests left the queue
        self.reset()

    def reset(self) -> None:
        """A new engine process: nothing was sent to it yet."""
        self._stats = EngineStats()
        self._num_sent = 0
        self._unseen: deque[tuple[int, int, int]] = deque()  # serial, choices, tokens: sent, not in the last report
        self._unseen_choices = 0
        self._unseen_tokens = 0

    def check_queue(self, num_tokens: int, pool_tokens: int) -> None:
        """Raises QueueFull with the seconds after which there should be room. A single request fits an empty queue."""
        waiting = self._stats.num_waiting + self._unseen_choices
        free_rows = max(self._max_num_seqs - self._stats.num_running, 0)
        if waiting >= self._max_waiting + free_rows:
            raise QueueFull(
                f"{waiting} requests wait, the limit is {self._max_waiting}; retry later",
                retry_after_s=self._retry_after_s(waiting - self._max_waiting - free_rows + 1),
            )
        tokens = self._stats.waiting_tokens + self._unseen_tokens
        limit = int(self._max_waiting_pools * pool_tokens)
        if waiting and tokens + num_tokens > limit:
            raise QueueTokensFull(
                f"{tokens} prompt tokens wait and this request has {num_tokens}, the limit is {limit}; retry later",
                retry_after_s=self._retry_after_s(1),
            )

    def sent(self, num_choices: int, num_tokens: int) -> None:
        """A request went to the core."""
        self._num_sent += 1
        self._unseen.append((self._num_sent, num_choices, num_tokens))
        self._unseen_choices += num_choices
        self._unseen_tokens += num_tokens

    def started(self) -> None:
        """A request left the queue."""
        self._starts.append(self._clock())

    def report(self, stats: EngineStats, num_received: int) -> None:
        """The core's counts, in which the first `num_received` requests are included."""
        self._stats = stats
        while self._unseen and self._unseen[0][0] <= num_received:
            _, num_choices, num_tokens = self._unseen.popleft()
            self._unseen_choices -= num_choices
            self._unseen_tokens -= num_tokens

    def _retry_after_s(self, num_ahead: int) -> int:
        """Seconds until `num_ahead` more requests have left the queue, at the rate of the last seconds."""
        now = self._clock()
        recent = sum(1 for moment in self._starts if now - moment <= RATE_WINDOW_S)
        if not recent:
            return MAX_RETRY_AFTER_S if self._starts else MIN_RETRY_AFTER_S
        return min(max(math.ceil(num_ahead * RATE_WINDOW_S / recent), MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
