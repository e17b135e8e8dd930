"""Models, tokenize, health, routing errors and request ids."""

from __future__ import annotations

import re

import pytest

from tests.fakes_engine import FakeEngine
from tests.server.support import CHAT, HELLO, app, error_of, make_config


async def test_models_list_every_served_name() -> None:
    async with app() as server:
        listed = (await server.http.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["fake", "org/alias"]
        for card in listed["data"]:
            assert card["object"] == "model"
            assert card["max_model_len"] == 256
            assert isinstance(card["created"], int)
        again = (await server.http.get("/v1/models")).json()
        assert again == listed, "created is stable"


async def test_a_model_id_may_hold_a_slash() -> None:
    async with app() as server:
        assert (await server.http.get("/v1/models/org/alias")).json()["id"] == "org/alias"
        for unknown in ("org", "nope", "org/alias/x"):
            response = await server.http.get(f"/v1/models/{unknown}")
            assert response.status_code == 404
            assert error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_tokenize_speaks_both_dialects(prefix: str) -> None:
    async with app() as server:
        path = prefix + "/tokenize"
        vllm = (await server.post(path, {"prompt": "ab", "return_token_strs": True})).json()
        assert vllm == {"count": 3, "max_model_len": 256, "tokens": [256, 97, 98], "token_strs": ["<s>", "a", "b"]}
        assert (await server.post(path, {"prompt": "ab", "add_special_tokens": False})).json()["tokens"] == [97, 98]
        assert (await server.post(path, {"content": "ab"})).json()["tokens"] == [97, 98]
        assert (await server.post(path, {"content": "ab", "add_special": True})).json()["tokens"] == [256, 97, 98]
        pieces = (await server.post(path, {"content": "ab", "with_pieces": True})).json()["tokens"]
        assert pieces == [{"id": 97, "piece": "a"}, {"id": 98, "piece": "b"}]
        chat = (await server.post(path, {"messages": HELLO["messages"]})).json()
        usage = (await server.chat()).json()["usage"]
        assert chat["count"] == usage["prompt_tokens"], "as the chat route would see it"
        assert (await server.post(prefix + "/detokenize", {"tokens": [97, 98]})).json() == {
            "prompt": "ab",
            "content": "ab",
        }


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "content": "b"}, {"prompt": 1}, {"messages": []}, {"tools": [1]}])
async def test_tokenize_refuses_what_it_cannot_read(body: dict[str, object]) -> None:
    async with app() as server:
        assert (await server.post("/tokenize", body)).status_code == 400


@pytest.mark.parametrize("tokens", [None, "x", [-1], [258], [2**31], [2**63], [1.5], [True], ["1"]])
async def test_detokenize_refuses_ids_outside_of_the_vocabulary(tokens: object) -> None:
    async with app() as server:
        response = await server.post("/detokenize", {"tokens": tokens})
        assert response.status_code == 400
        assert error_of(response)["param"] == "tokens"


@pytest.mark.parametrize(
    ("phase", "status_of"),
    [
        ("ready", {"/readyz": 200, "/ready": 200, "/health": 200, "/ping": 200, "/v1/models": 200, CHAT: 200}),
        ("loading", {"/readyz": 503, "/ready": 503, "/health": 503, "/ping": 503, "/v1/models": 503, CHAT: 503}),
        ("dead", {"/readyz": 503, "/ready": 503, "/health": 503, "/ping": 503, "/v1/models": 503, CHAT: 503}),
    ],
)
async def test_health_tells_the_phase(phase: str, status_of: dict[str, int]) -> None:
    engine = FakeEngine(phase=phase)
    engine.state.detail = "weights 40 %"
    async with app(engine) as server:
        assert (await server.http.get("/livez")).status_code == 200
        for path, status in status_of.items():
            response = await (server.post(path, HELLO) if path == CHAT else server.http.get(path))
            assert response.status_code == status, path
            if status == 503:
                assert int(response.headers["retry-after"]) >= 1
        body = (await server.http.get("/readyz")).json()
        if phase != "ready":
            assert (body["phase"], body["detail"]) == (phase, "weights 40 %")
            assert error_of(await server.chat())["code"] == {"loading": "loading", "dead": "engine_dead"}[phase]


async def test_draining_refuses_work_but_stays_healthy() -> None:
    async with app() as server:
        server.context.gate.is_draining = True
        assert (await server.http.get("/readyz")).status_code == 503
        assert (await server.http.get("/health")).status_code == 200
        response = await server.chat()
        assert response.status_code == 503
        assert error_of(response)["code"] == "draining"
        assert "retry-after" in response.headers


async def test_the_deep_check_generates_a_token() -> None:
    async with app() as server:
        assert (await server.http.get("/health_generate")).json() == {"status": "ok"}
        assert server.engine.seen[-1].sampling.max_tokens == 1


async def test_version_and_load() -> None:
    async with app() as server:
        assert set((await server.http.get("/version")).json()) == {"version"}
        assert (await server.http.get("/load")).json() == {"server_load": 0}
        assert (await server.http.post("/ping")).status_code == 200


async def test_unknown_routes_and_methods_get_the_error_object() -> None:
    async with app() as server:
        for path in ("/nope", "/v1/nope", "/v1/chat/completions/", "//livez", "/LIVEZ"):
            response = await server.http.get(path)
            assert response.status_code == 404
            assert error_of(response)["code"] == "unknown_url"
        assert "/v1/chat/completions" in error_of(await server.post("/chat/completions", HELLO))["message"]
        for method, path, allow in (
            ("GET", CHAT, "POST"),
            ("DELETE", "/v1/models", "GET"),
            ("PUT", "/tokenize", "POST"),
        ):
            response = await server.http.request(method, path)
            assert response.status_code == 405
            assert response.headers["allow"] == allow
            error_of(response)


@pytest.mark.parametrize("path", ["/livez", CHAT, "/nope"])
async def test_a_good_request_id_is_echoed_and_a_bad_one_replaced(path: str) -> None:
    async with app() as server:
        for given in ("abc-123_X.y", "x" * 128):
            assert (await server.http.get(path, headers={"X-Request-Id": given})).headers["x-request-id"] == given
        for given in ("", "x" * 129, "a b", "a\tb", "<script>"):
            own = (await server.http.get(path, headers={"X-Request-Id": given})).headers["x-request-id"]
            assert re.fullmatch("[0-9a-f]{32}", own)


async def test_the_clients_id_is_a_label_and_never_the_answers_id() -> None:
    async with app() as server:
        answers = [(await server.post(CHAT, HELLO, **{"X-Request-Id": "same"})).json()["id"] for _ in range(2)]
        assert answers[0] != answers[1]
        assert not any("same" in answer for answer in answers)
        assert server.engine.seen[0].client_request_id == "same"


async def test_too_many_requests_of_one_key_get_429() -> None:
    import asyncio

    engine = FakeEngine()
    engine.hold = asyncio.Event()
    config = make_config(api_keys=("k" * 32, "o" * 32), limits={"max_in_flight_per_key": 2})
    async with app(engine, config, **{"X-Api-Key": "k" * 32}) as server:
        running = [asyncio.create_task(server.chat()) for _ in range(2)]
        while engine.num_active < 2:
            await asyncio.sleep(0.001)
        refused = await server.chat()
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "1"
        other = asyncio.create_task(server.post(CHAT, HELLO, **{"X-Api-Key": "o" * 32}))
        while engine.num_active < 3:
            await asyncio.sleep(0.001)
        engine.hold.set()
        assert [task.status_code for task in await asyncio.gather(*running, other)] == [200, 200, 200]
        assert (await server.chat()).status_code == 200


async def test_api_docs_exist_only_on_request() -> None:
    async with app() as server:
        assert (await server.http.get("/openapi.json")).status_code == 404
    async with app(config=make_config(enable_docs=True)) as server:
        assert (await server.http.get("/openapi.json")).status_code == 200
