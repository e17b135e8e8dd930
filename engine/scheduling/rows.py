"""Batch rows: which request has which, and which the runner has still to be told are free."""

from __future__ import annotations

import heapq

from engine.scheduling.request import Request


class RowSlots:
    """Rows 0 .. num_rows - 1. The lowest free one is taken first, so that rows in use stay close together."""

    def __init__(self, num_rows: int) -> None:
        self._requests: list[Request | None] = [None] * num_rows
        self._free = list(range(num_rows))
        self._unreported: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def __getitem__(self, row: int) -> Request:
        request = self._requests[row]
        assert request is not None, f"row {row} is free"
        return request

    def take(self, request: Request) -> int:
        row = heapq.heappop(self._free)
        self._requests[row] = request
        request.row = row
        return row

    def release(self, request: Request) -> None:
        assert request.row is not None, "only a running request has a row"
        self._requests[request.row] = None
        heapq.heappush(self._free, request.row)
        self._unreported.append(request.row)
        request.row = None

    def take_unreported(self) -> tuple[int, ...]:
        """Rows freed since the last call."""
        rows, self._unreported = tuple(self._unreported), []
        return rows

    def violations(self) -> list[str]:
        """What is wrong: empty when all is well."""
        used = [row for row, request in enumerate(self._requests) if request is not None]
        problems = [f"row {row} has a request with row {self[row].row}" for row in used if self[row].row != row]
        if sorted(self._free + used) != list(range(len(self._requests))):
            problems.append(f"rows in use {used} and free rows {sorted(self._free)} are not all rows once")
        return problems
