"""Client libraries share one connection pool for all event loops of a process: their tests share one loop."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_asyncio import is_async_test

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents and is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
