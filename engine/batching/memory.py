"""How much of a batch may run at a time: as much as is expected to fit the KV cache, not a fixed number of requests.

Source: BatchLLM (arXiv:2412.03594), memory-centric token batching. The scheduler fills each step up with chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

DEFAULT_OUTPUT = 256  # tokens; expected of a request that names no bound, before there is any history


class OutputEstimate:
    """Expected output of a request: what it allows at most, or what the others of its batch produced on average."""

    def __init__(self) -> None:
        self._num_done = 0
        self._num_tokens = 0

    def observe(self, num_tokens: int) -> None:
        """A request has produced so many tokens."""
        self._num_done += 1
        self._num_tokens += num_tokens

    def expected(self, max_tokens: int) -> int:
        """max_tokens   the request's bound; <= 0: it has none but the context"""
        usual = -(-self._num_tokens // self._num_done) if self._num_done else DEFAULT_OUTPUT
        return max(min(max_tokens, usual) if max_tokens > 0 else usual, 1)


class MemoryBudget:
    """Tokens that the running requests are expected to hold at their longest; a shared prefix counts once.

    A request that exceeds the budget alone still runs, alone: the scheduler has accepted that it can.
    """

    def __init__(self, capacity: int, max_requests: int) -> None:
        """capacity   tokens; max_requests   rows of a step that the batch may take"""
        self._capacity = capacity
        self._max_requests = max_requests
        self._used = 0
        self._prefixes: Counter[Hashable] = Counter()
        self.num_running = 0

    def fits(self, own_tokens: int, prefix: Hashable = None, prefix_tokens: int = 0) -> bool:
        """Whether a request may start: own tokens are those beyond its group's prefix, output included."""
        if not self.num_running:
            return True
        new = own_tokens + (0 if self._prefixes[prefix] else prefix_tokens)
        return self.num_running < self._max_requests and self._used + new <= self._capacity

    def add(self, own_tokens: int, prefix: Hashable = None, prefix_tokens: int = 0) -> None:
        self.hold(prefix, prefix_tokens)
        self._used += own_tokens
        self.num_running += 1

    def remove(self, own_tokens: int, prefix: Hashable = None, prefix_tokens: int = 0) -> None:
        """The request that was added with these has ended; the last one of a group gives its prefix back."""
        self.let_go(prefix, prefix_tokens)
        self._used -= own_tokens
        self.num_running -= 1

    def hold(self, prefix: Hashable, prefix_tokens: int) -> None:
        """Counts a prefix before, between and after the requests that use it."""
        self._used += 0 if self._prefixes[prefix] else prefix_tokens
        self._prefixes[prefix] += 1

    def let_go(self, prefix: Hashable, prefix_tokens: int) -> None:
        """Takes back one `hold`."""
        self._prefixes[prefix] -= 1
        if not self._prefixes[prefix]:
            del self._prefixes[prefix]
            self._used -= prefix_tokens
