"""/v1/files over ASGI: what is stored is given back, to its owner only, and within the limits."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from server.app import make_context
from server.files.upload import FORM_BYTES, Upload
from tests.fakes_engine import FakeEngine
from tests.server.support import KEY, OTHER_KEY, App, app, error_of, make_config

CONTENT = b'{"custom_id": "a"}\n\xff\x00\r\n--not-the-boundary\r\n'


async def upload(server: App, content: bytes = CONTENT, name: str = "in.jsonl", **fields: str) -> Any:
    headers = {"Authorization": f"Bearer {fields.pop('key')}"} if "key" in fields else {}
    data = {"purpose": "batch", **fields}
    return await server.http.post("/v1/files", files={"file": (name, content)}, data=data, headers=headers)


def config(folder: Path, *, limits: dict[str, Any] | None = None, **server: Any) -> Any:
    return make_config(data_folder=str(folder / "data"), limits=limits, **server)


async def test_a_file_comes_back_byte_for_byte_and_is_gone_after_delete(tmp_path: Path) -> None:
    async with app(config=config(tmp_path)) as server:
        made = (await upload(server)).json()
        assert made["object"] == "file"
        assert (made["bytes"], made["filename"], made["purpose"]) == (len(CONTENT), "in.jsonl", "batch")
        assert made["status"] == "processed"
        url = f"/v1/files/{made['id']}"
        assert (await server.http.get(url)).json() == made
        assert (await server.http.get(f"{url}/content")).content == CONTENT
        assert (await server.http.delete(url)).json() == {"id": made["id"], "object": "file", "deleted": True}
        for path in (url, f"{url}/content"):
            gone = await server.http.get(path)
            assert gone.status_code == 404
            assert error_of(gone)["param"] == "file_id"


async def test_lists_have_pages_in_both_orders(tmp_path: Path) -> None:
    async with app(config=config(tmp_path)) as server:
        ids = [(await upload(server)).json()["id"] for _ in range(5)]
        first = (await server.http.get("/v1/files", params={"limit": 2, "order": "asc"})).json()
        assert [file["id"] for file in first["data"]] == ids[:2]
        assert (first["first_id"], first["last_id"], first["has_more"]) == (ids[0], ids[1], True)
        rest = (await server.http.get("/v1/files", params={"after": ids[1], "order": "asc"})).json()
        assert [file["id"] for file in rest["data"]] == ids[2:]
        assert rest["has_more"] is False
        newest = (await server.http.get("/v1/files", params={"limit": 1, "purpose": "batch"})).json()
        assert [file["id"] for file in newest["data"]] == [ids[-1]]
        assert (await server.http.get("/v1/files", params={"purpose": "other"})).json()["data"] == []


@pytest.mark.parametrize(
    ("params", "name"), [({"limit": "0"}, "limit"), ({"limit": "x"}, "limit"), ({"order": "up"}, "order")]
)
async def test_wrong_parameters_of_lists_are_named(tmp_path: Path, params: dict[str, str], name: str) -> None:
    async with app(config=config(tmp_path)) as server:
        answer = await server.http.get("/v1/files", params=params)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == name


async def test_a_file_of_another_key_is_as_if_it_did_not_exist(tmp_path: Path) -> None:
    async with app(config=config(tmp_path, api_keys=(KEY, OTHER_KEY))) as server:
        made = (await upload(server, key=KEY)).json()
        other = {"Authorization": f"Bearer {OTHER_KEY}"}
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
            answer = await server.http.request(method, f"/v1/files/{made['id']}{path}", headers=other)
            assert answer.status_code == 404
        assert (await server.http.get("/v1/files", headers=other)).json()["data"] == []
        assert (await server.http.get("/v1/files", params={"after": made["id"]}, headers=other)).status_code == 404


async def test_the_size_limit_holds_to_the_byte(tmp_path: Path) -> None:
    async with app(config=config(tmp_path, limits={"max_file_bytes": 1000})) as server:
        assert (await upload(server, b"x" * 999)).status_code == 200
        assert (await upload(server, b"x" * 1000)).status_code == 200
        for size in (1001, 1000 + FORM_BYTES + 1):
            answer = await upload(server, b"x" * size)
            assert answer.status_code == 413
            assert error_of(answer)["type"] == "request_too_large"
        assert not list((tmp_path / "data" / "incoming").iterdir()), "refused uploads leave nothing"


async def test_a_key_has_a_quota(tmp_path: Path) -> None:
    limits = {"max_files": 2, "max_stored_file_bytes": 100}
    async with app(config=config(tmp_path, limits=limits)) as server:
        assert (await upload(server, b"x" * 60)).status_code == 200
        assert (await upload(server, b"x" * 60)).status_code == 429
        assert (await upload(server, b"x")).status_code == 200
        assert (await upload(server, b"x")).status_code == 429


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "assistants"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}, "expires_after.seconds"),
    ],
)
async def test_wrong_fields_are_named(tmp_path: Path, fields: dict[str, str], param: str) -> None:
    async with app(config=config(tmp_path)) as server:
        answer = await upload(server, **fields)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == param


async def test_a_file_may_say_when_it_expires(tmp_path: Path) -> None:
    async with app(config=config(tmp_path)) as server:
        fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "7200"}
        made = (await upload(server, **fields)).json()
        assert made["expires_at"] - made["created_at"] == 7200


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"{}", "application/json"),
        (b"x", "multipart/form-data"),
        (b"no form at all", "multipart/form-data; boundary=b"),
        (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
        ),
        (b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc', "multipart/form-data; boundary=b"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--b--\r\n", "multipart/form-data; boundary=b"),
    ],
)
async def test_what_is_not_an_upload_is_a_400(tmp_path: Path, body: bytes, content_type: str) -> None:
    async with app(config=config(tmp_path)) as server:
        answer = await server.http.post("/v1/files", content=body, headers={"Content-Type": content_type})
        assert answer.status_code == 400, answer.text
        error_of(answer)


async def test_names_cannot_lead_anywhere(tmp_path: Path) -> None:
    async with app(config=config(tmp_path)) as server:
        made = (await upload(server, name="../../etc/pass\twd")).json()
        assert made["filename"] in ("pass\twd".replace("\t", ""), "pass%09wd")
        assert {path.name for path in (tmp_path / "data" / "files").iterdir()} == {made["id"]}


async def test_the_data_is_private_and_a_folder_has_one_server(tmp_path: Path) -> None:
    async with app(config=config(tmp_path)) as server:
        made = (await upload(server)).json()
        for path in (tmp_path / "data").rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
        assert (tmp_path / "data" / "files" / made["id"]).is_file()
        with pytest.raises(ConfigError, match="in use by another server"):
            make_context(FakeEngine(), config(tmp_path))


async def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with app(config=config(tmp_path)) as server:

        def full(self: Upload, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patched:
            patched.setattr(Upload, "feed", full)
            answer = await upload(server)
        assert answer.status_code == 507
        assert error_of(answer)["code"] == "storage_full"
        assert (await upload(server)).status_code == 200


async def test_without_a_data_folder_the_routes_say_how_to_get_one() -> None:
    async with app() as server:
        for method, path in (("GET", "/v1/files"), ("GET", "/v1/batches"), ("POST", "/v1/files")):
            answer = await server.http.request(method, path)
            assert answer.status_code == 400
            assert error_of(answer)["code"] == "unsupported_parameter"
            assert "--data-folder" in error_of(answer)["message"]
