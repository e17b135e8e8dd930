"""Drives a scheduler with the FakeRunner, keeps the ledger of what clients saw, and compares it with solo runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config import CacheConfig, SchedulerConfig
from engine.core import EngineCore
from engine.errors import CapacityError, RequestError
from engine.isolation import execute_isolated
from engine.scheduling.invariants import check_invariants
from engine.scheduling.plan import StepPlan, StepResult
from engine.scheduling.request import Request, Status
from engine.scheduling.scheduler import Scheduler
from engine.types import EngineRequest, SamplingParams, TokenOutput
from tests.fakes import ROOT, FakeRunner, LateRunner, next_hash

EOS = 7


@dataclass
class Stream:
    """What the client of one choice has seen."""

    token_ids: list[int] = field(default_factory=list)
    outputs: list[TokenOutput] = field(default_factory=list)
    is_aborted: bool = False

    @property
    def final(self) -> TokenOutput | None:
        return self.outputs[-1] if self.outputs and self.outputs[-1].finish_reason else None


class Harness:
    """One scheduler, one runner, a clock that moves only by hand."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 96,
        prefix_cache: bool = True,
        strict: bool = True,
        runner: FakeRunner | None = None,
        scheduler_type: Callable[..., Scheduler] = Scheduler,
        whole_prompts: bool = False,
        max_pinned_blocks: int = 0,
        overlaps: bool = False,
        **limits: Any,
    ) -> None:
        """overlaps: steps are planned while others run, as late as the LateRunner can."""
        self.now = 0.0
        self.max_model_len = max_model_len
        self.is_strict = strict
        self.scheduler = scheduler_type(
            SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **limits}),
            CacheConfig(block_size=block_size, enable_prefix_cache=prefix_cache, max_pinned_blocks=max_pinned_blocks),
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            clock=lambda: self.now,
            secret=b"tests",
            whole_prompts=whole_prompts,
        )
        runner_type = LateRunner if overlaps else FakeRunner
        self.runner = runner or runner_type(block_size, eos_token_id=EOS, strict=strict)
        self.core = EngineCore(self.scheduler, self.runner, overlaps=overlaps)
        self.requests: dict[str, EngineRequest] = {}
        self.streams: dict[tuple[str, int], Stream] = {}
        self.num_steps = 0

    def add(self, prompt: Sequence[int], request_id: str | None = None, **options: Any) -> str:
        """Raises what the scheduler raises; the ledger has only accepted requests."""
        request_id = request_id or f"r{len(self.requests)}"
        fields = {k: options.pop(k) for k in tuple(options) if k in EngineRequest.__struct_fields__}
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **options}),
            **fields,
        )
        self.scheduler.add(request)
        self.requests[request_id] = request
        for choice in range(request.num_choices):
            self.streams[request_id, choice] = Stream()
        self.check()
        return request_id

    def try_add(self, prompt: Sequence[int], **options: Any) -> str | None:
        try:
            return self.add(prompt, **options)
        except (RequestError, CapacityError):
            self.check()
            return None

    def abort(self, request_id: str, choice: int | None = None) -> None:
        self.scheduler.abort(request_id, choice)
        num_choices = self.requests[request_id].num_choices if request_id in self.requests else 0
        for number in range(num_choices) if choice is None else (choice,):
            stream = self.streams.get((request_id, number))
            if stream is not None and stream.final is None:
                stream.is_aborted = True

    def step(self, while_running: Callable[[], None] | None = None) -> list[TokenOutput]:
        """One step, everything checked in between; `while_running` happens between schedule and commit."""
        if self.core.overlaps:
            return self._step_overlapped(while_running)
        running = self.scheduler.roster.running
        oldest = running[0] if running else None
        is_protected = oldest is not None and self._is_protected(oldest)
        plan = self.scheduler.schedule()
        self.check(plan)
        assert not is_protected or oldest.status is not Status.WAITING, "the oldest can always run"
        result = execute_isolated(self.runner, plan) if plan.chunks else StepResult()
        if while_running is not None:
            while_running()
            self.check()
        outputs = self.scheduler.commit(plan, result)
        self.num_steps += 1
        self.check()
        for output in outputs:
            self._record(output)
        return outputs

    def _step_overlapped(self, while_running: Callable[[], None] | None) -> list[TokenOutput]:
        assert isinstance(self.runner, LateRunner)
        if while_running is not None:
            self.runner.while_running = while_running
        outputs = self.core.step_overlapped()
        self.num_steps += 1
        self.check()
        for output in outputs:
            self._record(output)
        return outputs

    def run(self, max_steps: int = 10_000) -> None:
        """Until all is done."""
        for _ in range(max_steps):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def check(self, plan: StepPlan | None = None) -> None:
        if self.is_strict:
            check_invariants(self.scheduler, plan)

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        return self.streams[request_id, choice].token_ids

    def check_finished(self) -> None:
        """Everybody got what a solo run gives, exactly one end, and nothing is left behind."""
        assert not self.scheduler.has_work
        for (request_id, choice), stream in self.streams.items():
            if stream.is_aborted:
                continue
            assert stream.final is not None, f"{request_id}/{choice} has no end"
            expected, reason = self.expected(request_id, choice)
            if stream.final.finish_reason == "error":
                causes = {"internal_error": self.runner.fail_ids, "numerical_error": self.runner.nan_ids}
                assert request_id in causes.get(stream.final.error or "", self.requests), f"{stream.final.error}"
                assert stream.token_ids == expected[: len(stream.token_ids)]
            else:
                assert (stream.token_ids, stream.final.finish_reason) == (expected, reason), f"{request_id}/{choice}"
        counts = self.scheduler.cache.pool.counts
        assert counts.active == counts.pinned == 0
        assert self.scheduler.rows.num_free == self.scheduler.limits.max_num_seqs
        assert self.scheduler.roster.num_waiting == 0
        if self.scheduler.cache.prefix_cache is not None:
            self.scheduler.cache.prefix_cache.reset()
        assert self.scheduler.cache.pool.counts.free == self.scheduler.cache.pool.num_blocks - 1

    def settle(self) -> int:
        """Runs dry, checks everything and forgets the finished requests. Returns how many those were."""
        self.run(max_steps=100_000)
        self.check_finished()
        num_requests = len(self.requests)
        self.requests.clear()
        self.streams.clear()
        return num_requests

    def expected(self, request_id: str, choice: int) -> tuple[list[int], str]:
        """Tokens and end of the request, computed from its token history alone."""
        request = self.requests[request_id]
        if request.pooling is not None:
            return [], "stop"
        sampling = request.sampling
        stops = {*sampling.stop_token_ids} | (set() if sampling.ignore_eos else {EOS})
        limit = min(sampling.max_tokens, self.max_model_len - len(request.prompt_token_ids))
        history, outputs = ROOT, []
        for token_id in request.prompt_token_ids:
            history = next_hash(history, token_id)
        while len(outputs) < limit:
            outputs.append(self.runner.choose(history, request_id, choice, len(outputs), sampling))
            history = next_hash(history, outputs[-1])
            if outputs[-1] in stops:
                return outputs, "stop"
        return outputs, "length"

    def _is_protected(self, request: Request) -> bool:
        return request.num_preemptions >= self.scheduler.limits.protect_after_preemptions

    def _record(self, output: TokenOutput) -> None:
        stream = self.streams[output.request_id, output.choice]
        assert stream.final is None, "output after the end"
        assert not stream.is_aborted, "output after the client's abort"
        stream.outputs.append(output)
        stream.token_ids += output.token_ids
        assert len(stream.token_ids) <= self.requests[output.request_id].sampling.max_tokens
