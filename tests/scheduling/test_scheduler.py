"""What the scheduler decides, case by case. Random traffic is in test_scheduler_machine.py."""

from __future__ import annotations

import pytest

from engine.errors import InvalidParameter, PromptTooLong, QueueFull
from engine.scheduling.plan import ChunkResult, StepResult
from engine.scheduling.preemption import choose_victim
from engine.scheduling.request import Status
from tests.fakes import FakeRunner
from tests.scheduling.harness import EOS, Harness


def prompt_of(length: int, start: int = 10) -> list[int]:
    return list(range(start, start + length))


class TestBuildingAStep:
    def test_a_long_prompt_runs_in_chunks_and_only_the_last_one_samples(self) -> None:
        harness = Harness(max_num_batched_tokens=10)
        harness.add(prompt_of(25), max_tokens=1)
        harness.run()
        chunks = [chunk for plan in harness.runner.plans for chunk in plan.chunks]
        assert [(c.start, c.num_tokens, c.is_sampling) for c in chunks] == [
            (0, 10, False),
            (10, 10, False),
            (20, 5, True),
        ]
        assert [plan.kind for plan in harness.runner.plans] == ["prefill"] * 3

    def test_rows_that_decode_run_first_and_a_prompt_fills_the_budget(self) -> None:
        harness = Harness(max_num_batched_tokens=12)
        harness.add(prompt_of(6), max_tokens=30, ignore_eos=True)
        harness.step()
        harness.add(prompt_of(30, start=50), max_tokens=2)
        harness.step()
        plan = harness.runner.plans[-1]
        assert [(c.row, c.num_tokens) for c in plan.chunks] == [(0, 1), (1, 11)]
        assert plan.kind == "mixed"

    def test_plans_tell_only_what_changed(self) -> None:
        harness = Harness()
        harness.add(prompt_of(6), max_tokens=10, ignore_eos=True)
        harness.step()
        first = harness.runner.plans[-1]
        assert len(first.new_rows) == 1
        assert [len(c.new_block_ids) for c in first.chunks] == [2]
        new_blocks = []
        for _ in range(4):
            harness.step()
            assert harness.runner.plans[-1].new_rows == ()
            new_blocks += [len(c.new_block_ids) for c in harness.runner.plans[-1].chunks]
        assert new_blocks == [0, 0, 1, 0]

    def test_a_finished_row_is_reported_with_the_next_step_and_reused(self) -> None:
        harness = Harness(max_num_seqs=1)
        for _ in range(2):
            harness.add(prompt_of(3), max_tokens=1)
        harness.step()
        harness.step()
        plan = harness.runner.plans[-1]
        assert plan.freed_rows == (0,)
        assert [new.row for new in plan.new_rows] == [0]

    def test_a_head_that_does_not_fit_is_not_overtaken(self) -> None:
        harness = Harness(num_blocks=12, prefix_cache=False)
        harness.add(prompt_of(20), max_tokens=10, ignore_eos=True)
        harness.step()
        big = harness.add(prompt_of(30, start=50), max_tokens=2)
        small = harness.add(prompt_of(3), max_tokens=2)
        started: list[str] = []
        while harness.scheduler.has_work:
            harness.step()
            started += [new.request_id for new in harness.runner.plans[-1].new_rows]
        assert started.index(big) < started.index(small)
        harness.check_finished()

    def test_urgent_requests_start_first(self) -> None:
        harness = Harness(max_num_seqs=1)
        for priority in (1, 0, -1, 0):
            harness.add(
                prompt_of(2), request_id=f"p{priority}-{len(harness.requests)}", priority=priority, max_tokens=1
            )
        order = []
        while harness.scheduler.has_work:
            order += [output.request_id for output in harness.step()]
        assert order == ["p-1-2", "p0-1", "p0-3", "p1-0"]

    def test_a_tenant_that_floods_delays_another_by_one_turn(self) -> None:
        harness = Harness(max_num_seqs=1, max_waiting_requests=500)
        for _ in range(100):
            harness.add(prompt_of(2), tenant="flood", max_tokens=1)
        quiet = harness.add(prompt_of(2), tenant="quiet", max_tokens=1)
        served = [output.request_id for _ in range(3) for output in harness.step()]
        assert quiet in served

    def test_committing_another_plan_or_too_few_results_is_refused(self) -> None:
        harness = Harness()
        harness.add(prompt_of(3))
        plan = harness.scheduler.schedule()
        with pytest.raises(AssertionError, match="has not been committed"):
            harness.scheduler.schedule()
        with pytest.raises(AssertionError, match="0 results for 1 chunks"):
            harness.scheduler.commit(plan, StepResult())


class TestFinishing:
    @pytest.mark.parametrize(
        ("options", "expected", "reason", "stop_token_id"),
        [
            ({}, [1, 2, EOS], "stop", EOS),
            ({"ignore_eos": True}, [1, 2, EOS, 3, 4], "length", None),
            ({"stop_token_ids": (2,)}, [1, 2], "stop", 2),
            ({"stop_token_ids": (EOS,), "ignore_eos": True}, [1, 2, EOS], "stop", EOS),
            ({"max_tokens": 2}, [1, 2], "length", None),
            ({"max_tokens": 3}, [1, 2, EOS], "stop", EOS),
        ],
    )
    def test_the_first_rule_that_holds_ends_the_request(
        self, options: dict[str, object], expected: list[int], reason: str, stop_token_id: int | None
    ) -> None:
        script = [1, 2, EOS, 3, 4, 5, 6]
        harness = Harness(runner=FakeRunner(4, eos_token_id=EOS, scripts={("r0", 0): script}))
        harness.add(prompt_of(5), **{"max_tokens": 5, **options})
        harness.run()
        final = harness.streams["r0", 0].final
        assert final is not None
        assert (harness.tokens("r0"), final.finish_reason, final.stop_token_id) == (expected, reason, stop_token_id)

    def test_the_context_length_ends_a_request(self) -> None:
        harness = Harness(max_model_len=12, num_blocks=4)
        harness.add(prompt_of(10), max_tokens=100, ignore_eos=True)
        harness.run()
        assert len(harness.tokens("r0")) == 2
        assert harness.streams["r0", 0].outputs[-1].finish_reason == "length"

    def test_no_end_comes_before_min_tokens(self) -> None:
        harness = Harness(runner=FakeRunner(4, eos_token_id=EOS, eos_every=1))
        harness.add(prompt_of(5), max_tokens=20, min_tokens=6)
        harness.run()
        assert len(harness.tokens("r0")) == 7
        assert harness.tokens("r0").index(EOS) == 6

    def test_non_finite_logits_end_only_their_own_request_and_leave_nothing_in_the_cache(self) -> None:
        harness = Harness()
        bad = harness.add(prompt_of(20))
        good = harness.add(prompt_of(20, start=60))
        harness.runner.nan_ids.add(bad)
        harness.run()
        final = harness.streams[bad, 0].final
        assert final is not None
        assert (final.finish_reason, final.error, final.token_ids) == ("error", "numerical_error", [])
        assert harness.tokens(good) == harness.expected(good, 0)[0]
        harness.runner.nan_ids.clear()
        again = harness.add(prompt_of(20))
        harness.run()
        assert harness.streams[again, 0].outputs[0].num_cached_tokens == 0

    def test_once_only_facts_come_with_the_first_output(self) -> None:
        harness = Harness(max_num_seqs=1)
        harness.add(prompt_of(9), max_tokens=3, ignore_eos=True, logprobs=0)
        harness.now = 2.5
        harness.run()
        first, second, third = harness.streams["r0", 0].outputs
        assert (first.queued_s, first.num_cached_tokens) == (2.5, 0)
        assert (second.queued_s, second.num_cached_tokens, third.queued_s) == (None, None, None)
        assert all(len(output.logprobs or []) == 1 for output in (first, second, third))


class TestRefusing:
    def test_what_can_never_fit_the_pool_is_refused_and_what_just_fits_runs(self) -> None:
        harness = Harness(num_blocks=6, block_size=4, max_model_len=1000)  # 20 slots
        harness.add(prompt_of(15), max_tokens=6, ignore_eos=True)  # the last token needs no slot
        with pytest.raises(PromptTooLong, match="15 prompt tokens plus max_tokens 7 exceed the 20 tokens") as caught:
            harness.add(prompt_of(15), max_tokens=7)
        assert caught.value.param == "max_tokens"
        harness.run()
        harness.check_finished()

    @pytest.mark.parametrize(("length", "is_accepted"), [(30, True), (31, True), (32, False), (33, False)])
    def test_a_prompt_must_leave_room_for_one_token(self, length: int, is_accepted: bool) -> None:
        harness = Harness(max_model_len=32)
        if is_accepted:
            harness.add(prompt_of(length))
            harness.run()
            harness.check_finished()
        else:
            with pytest.raises(PromptTooLong, match=f"the prompt has {length} tokens, max_model_len is 32"):
                harness.add(prompt_of(length))

    def test_the_queue_takes_its_bound_and_no_more(self) -> None:
        harness = Harness(max_num_seqs=1, max_waiting_requests=3)
        harness.add(prompt_of(3), max_tokens=50, ignore_eos=True)
        harness.step()
        for _ in range(3):
            harness.add(prompt_of(3))
        harness.now += 12.4
        with pytest.raises(QueueFull, match="3 requests wait, the bound is 3") as caught:
            harness.add(prompt_of(3))
        assert caught.value.retry_after_s == 12
        harness.run()
        harness.check_finished()

    def test_free_rows_count_as_room_in_the_queue(self) -> None:
        harness = Harness(max_num_seqs=4, max_waiting_requests=2)
        for _ in range(6):
            harness.add(prompt_of(3))
        with pytest.raises(QueueFull):
            harness.add(prompt_of(3))

    def test_waiting_prompt_tokens_are_bounded_too(self) -> None:
        harness = Harness(num_blocks=11, max_num_seqs=1, max_waiting_pools=2.0)  # 40 slots, so 80 tokens may wait
        for length in (30, 30, 20):
            harness.add(prompt_of(length), max_tokens=1)
        with pytest.raises(QueueFull, match="80 prompt tokens wait and this request has 1, the bound is 80"):
            harness.add([1], max_tokens=1)
        harness.step()
        harness.add([1], max_tokens=1)
        harness.run()
        harness.check_finished()

    def test_a_single_long_prompt_always_finds_an_empty_queue_open(self) -> None:
        harness = Harness(num_blocks=11, max_waiting_pools=0.1)
        harness.add(prompt_of(39), max_tokens=1)
        harness.run()
        harness.check_finished()

    @pytest.mark.parametrize(
        ("prompt", "options", "message"),
        [
            ([], {}, "the prompt has no tokens"),
            ([1], {"max_tokens": 0}, "max_tokens is 0"),
            ([1], {"num_choices": 0}, "n is 0"),
            ([1], {"request_id": "taken"}, "'taken' is in use"),
            ([1], {"kv_policy": {"name": "snapkv"}}, "kv_policy is given"),
            ([1], {"speculative": {"drafters": ["ngram"]}}, "speculative is given"),
        ],
    )
    def test_malformed_requests_are_refused_without_a_trace(
        self, prompt: list[int], options: dict[str, object], message: str
    ) -> None:
        harness = Harness()
        harness.add([1, 2], request_id="taken")
        before = harness.scheduler.stats()
        with pytest.raises(InvalidParameter, match=message):
            harness.add(prompt, **options)
        assert harness.scheduler.stats() == before
        harness.run()
        harness.check_finished()


class TestPrefixCache:
    def test_a_repeated_prompt_computes_only_its_last_block(self) -> None:
        harness = Harness()
        harness.add(prompt_of(16), max_tokens=1)
        harness.run()
        second = harness.add(prompt_of(16), max_tokens=1)
        harness.step()
        [chunk] = harness.runner.plans[-1].chunks
        assert (chunk.start, chunk.num_tokens) == (12, 4)
        assert harness.streams[second, 0].outputs[0].num_cached_tokens == 12

    def test_the_next_turn_finds_the_answer_of_the_last_one(self) -> None:
        harness = Harness()
        first = harness.add(prompt_of(10), max_tokens=9, ignore_eos=True)
        harness.run()
        history = prompt_of(10) + harness.tokens(first)
        second = harness.add([*history, 5, 6], max_tokens=1)
        harness.run()
        assert harness.streams[second, 0].outputs[0].num_cached_tokens == 16  # of 18 computed: whole blocks

    @pytest.mark.parametrize("other", [{"tenant": "b"}, {"cache_salt": "s"}])
    def test_tenants_and_salts_share_nothing(self, other: dict[str, str]) -> None:
        harness = Harness()
        harness.add(prompt_of(16), max_tokens=1, tenant="a")
        harness.run()
        second = harness.add(prompt_of(16), max_tokens=1, **{"tenant": "a", **other})
        harness.run()
        assert harness.streams[second, 0].outputs[0].num_cached_tokens == 0

    def test_shared_blocks_are_not_charged_twice(self) -> None:
        harness = Harness(num_blocks=16)
        options = {"max_tokens": 4, "ignore_eos": True}
        harness.add(prompt_of(40), **options)
        harness.step()
        harness.step()
        harness.add(prompt_of(40), **options)  # alone it would need 10 of the 4 blocks left
        harness.step()
        assert len(harness.runner.plans[-1].chunks) == 2
        # 10 for the prompt, of which the second found 9 and computed the last one to find that it exists too; 1 grown
        assert harness.scheduler.stats().blocks_active == 11

    def test_equal_prompts_computed_side_by_side_end_up_in_the_same_blocks(self) -> None:
        harness = Harness(max_num_batched_tokens=100)
        for _ in range(3):
            harness.add(prompt_of(17), max_tokens=4, ignore_eos=True)
        harness.step()
        assert harness.scheduler.stats().blocks_active == 4 + 3
        harness.step()
        assert len(harness.runner.plans[-1].table_edits) == 8
        harness.run()
        harness.check_finished()

    def test_prompt_logprobs_bypass_the_cache_and_come_once(self) -> None:
        harness = Harness(max_num_batched_tokens=7)
        harness.add(prompt_of(17), max_tokens=2)
        harness.run()
        second = harness.add(prompt_of(17), max_tokens=3, prompt_logprobs=0, num_choices=2, ignore_eos=True)
        harness.run()
        outputs = harness.streams[second, 0].outputs
        told = outputs[0].prompt_logprobs
        assert told is not None
        assert told[0] is None
        assert [entry.token_id for entry in told[1:] if entry] == prompt_of(17)[1:]
        assert outputs[0].num_cached_tokens == 0
        others = outputs[1:] + harness.streams[second, 1].outputs
        assert all(output.prompt_logprobs is None for output in others)

    def test_prompt_logprobs_survive_preemption(self) -> None:
        harness = Harness(num_blocks=12, max_num_batched_tokens=6, prefix_cache=False)
        first = harness.add(prompt_of(8), max_tokens=25, ignore_eos=True)
        harness.step()
        harness.step()
        second = harness.add(prompt_of(14, start=50), max_tokens=20, ignore_eos=True, prompt_logprobs=0)
        harness.run()
        assert harness.scheduler.stats().num_preemptions > 0
        told = [o.prompt_logprobs for o in harness.streams[second, 0].outputs if o.prompt_logprobs]
        assert [len(entries) for entries in told] == [14]
        assert harness.tokens(first) == harness.expected(first, 0)[0]

    def test_counters_tell_where_prompt_tokens_came_from(self) -> None:
        harness = Harness()
        for _ in range(2):
            harness.add(prompt_of(16), max_tokens=3, ignore_eos=True)
            harness.run()
        stats = harness.scheduler.stats()
        assert (stats.prompt_tokens_computed, stats.prompt_tokens_cached) == (20, 12)
        assert (stats.prefix_queries, stats.prefix_hits) == (2, 1)
        assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (32, 12)
        assert stats.generation_tokens == 6


class TestChoices:
    def test_the_prompt_is_computed_once_and_its_blocks_are_shared(self) -> None:
        harness = Harness(prefix_cache=False)
        harness.add(prompt_of(18), num_choices=4, temperature=1.0, max_tokens=6, ignore_eos=True)
        harness.step()
        assert harness.scheduler.stats().num_waiting == 3
        harness.step()
        plan = harness.runner.plans[-1]
        assert [c.num_tokens for c in plan.chunks] == [1, 1, 1, 1]
        assert len(plan.block_copies) == 3
        assert harness.scheduler.stats().blocks_active == 4 + 4  # four full ones shared, one partial each
        harness.run()
        assert harness.scheduler.stats().prompt_tokens_computed == 18 + 3
        assert len({tuple(harness.tokens("r0", choice)) for choice in range(4)}) == 4
        harness.check_finished()

    @pytest.mark.parametrize(("length", "num_copies"), [(16, 3), (17, 0), (18, 3), (1, 0), (2, 3)])
    def test_only_a_partly_filled_block_is_copied(self, length: int, num_copies: int) -> None:
        harness = Harness(prefix_cache=False)
        harness.add(prompt_of(length), num_choices=4, max_tokens=6, ignore_eos=True)
        harness.step()
        harness.step()
        assert len(harness.runner.plans[-1].block_copies) == num_copies
        harness.run()
        harness.check_finished()

    @pytest.mark.parametrize("prefix_cache", [True, False])
    def test_choices_survive_a_leader_that_ends_with_its_first_token(self, prefix_cache: bool) -> None:
        harness = Harness(prefix_cache=prefix_cache)
        harness.add(prompt_of(18), num_choices=4, max_tokens=1, temperature=1.0)
        harness.run()
        harness.check_finished()

    def test_another_choice_takes_over_when_the_leader_is_aborted(self) -> None:
        harness = Harness(max_num_batched_tokens=4, prefix_cache=False)
        harness.add(prompt_of(18), num_choices=3, max_tokens=3, temperature=1.0)
        harness.step()
        harness.abort("r0", 0)
        statuses = [r.status for r in harness.scheduler.roster.requests()]
        assert statuses == [Status.WAITING, Status.PARKED]
        harness.run()
        harness.check_finished()

    def test_each_choice_has_one_end_and_facts_of_its_own(self) -> None:
        harness = Harness()
        harness.add(prompt_of(18), num_choices=3, max_tokens=4)
        harness.run()
        for choice in range(3):
            outputs = harness.streams["r0", choice].outputs
            assert sum(output.finish_reason is not None for output in outputs) == 1
            assert outputs[0].num_cached_tokens == 0
        harness.check_finished()


class TestPreemption:
    def test_the_newest_gives_way_and_resumes_with_the_same_tokens(self) -> None:
        harness = Harness(num_blocks=10, prefix_cache=False)
        options = {"max_tokens": 20, "ignore_eos": True}
        old = harness.add(prompt_of(10), **options)
        new = harness.add(prompt_of(10, start=50), **options)
        harness.run()
        assert harness.streams[old, 0].outputs[-1].num_preemptions == 0
        assert harness.streams[new, 0].outputs[-1].num_preemptions >= 1
        harness.check_finished()

    def test_the_least_urgent_gives_way_even_if_it_is_the_oldest(self) -> None:
        harness = Harness(num_blocks=10, prefix_cache=False)
        options = {"max_tokens": 20, "ignore_eos": True}
        low = harness.add(prompt_of(10), priority=5, **options)
        high = harness.add(prompt_of(10, start=50), priority=0, **options)
        harness.run()
        assert harness.streams[high, 0].outputs[-1].num_preemptions == 0
        assert harness.streams[low, 0].outputs[-1].num_preemptions >= 1
        harness.check_finished()

    @pytest.mark.parametrize("protect_after", [0, 1, 2])
    def test_a_protected_set_that_does_not_fit_still_finishes(self, protect_after: int) -> None:
        harness = Harness(num_blocks=12, prefix_cache=False, protect_after_preemptions=protect_after)
        for i in range(8):
            harness.add(prompt_of(5, start=10 * i), max_tokens=35, ignore_eos=True)
        harness.run(max_steps=2000)
        assert harness.scheduler.stats().num_preemptions > 3
        harness.check_finished()

    @pytest.mark.parametrize(
        ("running", "asking", "expected"),
        [  # name -> (priority, preemptions), oldest first
            ({"a": (0, 0), "b": (0, 0), "c": (0, 0)}, "a", "c"),  # the newest
            ({"a": (0, 0), "b": (0, 0), "c": (0, 0)}, "c", "c"),  # even if it is the one that asks
            ({"a": (0, 0), "b": (0, 0), "c": (0, 2)}, "a", "b"),  # unless it is protected
            ({"a": (0, 0), "b": (0, 2), "c": (0, 2)}, "c", "a"),  # a protected one may ask an older one
            ({"a": (0, 2), "b": (0, 2), "c": (0, 2)}, "b", "c"),  # all are protected
            ({"a": (1, 0), "b": (0, 0), "c": (0, 0)}, "b", "a"),  # the least urgent
            ({"a": (1, 2), "b": (0, 0), "c": (0, 0)}, "a", "a"),  # never a more urgent one, even for a protected one
        ],
    )
    def test_the_victim_is(self, running: dict[str, tuple[int, int]], asking: str, expected: str) -> None:
        harness = Harness(max_num_batched_tokens=100)
        for name, (priority, _) in running.items():
            harness.add(prompt_of(2), request_id=name, priority=priority, ignore_eos=True)
        harness.step()
        by_name = {request.request_id: request for request in harness.scheduler.roster.running}
        for name, (_, num_preemptions) in running.items():
            by_name[name].num_preemptions = num_preemptions
        victim = choose_victim(by_name.values(), by_name[asking], protect_after=2)
        assert victim.request_id == expected

    def test_admission_leaves_room_for_those_who_run(self) -> None:
        """Requests that fit only until somebody grows are not let in to be thrown out again."""
        harness = Harness(num_blocks=65, max_num_seqs=32, prefix_cache=False, max_num_batched_tokens=200)
        for i in range(40):
            harness.add(prompt_of(12, start=i), max_tokens=5, ignore_eos=True)
        harness.run()
        assert harness.scheduler.stats().num_preemptions <= 4
        harness.check_finished()

    def test_a_step_that_preempts_admits_nobody(self) -> None:
        """What the victim gave up is for those who run: admitting at once would lead to the next preemption."""
        harness = Harness(num_blocks=12, max_num_seqs=4, prefix_cache=False)
        for start in (0, 50, 100):
            harness.add(prompt_of(11, start=start), max_tokens=20, ignore_eos=True)
        harness.step()  # all three run
        num_preempting = 0
        for _ in range(30):
            if not harness.scheduler.roster.num_waiting:
                harness.add([7, 8], tenant="other", max_tokens=1, ignore_eos=True)  # its turn, and one block would do
            before = harness.scheduler.stats().num_preemptions
            plan = harness.scheduler.schedule()
            if harness.scheduler.stats().num_preemptions > before:
                num_preempting += 1
                assert not plan.new_rows
            harness.scheduler.commit(plan, harness.runner.execute(plan))
        assert num_preempting > 0, "the pool was meant to be too small"

    @pytest.mark.parametrize(("num_blocks", "max_num_seqs"), [(64, 2), (12, 4)], ids=["rows", "blocks"])
    def test_less_urgent_requests_give_way_to_an_urgent_one(self, num_blocks: int, max_num_seqs: int) -> None:
        harness = Harness(num_blocks=num_blocks, max_num_seqs=max_num_seqs)
        for start in (0, 50):
            harness.add(prompt_of(16, start=start), priority=9, max_tokens=20, ignore_eos=True)
        harness.step()  # both run
        urgent = harness.add(prompt_of(12, start=100), max_tokens=4, ignore_eos=True)
        harness.step()
        harness.step()  # the first may have filled the room that there was
        assert urgent in {request.request_id for request in harness.scheduler.roster.running}
        assert harness.scheduler.stats().num_preemptions == 1, "the newest of them, no more than it takes"
        harness.run()
        harness.check_finished()

    def test_a_long_prompt_of_low_priority_does_not_hold_up_an_urgent_one(self) -> None:
        harness = Harness(num_blocks=64, max_num_batched_tokens=8)
        harness.add(prompt_of(40), priority=9, max_tokens=2, ignore_eos=True)
        harness.step()
        urgent = harness.add(prompt_of(8, start=100), max_tokens=2, ignore_eos=True)
        harness.step()
        progress = {request.request_id: request.num_computed_tokens for request in harness.scheduler.roster.running}
        assert progress == {urgent: 8, "r0": 8}, "the whole step was the urgent one's"
        harness.run()
        harness.check_finished()

    def test_a_preempted_request_finds_its_own_blocks_again(self) -> None:
        harness = Harness(num_blocks=12, max_num_seqs=2)
        options = {"max_tokens": 24, "ignore_eos": True}
        harness.add(prompt_of(8), **options)
        harness.add(prompt_of(8, start=50), **options)
        harness.run()
        stats = harness.scheduler.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_hit_tokens > 0
        harness.check_finished()


class TestAborting:
    @pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
    @pytest.mark.parametrize("is_in_flight", [False, True])
    def test_everything_is_free_by_the_next_step(self, num_steps: int, is_in_flight: bool) -> None:
        harness = Harness(max_num_batched_tokens=8, prefix_cache=False)
        harness.add(prompt_of(14), num_choices=2, max_tokens=30, ignore_eos=True)
        for _ in range(num_steps):
            harness.step()
        if is_in_flight:
            harness.step(while_running=lambda: harness.abort("r0"))
        else:
            harness.abort("r0")
        assert harness.scheduler.stats().blocks_active == 0
        assert not harness.scheduler.has_work
        harness.check_finished()

    def test_blocks_of_a_step_in_flight_stay_until_it_is_committed(self) -> None:
        harness = Harness()
        harness.add(prompt_of(10), max_tokens=5)
        active = []

        def abort() -> None:
            harness.abort("r0")
            harness.abort("r0")
            active.append(harness.scheduler.stats().blocks_active)

        assert harness.step(while_running=abort) == []
        assert active == [3]
        assert harness.scheduler.stats().blocks_active == 0

    def test_one_choice_can_go_while_the_others_stay(self) -> None:
        harness = Harness()
        harness.add(prompt_of(10), num_choices=3, max_tokens=10, ignore_eos=True)
        harness.step()
        harness.step()
        harness.abort("r0", 1)
        harness.run()
        assert harness.streams["r0", 1].final is None
        harness.check_finished()

    def test_unknown_finished_and_repeated_aborts_are_ignored(self) -> None:
        harness = Harness()
        harness.abort("nobody")
        harness.add(prompt_of(3), max_tokens=1)
        harness.run()
        before = harness.scheduler.stats()
        harness.abort("r0")
        harness.abort("r0", 0)
        harness.abort("r0", 7)
        assert harness.scheduler.stats() == before

    def test_only_the_work_of_whole_requests_counts_as_thrown_away(self) -> None:
        harness = Harness()
        harness.add(prompt_of(10), max_tokens=10, ignore_eos=True)
        harness.add(prompt_of(10, start=50), max_tokens=10, ignore_eos=True)
        for _ in range(3):
            harness.step()
        harness.abort("r0", 0)  # a stop string
        assert harness.scheduler.stats().aborted_tokens == 0
        harness.abort("r1")
        assert harness.scheduler.stats().aborted_tokens == 12

    def test_an_id_can_be_used_again_while_its_last_owner_is_still_in_flight(self) -> None:
        harness = Harness()
        harness.add(prompt_of(10), max_tokens=5)

        def replace() -> None:
            harness.abort("r0")
            harness.add(prompt_of(6, start=70), request_id="r0", max_tokens=5)

        harness.step(while_running=replace)
        harness.run()
        harness.check_finished()


class TestDeadlines:
    def test_a_request_that_never_started_ends_as_overload(self) -> None:
        harness = Harness(max_num_seqs=1, max_queue_wait_s=60.0)
        harness.add(prompt_of(3), max_tokens=60, ignore_eos=True)
        harness.step()
        late = harness.add(prompt_of(3))
        harness.now += 59.9
        harness.step()
        assert harness.streams[late, 0].final is None
        harness.now += 0.1
        harness.step()
        final = harness.streams[late, 0].final
        assert final is not None
        assert (final.finish_reason, final.error) == ("error", "server_overloaded")

    @pytest.mark.parametrize(("deadline_s", "limit_s"), [(None, 600.0), (5.0, 5.0), (9999.0, 600.0)])
    def test_a_running_request_ends_at_its_deadline_with_what_it_has(
        self, deadline_s: float | None, limit_s: float
    ) -> None:
        harness = Harness(max_request_s=600.0)
        harness.add(prompt_of(3), max_tokens=60, ignore_eos=True, deadline_s=deadline_s, num_choices=2)
        for _ in range(4):
            harness.step()
        harness.now += limit_s
        harness.step()
        for choice in range(2):
            final = harness.streams["r0", choice].final
            assert final is not None
            assert (final.finish_reason, final.error) == ("error", "deadline_exceeded")
            assert len(harness.tokens("r0", choice)) in (3, 4)
        harness.check_finished()

    def test_waiting_after_preemption_is_not_a_queue_timeout(self) -> None:
        harness = Harness(num_blocks=10, prefix_cache=False, max_queue_wait_s=5.0)
        for i in range(2):
            harness.add(prompt_of(10, start=50 * i), max_tokens=20, ignore_eos=True)
        while harness.scheduler.has_work:
            harness.step()
            harness.now += 1.0
        assert harness.scheduler.stats().num_preemptions > 0
        harness.check_finished()
        assert all(stream.final and not stream.final.error for stream in harness.streams.values())

    def test_gauges_show_who_waits_and_how_long(self) -> None:
        harness = Harness(max_num_seqs=1)
        harness.add(prompt_of(3), max_tokens=60, ignore_eos=True)
        harness.step()
        harness.now += 1.0
        harness.add(prompt_of(5), num_choices=2)
        harness.now += 2.0
        stats = harness.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.waiting_tokens, stats.oldest_waiting_s) == (1, 2, 5, 2.0)


def test_results_that_contradict_the_plan_are_refused() -> None:
    harness = Harness()
    harness.add(prompt_of(3))
    plan = harness.scheduler.schedule()
    with pytest.raises(AssertionError, match="tokens come from chunks that sample"):
        harness.scheduler.commit(plan, StepResult(chunks=(ChunkResult(),)))
