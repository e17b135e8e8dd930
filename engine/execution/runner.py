"""Executes plans: applies row changes, runs the model on one ragged batch, chooses tokens.

Knows rows, slots and tensors; never a request, a priority or a text.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import kernels
from engine.compression.prompt_filter import PromptFilters
from engine.compression.provide import Providers
from engine.compression.rows import PolicyRows
from engine.errors import EngineDead, NumericalError, SchemaTooComplex
from engine.execution.adapters import RowAdapters
from engine.execution.batch import build_batch
from engine.execution.constraints import RowConstraints
from engine.execution.cuda_graphs import DecodeGraphs
from engine.execution.launched import NO_CHOICE, LaunchedStep, Launches
from engine.execution.logprobs import prompt_logprobs
from engine.execution.pooling import PoolingRows
from engine.execution.rows import RowTable
from engine.execution.sampler import Sampler, is_drawn_alone
from engine.execution.speculation import Walker, forget_draft, keep_accepted, taps_of
from engine.execution.transfers import to_device
from engine.models.batch import ForwardBatch, KVCache, Model
from engine.scheduling.plan import Chunk, ChunkResult, NewRow, StepPlan, StepResult
from engine.types import SamplingParams, TokenLogprob

# Rows of logits held at once for prompt logprobs: bounds the memory that one long prompt can ask for.
PROMPT_LOGITS_ROWS = 64


class ModelRunner:
    """One model, its KV pool and the state of the rows that run on it."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        sampler: Sampler,
        rows: RowTable,
        constraints: RowConstraints,
        device: torch.device,
        adapters: RowAdapters | None = None,
        pooling: PoolingRows | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """graphs: recorded launches, for the steps that they fit; None: every step launches its kernels itself."""
        self.model = model
        self.cache = cache
        self._sampler = sampler
        self._rows = rows
        self._constraints = constraints
        self._adapters = adapters
        self._pooling = pooling
        self._device = device
        self._policies = PolicyRows(cache, rows)
        self._filters = PromptFilters(cache, rows)
        self._providers = Providers(cache, rows)
        self._walker = Walker(model, sampler, constraints, rows)
        self._params: dict[int, SamplingParams] = {}
        self._special_rows: set[int] = set()  # prompt log-probabilities or pooling
        self._hosted_rows: set[int] = set()  # need the host before or after each token
        self._graphs = graphs
        self._launches = Launches(rows, device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step. May be called again with a part of the chunks after it raised: nothing is applied twice.

        Raises EngineDead when the device refuses all further work; any other error may be one request's fault.
        """
        try:
            return self._execute(plan)
        except torch.AcceleratorError as error:  # sticky, unlike running out of memory, which is another class
            raise EngineDead(f"the device failed and cannot be used again: {error}") from error

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep | None:
        """See `engine.isolation.Launcher`."""
        if not self._may_launch(plan):
            return None
        try:
            return self._launch(plan)
        except torch.AcceleratorError as error:
            raise EngineDead(f"the device failed and cannot be used again: {error}") from error

    def _may_launch(self, plan: StepPlan) -> bool:
        """Whether every row of the plan wants nothing but its next token, and keeps its cache as it is."""
        hosted = self._hosted_rows.difference([new.row for new in plan.new_rows])
        if any(_needs_host(new) for new in plan.new_rows):
            return False
        return all(
            chunk.row not in hosted and chunk.draft is None and chunk.taps is None and not chunk.filters
            and chunk.compaction is None and chunk.policy is None
            for chunk in plan.chunks
        )  # fmt: skip

    def _launch(self, plan: StepPlan) -> LaunchedStep:
        self._launches.take_rows(plan.new_rows)
        self._apply(plan)
        chunks = plan.chunks
        batch = build_batch(chunks, self._rows, self.cache.k.shape[2], self._device)
        self._launches.fill_in(chunks, batch.token_ids)
        if self._adapters is not None:
            batch = self._adapters.add_to(batch, chunks)
        hidden = self._forward(batch)  # [T, C]
        sampling = [chunk for chunk in chunks if chunk.is_sampling]
        chosen = torch.empty(0, dtype=torch.int64, device=self._device)
        if sampling:
            logits = self.model.logits(self._last_of(chunks, hidden))
            chosen = self._sampler.draw(logits, [c.row for c in sampling], [c.output_index for c in sampling])
        return self._launches.start(chunks, chosen, hidden)

    def _last_of(self, chunks: Sequence[Chunk], hidden: Tensor) -> Tensor:
        """The last hidden state [R, C] of each chunk that samples. hidden [T, C]."""
        if len(chunks) == hidden.shape[0] and all(chunk.is_sampling for chunk in chunks):
            return hidden
        ends = itertools.accumulate(chunk.num_tokens for chunk in chunks)
        last = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.is_sampling]
        return kernels.gather_rows(hidden, to_device(torch.tensor(last), self._device))

    def _forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, C], by a recorded graph where one fits."""
        hidden = None if self._graphs is None else self._graphs.forward(batch)
        return self.model.forward(batch, self.cache) if hidden is None else hidden

    def _execute(self, plan: StepPlan) -> StepResult:
        self._apply(plan)
        if not plan.chunks:
            return StepResult()
        filtering = [i for i, chunk in enumerate(plan.chunks) if chunk.filters]
        providing = [i for i, chunk in enumerate(plan.chunks) if chunk.is_provided]
        order = self._policies.order(plan.chunks)
        apart = filtering + providing
        if order is None and not apart:
            return self._run(plan.chunks)
        order = [i for i in order or range(len(plan.chunks)) if i not in apart]
        # first what records no token: when it raises, nothing has been recorded that would be recorded again
        filtered = self._filter([plan.chunks[i] for i in filtering]) if filtering else []
        filtered += self._provide([plan.chunks[i] for i in providing]) if providing else []
        result = self._run([plan.chunks[i] for i in order]) if order else StepResult()
        in_plan = sorted(zip(order + apart, [*result.chunks, *filtered], strict=True), key=lambda pair: pair[0])
        return StepResult(chunks=tuple([chunk for _, chunk in in_plan]), sampler_s=result.sampler_s)

    def _filter(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        batch = build_batch(chunks, self._rows, self.cache.k.shape[2], self._device)
        if self._adapters is not None:
            batch = self._adapters.add_to(batch, chunks)
        return self._filters.run(self.model, chunks, batch)

    def _provide(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        batch = build_batch(chunks, self._rows, self.cache.k.shape[2], self._device)
        return self._providers.run(self.model, chunks, batch)

    def _run(self, chunks: Sequence[Chunk]) -> StepResult:
        batch = build_batch(chunks, self._rows, self.cache.k.shape[2], self._device)
        if self._adapters is not None:
            batch = self._adapters.add_to(batch, chunks)
        attention = self._policies.begin(chunks, batch)
        if attention is not None:
            batch = replace(batch, attention=attention, watcher=self._policies.watcher, writes=self._policies.tap)
        hidden = self._forward(batch)  # [T, C]
        last = self._last_if_plain(chunks, batch, hidden)
        result = self._choose(chunks, hidden) if last is None else self._choose_plain(chunks, last)
        if attention is None and all(chunk.compaction is None for chunk in chunks):
            return result
        results = list(result.chunks)
        self._policies.commit(chunks, results)
        return StepResult(chunks=tuple(results), sampler_s=result.sampler_s)

    def _last_if_plain(self, chunks: Sequence[Chunk], batch: ForwardBatch, hidden: Tensor) -> Tensor | None:
        """The last hidden state [R, C] of each chunk, if all are of rows that want nothing but their next tokens, and
        nothing stands in the way. None if not. hidden [T, C].
        """
        if not self._constraints.are_built:
            return None
        for chunk in chunks:
            if not chunk.is_sampling or chunk.row in self._special_rows:
                return None
            if chunk.draft is not None or chunk.taps is not None:
                return None
        if hidden.shape[0] == len(chunks):
            return hidden
        last, is_finite = kernels.gather_last(hidden, batch.cu_seqlens_q)
        return last if is_finite else None

    def _choose_plain(self, chunks: Sequence[Chunk], hidden: Tensor) -> StepResult:
        """What `_choose` does, for the steps that are most of a server's life. hidden [R, C]."""
        logits = self.model.logits(hidden)
        started = time.perf_counter()
        rows = [chunk.row for chunk in chunks]
        output_indices = [chunk.output_index for chunk in chunks]
        bitmask = self._constraints.bitmask(rows)
        chosen = self._sampler.sample(logits, rows, output_indices, bitmask)
        jumped = None if bitmask is None else self._constraints.advance_all(rows, chosen.token_ids)
        failed = self._constraints.failed
        results = []
        for i, (row, output_index, token_id) in enumerate(zip(rows, output_indices, chosen.token_ids, strict=True)):
            if token_id < 0 or row in failed:
                results.append(ChunkResult(error=SchemaTooComplex.code if row in failed else chosen.errors[i]))
                continue
            self._rows.set_token(row, output_index, token_id)
            logprobs = chosen.logprobs[i] if chosen.logprobs is not None else None
            token_ids: tuple[int, ...] = (token_id,)
            if jumped is not None and jumped[i]:
                token_ids = (token_id, *self._append_forced(row, output_index, jumped[i]))
            results.append(ChunkResult(token_ids, logprobs=None if logprobs is None else (logprobs,)))
        if bitmask is not None:
            self._constraints.follow(rows)
        return StepResult(chunks=tuple(results), sampler_s=time.perf_counter() - started)

    def _append_forced(self, row: int, output_index: int, forced: Sequence[int]) -> Sequence[int]:
        """Writes what a constraint forces behind a chosen token into the row. Returns as much of it as there is room
        for: what does not fit is not missed, the request is over then.
        """
        forced = forced[: self._rows.num_free(row, output_index)]
        counts_outputs = self._sampler.counts_outputs(row)
        for index, forced_id in enumerate(forced, start=output_index + 1):
            self._rows.set_token(row, index, forced_id)
            if counts_outputs:
                self._sampler.commit([row], [forced_id])
        return forced

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            if self._params.pop(row, None) is not None:
                self._sampler.remove_row(row)
                self._constraints.remove_row(row)
                self._policies.remove(row)
                self._filters.remove(row)
                self._providers.remove(row)
                if self._pooling is not None:
                    self._pooling.remove(row)
        for new in plan.new_rows:
            self._rows.add(new)
            self._policies.add(new)
            self._filters.add(new)
            self._providers.add(new)
            self._params[new.row] = new.sampling
            self._special_rows.discard(new.row)
            if new.sampling.prompt_logprobs is not None or new.pooling is not None:
                self._special_rows.add(new.row)
            self._hosted_rows.discard(new.row)
            if _needs_host(new):
                self._hosted_rows.add(new.row)
            if self._adapters is not None:
                self._adapters.add_row(new.row, new.adapter)
            self._sampler.add_row(new.row, new.sampling, new.choice, new.token_ids, new.num_prompt_tokens)
            if new.constraint is not None:
                self._constraints.add_row(new.row, new.constraint, new.token_ids[new.num_prompt_tokens :], new.sampling)
            if new.pooling is not None:
                assert self._pooling is not None, "the front end knows what the model offers"
                self._pooling.add(new.row, new.pooling)
        for row, index, block_id in plan.table_edits:
            self._rows.edit_block(row, index, block_id)
        if plan.block_copies:
            pairs = to_device(torch.tensor(plan.block_copies, dtype=torch.int64), self._device)
            kernels.copy_blocks(self.cache.k, self.cache.v, pairs)
        for chunk in plan.chunks:
            if chunk.new_block_ids:
                self._rows.append_blocks(chunk.row, chunk.new_block_ids)
            if chunk.packed_edits or chunk.new_side:
                self._policies.take_blocks(chunk)
            if chunk.policy is not None:
                seed = self._params[chunk.row].seed
                self._policies.adopt(chunk, self._rows.num_prompt_tokens(chunk.row), seed)

    def _choose(self, chunks: Sequence[Chunk], hidden: Tensor) -> StepResult:
        ends = []
        end = 0
        for chunk in chunks:
            end += chunk.num_tokens
            ends.append(end)
        broken = _broken_chunks(chunks, hidden)
        prompt = {
            i: self._prompt_logprobs(chunk, hidden[ends[i] - chunk.num_tokens : ends[i]])
            for i, chunk in enumerate(chunks)
            if self._params[chunk.row].prompt_logprobs is not None and i not in broken
        }
        asking = [i for i, chunk in enumerate(chunks) if chunk.is_sampling and i not in broken]
        waiting = self._constraints.waiting([chunks[i].row for i in asking])
        sampling = [i for i in asking if chunks[i].row not in waiting]
        results = [NO_CHOICE] * len(chunks)
        for i, chunk in enumerate(chunks):
            if i in broken:
                results[i] = ChunkResult(error=NumericalError.code)
            elif i in prompt or chunk.row in waiting:
                results[i] = ChunkResult(prompt_logprobs=prompt.get(i), is_deferred=chunk.row in waiting)
            if chunk.draft is not None and chunk.row in waiting:
                forget_draft(chunk, self._rows)
        if self._pooling:
            for i, chunk in enumerate(chunks):
                if chunk.row in self._pooling and i not in broken:
                    own = hidden[ends[i] - chunk.num_tokens : ends[i]]
                    results[i] = self._pooling.take(chunk, own, self._rows.num_prompt_tokens(chunk.row))
        if not sampling:
            return StepResult(chunks=tuple(results))
        walks = self._walker.start([chunks[i] for i in sampling])
        firsts = [ends[i] - walk.num_logits for i, walk in zip(sampling, walks, strict=True)]
        logits = self._walker.logits(walks, hidden, firsts)
        started = time.perf_counter()
        taps = [taps_of(walk, logits, hidden, first) for walk, first in zip(walks, firsts, strict=True)]
        self._walker.run(walks, logits)
        keep_accepted([w for w in walks if not self._policies.has_own_tables(w.chunk.row)], self._rows, self.cache)
        for i, walk, seen in zip(sampling, walks, taps, strict=True):
            results[i] = ChunkResult(
                token_ids=tuple(walk.tokens),
                accepted=tuple(walk.accepted),
                logprobs=tuple(walk.logprobs) or None,
                prompt_logprobs=prompt.get(i),
                error=walk.error,
                taps=seen,
            )
        self._constraints.follow([walk.chunk.row for walk in walks])
        return StepResult(chunks=tuple(results), sampler_s=time.perf_counter() - started)

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of prompt positions start + 1 .. start + num_tokens, as far as the prompt goes."""
        end = min(chunk.start + chunk.num_tokens + 1, self._rows.num_prompt_tokens(chunk.row))
        next_ids = torch.from_numpy(self._rows.tokens(chunk.row, chunk.start + 1, end)).to(torch.int64)
        top_n = self._params[chunk.row].prompt_logprobs or 0
        entries: list[TokenLogprob] = []
        for i in range(0, len(next_ids), PROMPT_LOGITS_ROWS):
            part = next_ids[i : i + PROMPT_LOGITS_ROWS]
            logits = self.model.logits(hidden[i : i + len(part)])
            entries.extend(prompt_logprobs(logits, part.to(logits.device), top_n))
        return tuple(entries)


def _needs_host(new: NewRow) -> bool:
    """Whether the row has something to do between two tokens that the device does not do alone."""
    is_plain = new.constraint is None and new.pooling is None and new.policy is None
    return not (is_plain and is_drawn_alone(new.sampling))


def _broken_chunks(chunks: Sequence[Chunk], hidden: Tensor) -> set[int]:
    """Indices of chunks in which a hidden state [C] is not finite, of hidden [T, C].

    Sampling looks at a row's last position only, and a sliding window keeps those before it from showing there: their
    keys and values would be shared through the prefix cache.
    """
    if all(chunk.is_decode for chunk in chunks):
        return set()
    if math.isfinite(hidden.sum().item()):  # a sum is not, where a term is not; one look for all is cheap
        return set()
    is_finite = hidden.isfinite().all(dim=1)  # [T]
    parts = is_finite.split([chunk.num_tokens for chunk in chunks])
    # of a draft, only the root is known to be part of the text; the walk looks at the others
    parts = [part if chunk.draft is None else part[:1] for chunk, part in zip(chunks, parts, strict=True)]
    return {i for i, part in enumerate(parts) if not bool(part.all())}
