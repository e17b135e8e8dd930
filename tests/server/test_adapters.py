"""Low-rank adapters over HTTP: loading and unloading by operators, choosing one by its model name."""

from __future__ import annotations

import dataclasses

import pytest

from engine.config import Config, LoraConfig
from engine.errors import ConfigError, EngineDead, InvalidParameter
from server.auth import load_keys
from tests.fakes_engine import FakeEngine
from tests.server.support import CHAT, HELLO, KEY, OTHER_KEY, App, app, error_of, make_config

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADMIN_KEY = "a" * 32


def lora_config(**server: object) -> Config:
    return dataclasses.replace(make_config(**server), lora=LoraConfig(enable_lora=True, lora_root="adapters"))


async def loaded(server: App, name: str = "org/tuned", path: str = "v1", **fields: object) -> int:
    return (await server.post(LOAD, {"lora_name": name, "lora_path": path, **fields})).status_code


async def test_a_loaded_adapter_is_listed_and_serves_the_requests_that_name_it() -> None:
    async with app(config=lora_config()) as server:
        answer = await server.post(LOAD, {"lora_name": "org/tuned", "lora_path": "v1", "lora_int_id": None})
        assert (answer.status_code, answer.text) == (200, "adapter 'org/tuned' is loaded")
        cards = (await server.http.get("/v1/models")).json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("fake", None),
            ("org/alias", None),
            ("org/tuned", "fake"),
        ]
        assert (await server.http.get("/v1/models/org/tuned")).json() == cards[2]
        assert cards[2]["root"] == "org/tuned"
        assert cards[2]["created"] == 7
        for answer in (await server.chat(model="org/tuned"), await server.complete(model="org/tuned", n=2)):
            assert answer.status_code == 200
            assert answer.json()["model"] == "org/tuned"
            assert server.engine.seen[-1].adapter == "org/tuned"
        assert (await server.post("/tokenize", {"model": "org/tuned", "prompt": "a"})).status_code == 200
        for fields in ({}, {"model": "fake"}, {"model": "org/alias"}):
            await server.chat(**fields)
            assert server.engine.seen[-1].adapter == ""


async def test_an_adapter_has_a_fingerprint_of_its_own_that_changes_with_its_content() -> None:
    async with app(config=lora_config()) as server:
        prints = [(await server.chat()).json()["system_fingerprint"]]
        for path in ("v1", "v2"):
            assert await loaded(server, path=path, load_inplace=True) == 200
            prints += [
                (await route(model="org/tuned")).json()["system_fingerprint"]
                for route in (server.chat, server.complete)
            ]
        assert prints[1] == prints[2]
        assert prints[3] == prints[4]
        assert len(set(prints)) == 3


async def test_loading_a_name_twice_is_a_conflict_that_clients_do_not_repeat() -> None:
    async with app(config=lora_config()) as server:
        assert await loaded(server) == 200
        for name in ("org/tuned", "fake", "org/alias"):
            answer = await server.post(LOAD, {"lora_name": name, "lora_path": "v2"})
            assert answer.status_code == 409
            error = error_of(answer)
            assert (error["type"], error["code"], error["param"]) == ("conflict", "conflict", "lora_name")
            assert answer.headers["x-should-retry"] == "false"
        assert await loaded(server, path="v2", load_inplace=True) == 200
        assert server.engine.adapters["org/tuned"].path == "v2"


async def test_an_unloaded_adapter_is_found_no_more() -> None:
    async with app(config=lora_config()) as server:
        await loaded(server)
        answer = await server.post(UNLOAD, {"lora_name": "org/tuned"})
        assert (answer.status_code, answer.text) == (200, "adapter 'org/tuned' is unloaded")
        assert len((await server.http.get("/v1/models")).json()["data"]) == 2
        for answer in (
            await server.post(UNLOAD, {"lora_name": "org/tuned"}),
            await server.http.get("/v1/models/org/tuned"),
            await server.chat(model="org/tuned"),
            await server.complete(model="org/tuned"),
        ):
            assert answer.status_code == 404
            assert error_of(answer)["code"] == "model_not_found"
        assert await loaded(server) == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "x"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "a" * 129, "lora_path": "x"}, "lora_name"),
        ({"lora_name": "../a", "lora_path": "x"}, "lora_name"),
        ({"lora_name": 3, "lora_path": "x"}, "lora_name"),
        ({"lora_name": "x", "lora_path": ["x"]}, "lora_path"),
        ({"lora_name": "x", "lora_path": "x" * 5000}, "lora_path"),
        ({"lora_name": "x", "lora_path": "x", "load_inplace": "yes"}, "load_inplace"),
        ({"lora_name": "x", "lora_path": "outside"}, "lora_path"),
    ],
)
async def test_bad_input_is_named(body: dict[str, object], param: str) -> None:
    engine = FakeEngine()
    engine.refused_paths["outside"] = InvalidParameter("no", param="lora_path")
    async with app(engine, lora_config()) as server:
        answer = await server.post(LOAD, body)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == param
        assert not engine.adapters


async def test_an_engine_that_ends_while_it_loads_is_told() -> None:
    engine = FakeEngine()
    engine.refused_paths["v1"] = EngineDead("gone")
    async with app(engine, lora_config()) as server:
        assert await loaded(server) == 503
        engine.state.phase = "loading"
        assert await loaded(server, path="v2") == 503


async def test_without_enable_lora_the_routes_say_what_to_do() -> None:
    async with app() as server:
        for path in (LOAD, UNLOAD):
            answer = await server.post(path, {"lora_name": "x", "lora_path": "x"})
            assert answer.status_code == 400
            assert error_of(answer)["code"] == "unsupported_parameter"
            assert "--enable-lora" in error_of(answer)["message"]


async def test_a_request_cannot_bring_an_adapter_of_its_own() -> None:
    async with app(config=lora_config()) as server:
        answer = await server.chat(lora_path="v1")
        assert (answer.status_code, error_of(answer)["param"]) == (400, "lora_path")


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
async def test_only_an_operators_key_opens_the_routes(path: str) -> None:
    body = {"lora_name": "x", **({"lora_path": "x"} if path == LOAD else {})}
    config = lora_config(api_keys=(KEY,), admin_api_keys=(ADMIN_KEY,))
    async with app(config=config) as server:
        for headers, status in (
            ({}, 401),
            ({"X-Api-Key": OTHER_KEY}, 401),
            ({"X-Api-Key": KEY}, 403),
            ({"Authorization": f"Bearer {ADMIN_KEY}"}, 200 if path == LOAD else 404),
        ):
            answer = await server.post(path, body, **headers)
            assert answer.status_code == status
            if status == 403:
                assert error_of(answer)["code"] == "admin_key_required"
        # which is a user's key too
        assert (await server.post(CHAT, HELLO, **{"X-Api-Key": ADMIN_KEY})).status_code == 200


async def test_without_an_operators_key_only_a_server_of_ones_own_takes_changes() -> None:
    body = {"lora_name": "x", "lora_path": "x"}
    for server_options, headers, status in (
        ({}, {}, 200),
        ({"host": "::1"}, {}, 200),
        ({"host": "0.0.0.0", "allow_unauthenticated": True}, {}, 403),
        ({"api_keys": (KEY,)}, {"X-Api-Key": KEY}, 403),
        ({"admin_api_keys": (ADMIN_KEY,)}, {}, 403),
        ({"admin_api_keys": (ADMIN_KEY,)}, {"X-Api-Key": ADMIN_KEY}, 200),
    ):
        async with app(config=lora_config(**server_options)) as server:  # type: ignore[arg-type]
            assert (await server.post(LOAD, body, **headers)).status_code == status, server_options
            assert (await server.chat()).status_code == (401 if server_options.get("api_keys") else 200)


def test_a_short_operators_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 5 characters; at least 32"):
        load_keys(make_config(admin_api_keys=("short",)).server)
