"""What a step costs: seconds by rows and by context, learnt while serving. Knows no request, no draft and no model.

Rows are the tokens of a step (roots, drafted nodes, prompt tokens); context is the number of cached tokens that it
reads. A row is cheap where reading the context dominates, which is why there is a table for each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROW_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Upper ends of the row buckets; what is larger falls into one more."""

_RATE = 0.1  # of a new time in a cell's average, once the cell has as many as that
_MAX_JUMP = 1.5  # a stall of the machine counts as at most so many times what was known: a few must not turn a decision
_LASTS = 16  # observations for which a curve is used before it is made anew
_NUM_FIRST = 3  # of the first so many times of a cell the shortest counts: first calls also build and load things
_ASSUMED_OVERHEAD = 1.3  # likewise: of a step that verifies over a plain one
_ASSUMED_ROWS = 16.0  # before anything is known: so many rows more take twice the time of one


@dataclass(slots=True)
class _Cell:
    num_rows: float  # averages
    seconds: float
    count: int = 1

    def add(self, num_rows: int, seconds: float) -> None:
        self.count += 1
        if self.count <= _NUM_FIRST:
            self.num_rows, self.seconds = float(num_rows), min(self.seconds, seconds)
            return
        rate = max(_RATE, 1.0 / self.count)
        self.num_rows += rate * (num_rows - self.num_rows)
        self.seconds += rate * (min(seconds, _MAX_JUMP * self.seconds) - self.seconds)


class CostCurve:
    """Seconds by number of rows: never falling, linear between what was measured and beyond it."""

    def __init__(self, points: Sequence[tuple[float, float, float]]) -> None:
        """points: (rows, seconds, weight), at least one, ascending in rows."""
        levels = isotonic([seconds for _, seconds, _ in points], [weight for _, _, weight in points])
        self._rows = [rows for rows, _, _ in points]
        self._seconds = levels
        self._rows_array, self._seconds_array = np.array(self._rows), np.array(levels)  # lists cost ten times as much
        if len(points) == 1:
            self._slope_after = levels[0] / (points[0][0] - 1.0 + _ASSUMED_ROWS)
        else:
            # a last stretch that happened to be flat does not make all rows after it free
            self._slope_after = max(self._slope(-2), self._slope(0))

    def __call__(self, num_rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows [n] -> seconds [n]."""
        beyond = np.maximum(num_rows - self._rows[-1], 0.0)
        known = np.interp(num_rows, self._rows_array, self._seconds_array)
        found: NDArray[np.float64] = known + self._slope_after * beyond
        return found

    def at(self, num_rows: int) -> float:
        """The same for one number, without arrays."""
        rows, seconds = self._rows, self._seconds
        place = bisect_left(rows, num_rows)
        if place == 0:
            return seconds[0]
        if place == len(rows):
            return seconds[-1] + self._slope_after * (num_rows - rows[-1])
        share = (num_rows - rows[place - 1]) / (rows[place] - rows[place - 1])
        return seconds[place - 1] + share * (seconds[place] - seconds[place - 1])

    def _slope(self, first: int, last: int = -1) -> float:
        return (self._seconds[last] - self._seconds[first]) / (self._rows[last] - self._rows[first])


class CostTable:
    """Measured times of steps. Plain decoding has a table of its own: it may run another, faster path."""

    def __init__(self) -> None:
        self._cells: tuple[dict[int, dict[int, _Cell]], ...] = ({}, {})  # [is plain][context bucket][row bucket]
        self._curves: dict[tuple[bool, int], CostCurve] = {}
        self._num_unseen = 0  # observations that the curves do not have
        self.is_settled = False  # whether anything was measured often enough to be believed

    def observe(self, num_rows: int, num_context_tokens: int, seconds: float, *, is_plain: bool) -> None:
        """A step took so long. is_plain: every row was one decoded token, and nothing was drafted."""
        if num_rows <= 0 or seconds <= 0.0:
            return
        bucket = context_bucket(num_context_tokens)
        cells = self._cells[is_plain].setdefault(bucket, {})
        place = bisect_left(ROW_EDGES, num_rows)
        cell = cells.get(place)
        if cell is None:
            cell = cells[place] = _Cell(float(num_rows), seconds)
        else:
            cell.add(num_rows, seconds)
        self._num_unseen += 1
        if cell.count <= _NUM_FIRST or self._num_unseen >= _LASTS:
            self._curves.clear()
            self._num_unseen = 0
            self.is_settled = self.is_settled or cell.count >= _NUM_FIRST

    def knows_plain(self, num_rows: int, num_context_tokens: int, *, is_exact: bool = False) -> bool:
        """Whether plain steps of about so many rows were measured, at the nearest context that there is, or at about
        this one.
        """
        tables = self._cells[True]
        bucket = context_bucket(num_context_tokens)
        if not tables or (is_exact and bucket not in tables):
            return False
        cell = tables[min(tables, key=lambda other: (abs(other - bucket), other))].get(bisect_left(ROW_EDGES, num_rows))
        return cell is not None and cell.count >= _NUM_FIRST

    def cost(self, num_rows: int, num_context_tokens: int) -> float:
        """Seconds of a step that verifies drafts, or mixes decoding with prompts."""
        return self.curve(num_context_tokens).at(num_rows)

    def plain_cost(self, num_rows: int, num_context_tokens: int) -> float:
        """Seconds of the same step without any draft."""
        return self.curve(num_context_tokens, is_plain=True).at(num_rows)

    def curve(self, num_context_tokens: int, *, is_plain: bool = False) -> CostCurve:
        """Costs at one context, for many calls. What is observed later shows in curves that are asked for later."""
        key = (is_plain, context_bucket(num_context_tokens))
        found = self._curves.get(key)
        if found is None:
            found = self._curves[key] = self._make(*key)
        return found

    def _make(self, is_plain: bool, bucket: int) -> CostCurve:
        own, other = _settled(self._cells[is_plain]), _settled(self._cells[not is_plain])
        share = 1.0 if is_plain or own or not other else _ASSUMED_OVERHEAD
        tables = own or other
        tables = tables or self._cells[is_plain] or self._cells[not is_plain]
        if not tables:
            return CostCurve([(1.0, 1.0, 1.0)])
        cells = tables[min(tables, key=lambda other: (abs(other - bucket), other))]
        points = [
            (cell.num_rows, share * cell.seconds, float(min(cell.count, 1.0 / _RATE)))
            for _, cell in sorted(cells.items())
        ]
        return CostCurve(points)


def _settled(tables: dict[int, dict[int, _Cell]]) -> dict[int, dict[int, _Cell]]:
    """The cells that were measured more than once or twice."""
    kept = {
        bucket: {place: cell for place, cell in cells.items() if cell.count >= _NUM_FIRST}
        for bucket, cells in tables.items()
    }
    return {bucket: cells for bucket, cells in kept.items() if cells}


def context_bucket(num_context_tokens: int) -> int:
    """A bucket per doubling; everything below 256 tokens is one."""
    return max(8, num_context_tokens.bit_length())


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing numbers that are closest to `values` in weighted squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, count
    for value, weight in zip(values, weights, strict=True):
        mean, mass, count = value, weight, 1
        while pools and pools[-1][0] >= mean:
            before, its_mass, its_count = pools.pop()
            mean = (before * its_mass + mean * mass) / (its_mass + mass)
            mass, count = mass + its_mass, count + its_count
        pools.append((mean, mass, count))
    return [mean for mean, _, count in pools for _ in range(count)]
