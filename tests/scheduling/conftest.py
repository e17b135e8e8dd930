"""Traffic in these tests injects failures by the hundred: their tracebacks would bury the report of a real one."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet_injected_failures(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="engine.isolation")
