"""What the client remembers of adapters: one change at a time, and a new engine process brought to the same state."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from engine.client_adapters import ClientAdapters
from engine.control import Payload
from engine.errors import Conflict, EngineDead, InvalidParameter, KvasirError, ModelNotFound
from engine.types import AdapterInfo


def info(name: str, version: str, path: str = "") -> AdapterInfo:
    return AdapterInfo(name=name, key=f"{name}@{version}", path=path or version, rank=4, num_bytes=8, created_s=1)


class Process:
    """The engine's side: what is loaded in it, and what was asked of it. The content of a path is its version."""

    def __init__(self) -> None:
        self.present: dict[str, AdapterInfo] = {}
        self.calls: list[tuple[str, str]] = []
        self.errors: deque[KvasirError] = deque()
        self.versions: dict[str, str] = {}
        self.num_running = 0

    async def __call__(self, action: str, payload: Payload, timeout_s: float) -> Payload:
        self.num_running += 1
        assert self.num_running == 1, "two changes at once"
        await asyncio.sleep(0)
        self.num_running -= 1
        self.calls.append((action, payload.get("key") or payload["path"]))
        if self.errors:
            raise self.errors.popleft()
        if action == "unload_adapter":
            del self.present[payload["key"]]
            return {}
        path = payload["path"]
        loaded = info(payload["name"], self.versions.get(path, path), path)
        self.present[loaded.key] = loaded
        fields = {name: getattr(loaded, name) for name in loaded.__struct_fields__}
        return {"adapter": {**fields, "created_s": 9}}


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def adapters(process: Process) -> ClientAdapters:
    return ClientAdapters(process, ("base",))


async def test_names_lead_to_the_version_loaded_last(adapters: ClientAdapters, process: Process) -> None:
    await adapters.engine_started([])
    await adapters.load("a", "1")
    assert (adapters.key_of(""), adapters.key_of("a")) == ("", "a@1")
    await adapters.load("a", "2", in_place=True)
    await adapters.load("b", "1", in_place=True)
    assert (adapters.key_of("a"), list(adapters.loaded)) == ("a@2", ["a", "b"])
    assert sorted(process.present) == ["a@2", "b@1"]
    num_calls = len(process.calls)
    await adapters.load("b", "1", in_place=True)  # the same content: what runs goes on
    assert process.calls[num_calls:] == [("load_adapter", "1")]
    await adapters.unload("a")
    for name in ("a", "never"):
        with pytest.raises(ModelNotFound):
            adapters.key_of(name)
        with pytest.raises(ModelNotFound):
            await adapters.unload(name)


async def test_a_name_in_use_is_refused_and_a_failed_load_changes_nothing(
    adapters: ClientAdapters, process: Process
) -> None:
    await adapters.load("a", "1")
    for name in ("a", "base"):
        with pytest.raises(Conflict):
            await adapters.load(name, "2")
    with pytest.raises(Conflict):
        await adapters.load("base", "2", in_place=True)
    with pytest.raises(InvalidParameter):
        await adapters.load("not a name", "2")
    process.errors.append(InvalidParameter("no such folder"))
    with pytest.raises(InvalidParameter):
        await adapters.load("a", "2", in_place=True)
    assert adapters.key_of("a") == "a@1"
    assert list(process.present) == ["a@1"]


async def test_changes_wait_for_each_other(adapters: ClientAdapters, process: Process) -> None:
    results = await asyncio.gather(
        *(adapters.load("a", "1") for _ in range(3)), adapters.load("b", "1"), return_exceptions=True
    )
    assert sum(isinstance(result, Conflict) for result in results) == 2
    assert sorted(process.present) == ["a@1", "b@1"]


async def test_a_new_process_gets_what_was_loaded_last(adapters: ClientAdapters, process: Process) -> None:
    """Static a, b, c: a was replaced, b unloaded, d added since."""
    static = [info("a", "1"), info("b", "1"), info("c", "1")]
    await adapters.engine_started(static)
    process.present = {adapter.key: adapter for adapter in static}
    await adapters.load("a", "2", in_place=True)
    await adapters.unload("b")
    await adapters.load("d", "1")
    created = {name: adapter.created_s for name, adapter in adapters.loaded.items()}
    before = sorted(process.present)
    process.present = {adapter.key: adapter for adapter in static}
    process.calls.clear()
    await adapters.engine_started(static)
    assert sorted(process.present) == before == ["a@2", "c@1", "d@1"]
    assert process.calls[:2] == [("unload_adapter", "a@1"), ("unload_adapter", "b@1")]
    assert {name: adapter.created_s for name, adapter in adapters.loaded.items()} == created


async def test_files_that_are_gone_or_changed_do_not_keep_the_engine_from_starting(
    adapters: ClientAdapters, process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    await adapters.engine_started([])
    await adapters.load("a", "1")
    await adapters.load("b", "1")
    process.present.clear()
    process.versions["1"] = "other"
    process.errors.append(InvalidParameter("the folder is gone"))
    await adapters.engine_started([])
    assert list(adapters.loaded) == ["b"]
    assert adapters.key_of("b") == "b@other"
    assert "adapter a could not be loaded again" in caplog.text
    assert "the files of adapter b have changed" in caplog.text


async def test_a_process_that_ends_meanwhile_leaves_it_to_the_next(adapters: ClientAdapters, process: Process) -> None:
    await adapters.engine_started([])
    await adapters.load("a", "1")
    process.present.clear()
    process.errors.append(EngineDead("gone"))
    with pytest.raises(EngineDead):
        await adapters.engine_started([])
    assert adapters.key_of("a") == "a@1"
    await adapters.engine_started([])
    assert list(process.present) == ["a@1"]
