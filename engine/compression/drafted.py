"""Evidence of rows that check drafts: only queries of tokens that turn out to be part of the text count.

Knows rows, chunks and tensors. Such rows' queries are kept while the step runs. When it is known which drafted tokens
are right, and their keys stand where they belong, these queries are counted as those of an ordinary chunk are: in the
same order, onto the same sums. Shape letters: L layers, T tokens, R rows, H query heads, D head_dim, MB blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.compression.attend import RowRange, score
from engine.compression.base import Evidence
from engine.compression.evidence import ask, count, wants
from engine.compression.state import RowState
from engine.models.batch import ForwardBatch, KVCache
from engine.scheduling.plan import Chunk


class DraftedQueries:
    """Neighbouring rows of a batch with drafts, whose evidence is of one kind. A `Recorder` of `attend.py`."""

    def __init__(self, batch: ForwardBatch, rows: RowRange, chunks: Sequence[Chunk], evidence: Evidence) -> None:
        self.rows = rows
        self.chunks = tuple(chunks)
        self._evidence = evidence
        self._table = batch.block_table[rows.rows]
        self._q: list[Tensor] = []  # of each layer, [T, H, D]
        self._lse: list[Tensor] = []  # [T, H]
        self._options: list[dict[str, Any]] = []

    def record(self, q: Tensor, lse: Tensor, options: dict[str, Any]) -> None:
        """See `Recorder`."""
        self._q.append(q.clone())
        self._lse.append(lse.clone())
        self._options.append(options)

    def count(
        self, accepted: Sequence[Sequence[int]], num_dropped: Sequence[int], states: Mapping[int, RowState],
        cache: KVCache,
    ) -> None:  # fmt: skip
        """Counts, of each row, its first token and the accepted nodes, whose keys follow it in the cache.

        accepted      of each chunk, a path of its draft's nodes
        num_dropped   of each row, positions minus slots
        """
        device = self._table.device
        paths = [[0, *(node + 1 for node in path)] for path in accepted]
        chunks = [
            msgspec.structs.replace(chunk, num_tokens=len(path), draft=None)
            for chunk, path in zip(self.chunks, paths, strict=True)
        ]
        starts = torch.tensor([0, *(len(path) for path in paths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        rows = RowRange(self.rows.first, len(chunks), slice(0, int(starts[-1])), starts.to(device))
        scored = ask(self._evidence, chunks, states, rows)
        if scored is None:
            return
        firsts = self.rows.starts[:-1].tolist()
        places = [first + token for first, path in zip(firsts, paths, strict=True) for token in path]
        index = torch.tensor(places, device=device)
        lens = [chunk.start + chunk.num_tokens - gone for chunk, gone in zip(chunks, num_dropped, strict=True)]
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        staged = []
        for layer, (q, lse, options) in enumerate(zip(self._q, self._lse, self._options, strict=True)):
            k_cache, _ = cache.layer(layer)
            staged.append(
                score(scored, layer, q[index], k_cache, self._table, seq_lens, lse[index], max(lens), options)
            )
        for place, chunk in enumerate(chunks):
            count(states[chunk.row], chunk, staged, place, lens[place])


def watched(
    evidence: Evidence, chunks: Sequence[Chunk], states: Mapping[int, RowState], rows: RowRange, batch: ForwardBatch
) -> DraftedQueries | None:
    """Who keeps the queries of these rows with drafts; None where no query could count."""
    if not any(wants(evidence, chunk, states[chunk.row]) for chunk in chunks):
        return None
    return DraftedQueries(batch, rows, chunks, evidence)
