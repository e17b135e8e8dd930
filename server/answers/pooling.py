"""Answers of embeddings, scores and classes."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from server.answers.generation import PromptTokensDetails


class PoolingUsage(Struct):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Embedding(Struct):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str  # text: base64 of little-endian float32


class Embeddings(Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: PoolingUsage


class Pooled(Struct):
    index: int
    object: Literal["pooling"]
    data: list[float | list[float]] | str
    shape: list[int] | UnsetType = UNSET  # of base64


class Pooling(Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Pooled]
    usage: PoolingUsage


class Classified(Struct):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class Classes(Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classified]
    usage: PoolingUsage


class Score(Struct):
    index: int
    object: Literal["score"]
    score: float


class Scores(Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage


class Document(Struct):
    text: str


class Ranked(Struct):
    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class Ranking(Struct):
    id: str
    object: Literal["rerank"]
    created: int
    model: str
    results: list[Ranked]
    usage: PoolingUsage
