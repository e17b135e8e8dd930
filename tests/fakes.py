"""Stand-ins for the expensive parts, shared by the tests. Torch-free.

FakeRunner obeys the contract of `engine.scheduling.plan` to the letter and simulates the cache: a slot "contains" a
hash of all tokens up to its position, computed from the slot before it. The next token is a hash of what the last slot
contains. So any mistake with blocks, tables, copies or progress changes the tokens, and in strict mode raises at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import EngineDead
from engine.scheduling.plan import Chunk, ChunkResult, NewRow, StepPlan, StepResult
from engine.types import SamplingParams, TokenLogprob

_MASK = (1 << 64) - 1
ROOT = 0x5DEECE66D  # hash of no tokens
NAN = -1  # what slots hold after a step with non-finite logits


def next_hash(history: int, token_id: int) -> int:
    """Hash of a token history, one token longer."""
    mixed = (history ^ (token_id + 1)) * 0x9E3779B97F4A7C15 & _MASK
    return mixed ^ mixed >> 29


class ContractViolation(EngineDead):
    """The scheduler's plan is wrong. Not an ordinary error: the core must not take it for a request's fault."""


@dataclass
class FakeRow:
    new: NewRow
    token_ids: list[int]
    block_ids: list[int]
    hashes: list[int] = field(default_factory=list)  # what each slot must contain, strict mode only
    num_pooled: int = 0  # prompt tokens that a pooling row has seen
    is_broken: bool = False  # a step of it had an error


class FakeRunner:
    """Deterministic tokens below `vocab_size`: scripted ones where `scripts` has the choice, hashes elsewhere.

    eos_token_id     chosen by about one hash in `eos_every`, but not before `min_tokens`; None: never
    fail_ids         requests whose forward raises
    nan_ids          requests whose logits are not finite
    strict           compare every slot a row can see with its tokens; takes time with the context
    """

    def __init__(
        self,
        block_size: int,
        *,
        vocab_size: int = 100,
        eos_token_id: int | None = None,
        eos_every: int = 20,
        scripts: Mapping[tuple[str, int], Sequence[int]] | None = None,
        strict: bool = True,
    ) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id
        self.eos_every = eos_every
        self.scripts = scripts or {}
        self.strict = strict
        self.fail_ids: set[str] = set()
        self.nan_ids: set[str] = set()
        self.plans: list[StepPlan] = []
        self.rows: dict[int, FakeRow] = {}
        self.slots: dict[int, int] = {}  # block id * block_size + offset -> hash

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        del self.plans[:-100]
        self._apply(plan)
        for chunk in plan.chunks:
            if self.rows[chunk.row].new.request_id in self.fail_ids:
                raise RuntimeError("injected failure of the forward")
        if self.strict:
            for chunk in plan.chunks:  # before any of them runs: in a real step none sees what another one writes
                self._check(self.rows[chunk.row], chunk)
        return StepResult(chunks=tuple([self._run(chunk) for chunk in plan.chunks]))

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self.rows.pop(row, None)
        for new in plan.new_rows:
            self.rows[new.row] = FakeRow(new, list(new.token_ids), list(new.block_ids))
        for row, index, block_id in plan.table_edits:
            self.rows[row].block_ids[index] = block_id
        for source, destination in plan.block_copies:
            for offset in range(self.block_size):
                slot = source * self.block_size + offset
                self.slots[destination * self.block_size + offset] = self.slots.get(slot, 0)
        for chunk in plan.chunks:
            block_ids = self.rows[chunk.row].block_ids
            # the tail may be there already, when a step that raised is run again
            if chunk.new_block_ids and tuple(block_ids[-len(chunk.new_block_ids) :]) != chunk.new_block_ids:
                block_ids += chunk.new_block_ids

    def _run(self, chunk: Chunk) -> ChunkResult:
        row = self.rows[chunk.row]
        history = self.slots[self._slot(row, chunk.start - 1)] if chunk.start else ROOT
        prompt_logprobs = []
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            history = next_hash(history, row.token_ids[position])
            self.slots[self._slot(row, position)] = history
            if position + 1 < row.new.num_prompt_tokens:
                prompt_logprobs.append(_logprob(row.token_ids[position + 1], history))
        sampling = row.new.sampling
        if row.new.pooling is not None:
            return self._pool(row, chunk, history)
        told = tuple(prompt_logprobs) if sampling.prompt_logprobs is not None else None
        if not chunk.is_sampling:
            return ChunkResult(prompt_logprobs=told)
        if row.new.request_id in self.nan_ids:
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                self.slots[self._slot(row, position)] = NAN
            return ChunkResult(error="numerical_error", prompt_logprobs=told)
        token_id = self.choose(history, row.new.request_id, row.new.choice, chunk.output_index, sampling)
        row.token_ids.append(token_id)
        logprobs = (_logprob(token_id, history),) if sampling.logprobs is not None else None
        return ChunkResult(token_ids=(token_id,), logprobs=logprobs, prompt_logprobs=told)

    def _pool(self, row: FakeRow, chunk: Chunk, history: int) -> ChunkResult:
        """The result is the hash of the prompt. A method that needs all tokens must see the prompt from its start."""
        assert row.new.pooling is not None
        if row.new.pooling.needs_all_tokens:
            if chunk.start != row.num_pooled:
                raise ContractViolation(f"{chunk} after {row.num_pooled} pooled tokens of {row.new}")
            row.num_pooled += chunk.num_tokens
        if chunk.start + chunk.num_tokens < row.new.num_prompt_tokens:
            return ChunkResult()
        return ChunkResult(pooled=(history.to_bytes(8, "little"), (2,)))

    def choose(self, history: int, request_id: str, choice: int, output_index: int, sampling: SamplingParams) -> int:
        """The token that follows a history, a pure function of its arguments. Honours `min_tokens`."""
        script = self.scripts.get((request_id, choice))
        if script is not None and output_index < len(script):
            return script[output_index]
        draw = history if sampling.is_greedy else next_hash(next_hash(history, sampling.seed), choice)
        is_end = self.eos_token_id is not None and draw % self.eos_every == 0
        token_id = self.eos_token_id if is_end else draw // self.eos_every % self.vocab_size
        masked = {self.eos_token_id} if not is_end else set()  # ends come as often as asked for
        if output_index < sampling.min_tokens:
            masked = {self.eos_token_id, *sampling.stop_token_ids}
        while token_id in masked:
            token_id = (token_id + 1) % self.vocab_size
        return token_id

    def _slot(self, row: FakeRow, position: int) -> int:
        return row.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def _check(self, row: FakeRow, chunk: Chunk) -> None:
        """Raises ContractViolation unless the chunk fits its row, and the slots before it hold the row's tokens."""
        end, num_tokens = chunk.start + chunk.num_tokens, len(row.token_ids)
        num_blocks = len(set(row.block_ids) - {0})
        is_legal = (
            0 <= chunk.start < end <= num_tokens
            and chunk.is_sampling == (end == num_tokens and row.new.pooling is None)
            and chunk.output_index == num_tokens - row.new.num_prompt_tokens
            and len(row.block_ids) == num_blocks == -(-end // self.block_size)
        )
        if not is_legal:
            raise ContractViolation(f"{chunk} for {num_tokens} tokens in blocks {row.block_ids} of {row.new}")
        while len(row.hashes) < chunk.start:
            history = row.hashes[-1] if row.hashes else ROOT
            row.hashes.append(next_hash(history, row.token_ids[len(row.hashes)]))
        for position in range(chunk.start):
            if self.slots.get(self._slot(row, position)) != row.hashes[position]:
                raise ContractViolation(f"position {position} of {row.new} is not what its block holds")


class LateRunner(FakeRunner):
    """Launches steps and executes each one as late as it can: when its result is asked for, the oldest first.

    So a plan runs after the next one was made, on a device that sees only what the plan said when it was launched.
    A row that had an error goes on with garbage in the step behind, as on a real device.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_launched = 0
        self.while_running: Callable[[], None] = lambda: None  # called once, before the next result
        self._pending: deque[LateStep] = deque()

    def launch(self, plan: StepPlan) -> LateStep | None:
        if len(self._pending) > 1:
            raise ContractViolation("two steps are pending, and a third one is launched")
        news = {new.row: new for new in plan.new_rows}
        rows = {chunk.row: news.get(chunk.row) or self._new_of(chunk.row) for chunk in plan.chunks}
        for new in rows.values():
            if new.sampling.logprobs is not None or new.sampling.prompt_logprobs is not None or new.pooling is not None:
                return None
            if new.request_id in self.fail_ids:
                raise RuntimeError("injected failure of the launch")
        if any(token_id < 0 for new in plan.new_rows for token_id in new.token_ids):
            raise ContractViolation("a row is new and its tokens are not known")
        copies = tuple(replace(new, token_ids=list(new.token_ids)) for new in plan.new_rows)
        step = LateStep(self, replace(plan, new_rows=copies))
        self._pending.append(step)
        self.num_launched += 1
        return step

    def execute(self, plan: StepPlan) -> StepResult:
        if self._pending:
            raise ContractViolation("a plan is executed while another one is pending")
        return super().execute(plan)

    def finish(self, step: LateStep) -> StepResult:
        while_running, self.while_running = self.while_running, lambda: None
        while_running()
        if self._pending.popleft() is not step:
            raise ContractViolation("results are asked for in another order than that of the launches")
        failing, self.fail_ids = self.fail_ids, set()  # what could be launched does not fail any more
        try:
            return super().execute(step.plan)
        finally:
            self.fail_ids = failing

    def _new_of(self, row: int) -> NewRow:
        """Who has the row when the steps launched so far have run."""
        for step in reversed(self._pending):
            for new in step.plan.new_rows:
                if new.row == row:
                    return new
        return self.rows[row].new

    def _check(self, row: FakeRow, chunk: Chunk) -> None:
        if not row.is_broken:
            super()._check(row, chunk)

    def _run(self, chunk: Chunk) -> ChunkResult:
        row = self.rows[chunk.row]
        if row.is_broken:
            return ChunkResult(error="numerical_error")
        result = super()._run(chunk)
        row.is_broken = result.error is not None
        return result


@dataclass
class LateStep:
    runner: LateRunner
    plan: StepPlan

    def result(self) -> StepResult:
        return self.runner.finish(self)


def _logprob(token_id: int, history: int) -> TokenLogprob:
    return TokenLogprob(token_id, -1.0 - history % 1000 / 1000, 1, [], [])
