"""/v1/batches with the fake engine and a real database: states, wrong lines, and restarts that lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import EngineError
from engine.types import PoolingInfo
from server.batches import executor
from server.batches.worker import working
from tests.fakes_engine import FakeEngine
from tests.server.support import CHAT, COMPLETIONS, KEY, OTHER_KEY, App, app, error_of, make_config

ENDED = {"completed", "failed", "expired", "cancelled"}
PREFIX = "the same long beginning of several prompts, longer than one block; "


@contextlib.asynccontextmanager
async def working_app(folder: Path, engine: FakeEngine | None = None, **options: Any) -> AsyncIterator[App]:
    """An application whose batches run; leaving it ends the work where it is, as the end of a server does."""
    async with app(engine, make_config(data_folder=str(folder), **options)) as server, working(server.context):
        yield server


def line(custom_id: str, *, url: str = COMPLETIONS, method: str = "POST", **body: Any) -> dict[str, Any]:
    body = body or {"prompt": "ab", "max_tokens": 2}
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def jsonl(lines: Sequence[Any]) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


async def upload(server: App, content: bytes, **headers: str) -> str:
    files = {"file": ("in.jsonl", content)}
    answer = await server.http.post("/v1/files", files=files, data={"purpose": "batch"}, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def create(server: App, lines: Sequence[Any], *, endpoint: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    file_id = await upload(server, jsonl(lines))
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", **fields}
    answer = await server.post("/v1/batches", body)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def get(server: App, batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = (await server.http.get(f"/v1/batches/{batch_id}")).json()
    return found


async def until(server: App, batch_id: str, *statuses: str, timeout_s: float = 30.0) -> dict[str, Any]:
    async with asyncio.timeout(timeout_s):
        while (batch := await get(server, batch_id))["status"] not in (statuses or ENDED):
            assert batch["status"] not in ENDED, batch
            await asyncio.sleep(0.01)
    return batch


async def content(server: App, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    answer: httpx.Response = await server.http.get(f"/v1/files/{file_id}/content")
    return [json.loads(one) for one in answer.text.splitlines()]


async def test_a_batch_completes_with_answers_in_the_order_of_its_lines(tmp_path: Path) -> None:
    async with working_app(tmp_path) as server:
        lines = [line(f"r{i}", prompt=PREFIX + "x" * i, max_tokens=2 + i % 2) for i in range(6)]
        lines.insert(3, line("bad", prompt="ab", temperature=9))
        made = await create(server, lines, metadata={"a": "b"})
        assert (made["object"], made["status"], made["metadata"]) == ("batch", "validating", {"a": "b"})
        assert made["expires_at"] - made["created_at"] == 24 * 3600
        batch = await until(server, made["id"])
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 7, "completed": 6, "failed": 1}
        stamps = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
        assert all(stamps)
        assert stamps == sorted(stamps)
        assert batch["failed_at"] is batch["expired_at"] is batch["cancelled_at"] is batch["errors"] is None
        output = await content(server, batch["output_file_id"])
        assert [one["custom_id"] for one in output] == [f"r{i}" for i in range(6)]
        online = (await server.post(COMPLETIONS, lines[0]["body"])).json()
        assert output[0]["response"]["status_code"] == 200
        answered = output[0]["response"]["body"]
        assert answered["choices"] == online["choices"]
        assert set(answered) == set(online)
        assert output[0]["error"] is None
        assert output[0]["id"].startswith("batch_req_")
        [failed] = await content(server, batch["error_file_id"])
        assert failed["custom_id"] == "bad"
        assert failed["response"]["status_code"] == 400
        assert failed["response"]["body"]["error"]["param"] == "temperature"
        sums = [
            sum(one["response"]["body"]["usage"][name] for one in output)
            for name in ("prompt_tokens", "completion_tokens")
        ]
        assert [batch["usage"]["input_tokens"], batch["usage"]["output_tokens"]] == sums
        assert batch["usage"]["total_tokens"] == sum(sums)


@pytest.mark.parametrize(
    ("url", "body", "field"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}, "choices"),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 16}, "output"),
    ],
)
async def test_other_endpoints_answer_as_they_do_online(
    tmp_path: Path, url: str, body: dict[str, Any], field: str
) -> None:
    async with working_app(tmp_path) as server:
        made = await create(server, [line("a", url=url, **body), line("b", url=url, **body)], endpoint=url)
        batch = await until(server, made["id"])
        output = await content(server, batch["output_file_id"])
        assert [one["custom_id"] for one in output] == ["a", "b"], batch
        assert set(output[0]["response"]["body"]) == set((await server.post(url, body)).json())
        assert output[0]["response"]["body"][field]
        assert batch["usage"]["output_tokens"] > 0
        assert {request.priority for request in server.engine.seen[:2]} == {2**31 - 1}


async def test_embeddings_run_as_a_batch(tmp_path: Path) -> None:
    pooling = PoolingInfo(tasks=["embed"], method="mean", normalize=True, embedding_size=4)
    url = "/v1/embeddings"
    async with working_app(tmp_path, FakeEngine(pooling=pooling)) as server:
        made = await create(server, [line(name, url=url, input=name * 5) for name in "ab"], endpoint=url)
        batch = await until(server, made["id"])
        output = await content(server, batch["output_file_id"])
        online = (await server.post(url, {"input": "bbbbb"})).json()
        assert output[1]["response"]["body"]["data"] == online["data"]
        assert batch["usage"]["input_tokens"] > 0


@pytest.mark.parametrize(
    ("lines", "code", "number", "param"),
    [
        ([line("a"), line("a")], "duplicate_custom_id", 2, "custom_id"),
        ([line("a"), line("b", url=CHAT)], "mismatched_url", 2, "url"),
        ([line("a", method="GET")], "invalid_method", 1, "method"),
        ([line("a", model="fake", prompt="x"), line("b", prompt="x")], "mismatched_model", 2, "body.model"),
        ([line("a", model="no-such", prompt="x")], "model_not_found", None, "body.model"),
        ([line("a", prompt="x", stream=True)], "invalid_body", 1, "body.stream"),
        ([line("a"), b"", b"{not json"], "invalid_json_line", 3, None),
        ([b"[]"], "invalid_json_line", 1, None),
        ([{"custom_id": 5}], "invalid_custom_id", 1, "custom_id"),
        ([{**line("a"), "body": "x"}], "invalid_body", 1, "body"),
        ([line("a"), line("b"), line("c"), line("d")], "too_many_lines", 4, None),
        ([b"x" * 3000], "line_too_large", 1, None),
        ([b""], "empty_file", None, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_wrong_line_fails_the_batch_and_is_named(
    tmp_path: Path, lines: list[Any], code: str, number: int | None, param: str | None
) -> None:
    limits = {"max_batch_lines": 3, "max_body_bytes": 2000}
    async with working_app(tmp_path, limits=limits) as server:
        batch = await until(server, (await create(server, lines))["id"])
        assert batch["status"] == "failed"
        assert batch["failed_at"] is not None
        [error] = batch["errors"]["data"]
        assert (error["code"], error["line"], error["param"]) == (code, number, param)
        assert server.engine.seen == []


@pytest.mark.parametrize(
    ("change", "param", "status"),
    [
        ({"input_file_id": "file-none"}, "input_file_id", 404),
        ({"endpoint": "/v1/models"}, "endpoint", 400),
        ({"completion_window": "48h"}, "completion_window", 400),
        ({"completion_window": "0s"}, "completion_window", 400),
        ({"metadata": "x"}, "metadata", 400),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds", 400),
    ],
)
async def test_wrong_fields_are_refused(tmp_path: Path, change: dict[str, Any], param: str, status: int) -> None:
    async with working_app(tmp_path) as server:
        file_id = await upload(server, jsonl([line("a")]))
        body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h", **change}
        answer = await server.post("/v1/batches", body)
        assert answer.status_code == status
        assert error_of(answer)["param"] == param


async def test_cancelling_keeps_what_is_done_and_tells_what_was_not_run(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with working_app(tmp_path, engine, batch_rows=0.02) as server:  # one line at a time
        batch_id = (await create(server, [line(f"r{i}", prompt="q" * i + "z", max_tokens=2) for i in range(9)]))["id"]
        async with asyncio.timeout(30):
            while (await get(server, batch_id))["request_counts"]["completed"] < 2:
                await asyncio.sleep(0.001)
        engine.hold = asyncio.Event()
        asked = (await server.post(f"/v1/batches/{batch_id}/cancel", {})).json()
        if asked["status"] in ENDED | {"finalizing"}:
            pytest.skip("the batch was faster than the cancellation")
        assert (asked["status"], asked["cancelling_at"] is not None) == ("cancelling", True)
        batch = await until(server, batch_id)
        assert (batch["status"], batch["cancelled_at"] is not None) == ("cancelled", True)
        done = await content(server, batch["output_file_id"])
        left = await content(server, batch["error_file_id"])
        assert len(done) == batch["request_counts"]["completed"] >= 2
        assert {one["error"]["code"] for one in left} == {"batch_cancelled"}
        assert sorted(one["custom_id"] for one in done + left) == [f"r{i}" for i in range(9)]
        again = await server.post(f"/v1/batches/{batch_id}/cancel", {})
        assert again.status_code == 409
        assert engine.num_active == 0


async def test_a_window_that_ends_expires_the_batch_with_partial_results(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    async with working_app(tmp_path, engine) as server:
        batch_id = (await create(server, [line("a"), line("b")], completion_window="1s"))["id"]
        batch = await until(server, batch_id)
        assert (batch["status"], batch["expired_at"] is not None) == ("expired", True)
        assert batch["output_file_id"] is None
        left = await content(server, batch["error_file_id"])
        assert [(one["custom_id"], one["error"]["code"]) for one in left] == [
            ("a", "batch_expired"),
            ("b", "batch_expired"),
        ]


async def test_a_restarted_server_goes_on_and_no_line_is_lost_or_written_twice(tmp_path: Path) -> None:
    ids = [f"r{i}" for i in range(12)]
    lines = [line(name, prompt=PREFIX + name, max_tokens=2) for name in ids]
    async with working_app(tmp_path, batch_rows=0.02) as server:
        batch_id = (await create(server, lines))["id"]
        async with asyncio.timeout(30):
            while not 3 <= (await get(server, batch_id))["request_counts"]["completed"] < 10:
                await asyncio.sleep(0.001)
    engine = FakeEngine()
    async with working_app(tmp_path, engine) as server:
        batch = await until(server, batch_id)
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
        assert [one["custom_id"] for one in await content(server, batch["output_file_id"])] == ids
        own = [request for request in engine.seen if request.sampling.max_tokens == 2]
        assert 1 <= len(own) <= 9, "what was done is not run again"


async def test_an_engine_that_fails_is_asked_again_and_then_told(tmp_path: Path) -> None:
    async with working_app(tmp_path, FakeEngine(error=EngineError("boom"), error_once=True)) as server:
        batch = await until(server, (await create(server, [line("a")]))["id"])
        assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    (tmp_path / "second").mkdir()
    async with working_app(tmp_path / "second", FakeEngine(error=EngineError("boom"))) as server:
        batch = await until(server, (await create(server, [line("a")]))["id"])
        assert batch["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
        [failed] = await content(server, batch["error_file_id"])
        assert failed["response"]["status_code"] == 500


async def test_shared_prefixes_are_computed_before_the_lines_that_share_them(tmp_path: Path) -> None:
    async with working_app(tmp_path) as server:
        prompts = [f"{name}{PREFIX}{i}" for i in range(3) for name in "ab"]
        batch_id = (await create(server, [line(p, prompt=p, max_tokens=2) for p in prompts]))["id"]
        await until(server, batch_id)
        seen = server.engine.seen
        prefixes = {chr(request.prompt[1]): at for at, request in enumerate(seen) if request.sampling.max_tokens == 1}
        members = [(request.prompt[0], at) for at, request in enumerate(seen) if request.sampling.max_tokens == 2]
        names = [name for name, _ in members]
        assert names in (list("aaabbb"), list("bbbaaa")), "groups run together"
        assert all(prefixes[name] < at for name, at in members)
        assert len(seen) == len(prefixes) + len(members) == 8


async def test_batches_are_their_keys_own_and_listed_newest_first(tmp_path: Path) -> None:
    async with working_app(tmp_path, api_keys=(KEY, OTHER_KEY)) as server:
        mine, other = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER_KEY))
        file_id = await upload(server, jsonl([line("a")]), **mine)
        body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        assert (await server.post("/v1/batches", body, **other)).status_code == 404
        ids = [(await server.post("/v1/batches", body, **mine)).json()["id"] for _ in range(3)]
        page = (await server.http.get("/v1/batches", params={"limit": 2}, headers=mine)).json()
        assert [batch["id"] for batch in page["data"]] == [ids[2], ids[1]]
        assert page["has_more"] is True
        rest = (await server.http.get("/v1/batches", params={"after": ids[1]}, headers=mine)).json()
        assert [batch["id"] for batch in rest["data"]] == [ids[0]]
        for path in (f"/v1/batches/{ids[0]}", f"/v1/batches?after={ids[0]}"):
            assert (await server.http.get(path, headers=other)).status_code == 404
        assert (await server.post(f"/v1/batches/{ids[0]}/cancel", {}, **other)).status_code == 404
        assert (await server.http.get("/v1/batches", headers=other)).json()["data"] == []


async def test_a_file_that_is_read_cannot_be_deleted_and_owners_are_known_after_a_restart(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    headers = {"Authorization": f"Bearer {KEY}"}
    async with working_app(tmp_path, engine, api_keys=(KEY,)) as server:
        server.http.headers.update(headers)
        batch = await create(server, [line("a")])
        refused = await server.http.delete(f"/v1/files/{batch['input_file_id']}")
        assert refused.status_code == 409
    async with working_app(tmp_path, api_keys=(KEY,)) as server:
        server.http.headers.update(headers)
        ended = await until(server, batch["id"])
        assert ended["status"] == "completed"
        assert (await server.http.delete(f"/v1/files/{batch['input_file_id']}")).status_code == 200


async def test_a_batch_whose_input_is_gone_fails(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    async with working_app(tmp_path, engine) as server:
        batch = await create(server, [line("a")])
        await until(server, batch["id"], "in_progress")
    (tmp_path / "files" / batch["input_file_id"]).unlink()
    async with working_app(tmp_path) as server:
        failed = await until(server, batch["id"])
        assert (failed["status"], failed["errors"]["data"][0]["code"]) == ("failed", "input_file_lost")


async def test_a_fault_of_ours_ends_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(executor, "plan", broken)
    async with working_app(tmp_path) as server:
        failed = await until(server, (await create(server, [line("a")]))["id"])
        assert (failed["status"], failed["errors"]["data"][0]["code"]) == ("failed", "internal_error")


async def test_a_batch_waits_while_the_engine_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "RETRY_S", 0.01)
    engine = FakeEngine(phase="sleeping")
    async with working_app(tmp_path, engine) as server:
        batch = await create(server, [line("a")])
        await until(server, batch["id"], "in_progress")
        engine.state.phase = "ready"
        assert (await until(server, batch["id"]))["request_counts"]["completed"] == 1


async def test_too_many_unfinished_batches_are_refused(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    async with working_app(tmp_path, engine, limits={"max_batches": 1}) as server:
        batch = await create(server, [line("a")])
        body = {"input_file_id": batch["input_file_id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
        assert (await server.post("/v1/batches", body)).status_code == 429
        engine.hold.set()
        await until(server, batch["id"])
        began = time.monotonic()
        assert (await server.post("/v1/batches", body)).status_code == 200
        assert time.monotonic() - began < 30
