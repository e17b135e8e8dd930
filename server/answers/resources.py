"""Answers about models, files, batches and tokens, and of operators' routes."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from server.answers.agents import TokenUsage
from server.answers.generation import Object


class Model(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["kvasir"]
    root: str
    parent: str | None
    max_model_len: int
    permission: list[Object]


class Models(Struct):
    object: Literal["list"]
    data: list[Model]


class File(Struct):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class Files(Struct):
    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(Struct):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchProblem(Struct):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(Struct):
    object: Literal["list"]
    data: list[BatchProblem]


class RequestCounts(Struct):
    total: int
    completed: int
    failed: int


class Batch(Struct):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: Object | None
    usage: TokenUsage


class Batches(Struct):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Piece(Struct):
    id: int
    piece: str


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int | Piece]
    token_strs: list[str] | UnsetType = UNSET


class Detokenized(Struct):
    prompt: str
    content: str


# ---- operators


class Drained(Struct):
    status: str
    in_flight: int


class AbortedRequests(Struct):
    status: Literal["aborted"]
    aborted: int


class LogLevel(Struct):
    level: str


class Sleeping(Struct):
    is_sleeping: bool


class Status(Struct):
    status: str


class Version(Struct):
    version: str


class Load(Struct):
    server_load: int
