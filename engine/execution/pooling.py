"""From hidden states to pooled results: what pooling rows gather while their prompts run in chunks.

Sums are kept in float64 per chunk and added at the end: running a chunk again changes nothing, and how a prompt was cut
does not show in the float32 result. Source of the weighted mean: SGPT, arXiv:2202.08904, section 3.
Shape letters: n tokens of a chunk, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import NumericalError
from engine.models.pooling import Pooler
from engine.scheduling.plan import Chunk, ChunkResult
from engine.types import PoolingParams


@dataclass(slots=True)
class _Row:
    params: PoolingParams
    parts: dict[int, Tensor] = field(default_factory=dict)  # by the start of their chunk


class PoolingRows:
    """The rows of one runner that pool. A row is here from `add` to `remove`."""

    def __init__(self, pooler: Pooler) -> None:
        self._pooler = pooler
        self._rows: dict[int, _Row] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: int, params: PoolingParams) -> None:
        """A request takes the row, for the first time or again: what was gathered before is forgotten."""
        self._rows[row] = _Row(params)

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def take(self, chunk: Chunk, hidden: Tensor, num_prompt_tokens: int) -> ChunkResult:
        """The chunk's hidden states [n, C]; with those of the prompt's last token, its result."""
        row = self._rows[chunk.row]
        is_last = chunk.start + chunk.num_tokens == num_prompt_tokens
        if is_last or row.params.needs_all_tokens:
            row.parts[chunk.start] = part_of(hidden, row.params, chunk.start)
        if not is_last:
            return ChunkResult()
        parts = [row.parts[start] for start in sorted(row.parts)]
        return result_of(self._pooler, joined(parts, row.params, num_prompt_tokens), row.params)


def part_of(hidden: Tensor, params: PoolingParams, start: int) -> Tensor:
    """What tokens start .. start + n contribute, of their hidden states [n, C]: [1, C], or [n, C] for token_embed."""
    if params.task == "token_embed":
        return hidden.float().clone()
    match params.method:
        case "mean":
            return hidden.sum(0, keepdim=True, dtype=torch.float64)
        case "weighted":
            weights = torch.arange(start + 1, start + 1 + hidden.shape[0], dtype=torch.float64, device=hidden.device)
            return (hidden.double() * weights[:, None]).sum(0, keepdim=True)
        case "cls":
            return hidden[:1].float().clone()
        case "last":
            return hidden[-1:].float().clone()
        case "head":
            raise AssertionError("only an encoder has a pooler of its own")


def joined(parts: list[Tensor], params: PoolingParams, num_tokens: int) -> Tensor:
    """All parts of one prompt -> [1, C] float32, or [num_tokens, C] for token_embed."""
    if params.task == "token_embed":
        return torch.cat(parts)
    match params.method:
        case "mean":
            return (torch.cat(parts).sum(0, keepdim=True) / num_tokens).float()
        case "weighted":
            return (torch.cat(parts).sum(0, keepdim=True) / (num_tokens * (num_tokens + 1) / 2)).float()
        case "cls":
            return parts[0]
        case _:
            return parts[-1]


def result_of(pooler: Pooler, pooled: Tensor, params: PoolingParams) -> ChunkResult:
    """[N, C] float32 -> what leaves the runner: a vector, or for token_embed a matrix. An error when not finite."""
    out = pooler.finish(pooled, params)
    if not bool(out.isfinite().all()):
        return ChunkResult(error=NumericalError.code)
    shape = tuple(out.shape) if params.task == "token_embed" else (out.shape[1],)
    return ChunkResult(pooled=(out.contiguous().cpu().numpy().astype("<f4").tobytes(), shape))
