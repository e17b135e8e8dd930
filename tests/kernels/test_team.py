"""The threads of the native kernels: the same bits whoever works, several callers at once, and no work when idle."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from kernels import native
from kernels.linear import PackedLinear, pack_linear

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs the native library")

ROWS, DEPTH, COLUMNS = 64, 512, 1024  # far more work than pays for four threads


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> PackedLinear:
    monkeypatch.setattr(native, "num_threads", lambda: 4)  # more than there may be cores
    return pack_linear(torch.randn(COLUMNS, DEPTH, generator=torch.Generator().manual_seed(0)))


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, DEPTH, generator=torch.Generator().manual_seed(seed))


def test_callers_on_several_threads_each_get_their_own_result(linear: PackedLinear) -> None:
    """One of them has the team, the others work alone meanwhile."""
    expected = [torch.cat([linear(row[None]) for row in inputs(seed)]) for seed in range(3)]
    wrong: list[int] = []

    def call(seed: int) -> None:
        x = inputs(seed)
        if not all(torch.equal(linear(x), expected[seed]) for _ in range(30)):
            wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_helpers_sleep_when_there_is_nothing_to_do(linear: PackedLinear) -> None:
    linear(inputs(0))
    time.sleep(0.05)  # they spin for some microseconds first

    def processor_seconds() -> float:
        before = time.process_time()
        time.sleep(0.3)
        return time.process_time() - before

    assert min(processor_seconds() for _ in range(3)) < 0.05  # other threads of this process may work now and then
