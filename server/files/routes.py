"""/v1/files: upload, list, get, delete, content. Off unless the server has a data folder."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse

from engine.errors import CapacityError, InvalidParameter
from server.context import ServerContext
from server.errors import ApiError
from server.files.paging import listed, page_number, text_of
from server.files.storage import storage_of
from server.files.store import UPLOADED, FileStore, StoredFile
from server.files.upload import Upload, receive
from server.http_responses import json_response

MIN_TTL_S, MAX_TTL_S = 3600, 30 * 86400
MAX_PAGE = 10_000


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()
    limits = context.config.limits
    uploads = asyncio.Semaphore(limits.max_uploads)

    @router.post("/v1/files")
    async def upload_file(request: Request) -> Response:
        store = storage_of(context).files
        if uploads.locked():
            raise CapacityError(f"{limits.max_uploads} files are being uploaded, which is the limit; retry later")
        path = store.new_path()
        async with uploads:
            try:
                with disk_errors():
                    upload = await receive(request, path, limits)
                    file = await _add(store, request.state.tenant, upload)
            finally:
                await asyncio.to_thread(path.unlink, missing_ok=True)
        return json_response(file.as_dict())

    @router.get("/v1/files")
    async def list_files(request: Request) -> Response:
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidParameter("order must be one of asc, desc", param="order")
        files, has_more = await storage_of(context).files.page(
            request.state.tenant,
            purpose=text_of(request, "purpose"),
            after=text_of(request, "after"),
            limit=page_number(request, MAX_PAGE, default=MAX_PAGE),
            newest_first=order == "desc",
        )
        return json_response(listed([file.as_dict() for file in files], has_more))

    @router.get("/v1/files/{file_id}")
    async def get_file(request: Request, file_id: str) -> Response:
        file = await storage_of(context).files.get(request.state.tenant, file_id)
        return json_response(file.as_dict())

    @router.delete("/v1/files/{file_id}")
    async def delete_file(request: Request, file_id: str) -> Response:
        await storage_of(context).files.delete(request.state.tenant, file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    @router.get("/v1/files/{file_id}/content")
    async def get_content(request: Request, file_id: str) -> Response:
        store = storage_of(context).files
        file = await store.get(request.state.tenant, file_id)
        # never shown by a browser as a page of this server
        return FileResponse(store.path_of(file.id), media_type="application/octet-stream", filename=file.filename)

    return router


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk is told as such: the same request would fail again."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
            raise
        headers = {"x-should-retry": "false"}
        message = "the server's disk for files is full"
        raise ApiError(507, message, type="server_error", code="storage_full", headers=headers, close=True) from None


async def _add(store: FileStore, tenant: str, upload: Upload) -> StoredFile:
    purpose = upload.fields.get("purpose")
    if not purpose:
        raise InvalidParameter("purpose is required", param="purpose", code="missing_required_parameter")
    if purpose != UPLOADED:
        raise InvalidParameter(f"purpose must be {UPLOADED}: files serve as input of batches here", param="purpose")
    ttl_s = _ttl_s(upload.fields)
    assert upload.filename is not None
    return await store.add(tenant, upload.path, filename=upload.filename, ttl_s=ttl_s)


def _ttl_s(fields: dict[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidParameter("expires_after[anchor] must be created_at", param="expires_after.anchor")
    is_number = seconds is not None and seconds.isascii() and seconds.isdecimal() and len(seconds) < 10
    if not is_number or not MIN_TTL_S <= int(seconds or 0) <= MAX_TTL_S:
        raise InvalidParameter(
            f"expires_after[seconds] must be an integer of {MIN_TTL_S} to {MAX_TTL_S}", param="expires_after.seconds"
        )
    return int(seconds or 0)
