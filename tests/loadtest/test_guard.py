"""No fast path has lost a fifth of its lead over the plain path that it replaces; and the guard would notice."""

from __future__ import annotations

import json

import pytest

from kernels import native
from loadtest import guard
from loadtest.guard import Pair


def busy(count: int) -> None:
    sum(range(count))


def test_a_loss_is_found_and_less_than_a_fifth_is_none() -> None:
    pair = Pair("sum", lambda: busy(10_000), lambda: busy(100_000), repetitions=5)
    found = guard.lost([pair], {"sum": 100.0})
    assert found["sum"][1] == 100.0
    assert 2 < found["sum"][0] < 50
    assert guard.lost([pair], {"sum": 1.0}) == {}


def test_what_falls_short_once_is_measured_again() -> None:
    class Recovering(Pair):
        ratios = iter([0.5, 2.0])

        def ratio(self) -> float:
            return next(self.ratios)

    assert guard.lost([Recovering("x", lambda: None, lambda: None)], {"x": 2.0}) == {}


@pytest.mark.skipif(native.library() is None, reason="needs the native library")
def test_fast_paths_keep_their_lead() -> None:
    records = json.loads(guard.RECORD.read_text())
    with guard.one_thread():
        pairs = guard.pairs()
        record = records.get(guard.machine()) or {pair.name: 1 / (1 - guard.MAX_LOSS) for pair in pairs}
        assert {pair.name for pair in pairs} == record.keys()
        assert guard.lost(pairs, record) == {}
