"""The scheduler under random traffic: every invariant after every operation, every stream equal to its solo run."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.scheduling.harness import Harness
from tests.scheduling.machines import case_of, pick, picks


class SchedulerMachine(RuleBasedStateMachine):
    """Small pools, few rows, tiny budgets: preemption, waiting and refusal are the rule, not the exception."""

    @initialize(
        num_blocks=st.integers(3, 64),
        block_size=st.sampled_from([1, 2, 4, 8]),
        max_num_seqs=st.integers(1, 8),
        max_num_batched_tokens=st.integers(1, 24),
        max_waiting_requests=st.integers(1, 12),
        protect_after_preemptions=st.integers(0, 3),
        prefix_cache=st.booleans(),
    )
    def start(self, **options: int) -> None:
        self.harness = Harness(max_model_len=48, max_queue_wait_s=40.0, max_request_s=90.0, **options)

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20),
        source=picks,
        num_shared=st.integers(0, 20),
        max_tokens=st.integers(1, 16),
        num_choices=st.sampled_from([1, 1, 1, 2, 3, 5]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        tenant=st.sampled_from(["a", "b"]),
        cache_salt=st.sampled_from(["", "", "s"]),
        temperature=st.sampled_from([0.0, 1.0]),
        min_tokens=st.sampled_from([0, 3]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        deadline_s=st.sampled_from([None, None, 3.0]),
        fate=st.sampled_from(["ok"] * 8 + ["nan", "raise"]),
    )
    def add(self, prompt: list[int], source: int, num_shared: int, fate: str, **options: object) -> None:
        known = list(self.harness.requests.values())
        if known:
            earlier = pick(source, known)
            history = earlier.prompt_token_ids + self.harness.tokens(earlier.request_id)
            prompt = history[:num_shared] + prompt
        request_id = self.harness.try_add(prompt, **options)
        if request_id is not None:
            {"ok": set(), "nan": self.harness.runner.nan_ids, "raise": self.harness.runner.fail_ids}[fate].add(
                request_id
            )

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.harness.step()

    @precondition(lambda self: self.harness.requests)
    @rule(index=picks, choice=st.sampled_from([None, None, 0, 1]), is_in_flight=st.booleans())
    def abort(self, index: int, choice: int | None, is_in_flight: bool) -> None:
        """Of any request: waiting, parked, running, finished; twice now and then."""
        request_id = pick(index, list(self.harness.requests))
        if is_in_flight:
            self.harness.step(while_running=lambda: self.harness.abort(request_id, choice))
        else:
            self.harness.abort(request_id, choice)
            self.harness.check()
        streams = [s for (owner, n), s in self.harness.streams.items() if owner == request_id and choice in (None, n)]
        held = [r for r in self.harness.scheduler.roster.requests() if r.request_id == request_id]
        assert all(stream.final or stream.is_aborted for stream in streams)
        assert choice is not None or not held, "an aborted request still exists"

    @rule(seconds=st.sampled_from([0.5, 2.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.harness.now += seconds

    @rule()
    def clear_cache(self) -> None:
        cache = self.harness.scheduler.cache.prefix_cache
        if cache is not None:
            cache.clear("a")
            self.harness.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.run()
            self.harness.check_finished()


TestScheduler = case_of(SchedulerMachine, 500, 100)
TestSchedulerLong = pytest.mark.slow(case_of(SchedulerMachine, 20_000, 100))
