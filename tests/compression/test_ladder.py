"""The ladder under pressure: a format before eviction, eviction before a preemption, and what was done stays done."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from engine.core import EngineCore
from engine.errors import ConfigError
from engine.launch import resolve_model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.types import EngineRequest, KVUsage, SamplingParams
from tests.compression.test_in_engine import poisoned, preempting
from tests.e2e.driving import Answer, core_for, run

MAY_SHRINK = {"name": "full", "may_shrink": True}
THIRD = '{"name": "streaming_llm", "ratio": 0.34}'
LADDER = f'["int8", {THIRD}]'


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(resolve_model_path("mimir"), device=torch.device("cpu"), max_model_len=512)


def load(num_requests: int, kv_policy: dict[str, Any] | None = None, num_choices: int = 1) -> list[EngineRequest]:
    """Each comes to 160 tokens, 20 blocks; packed to 8 blocks, and a third of it to 4."""
    numbers = random.Random(5)
    return [
        EngineRequest(
            request_id=f"r{i}",
            prompt_token_ids=[numbers.randrange(10, 4000) for _ in range(60)],
            sampling=SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, seed=i),
            kv_policy=kv_policy or MAY_SHRINK,
            num_choices=num_choices,
        )
        for i in range(num_requests)
    ]


class Run:
    """What an overloaded engine did: the step in which each rung was taken first, answers and reports."""

    def __init__(
        self, model: Model, requests: list[EngineRequest], pressure: str, *, num_blocks: int = 46,
        disturb: Callable[[EngineCore], None] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        core = core_for(model, max_model_len=256, num_blocks=num_blocks, pressure_policy=pressure, **options)
        step = poisoned(core)
        self.kv: dict[str, KVUsage] = {}
        self.first: dict[str, int] = {}
        self.num_steps = 0

        def watched() -> Any:
            outputs = step()
            self.num_steps += 1
            stats = core.scheduler.stats()
            self.kv.update({output.request_id: output.kv for output in outputs if output.kv is not None})
            for name in (*stats.rungs, *(["preemption"] if stats.num_preemptions else [])):
                self.first.setdefault(name, self.num_steps)
            return outputs

        core.step = watched  # type: ignore[method-assign]
        if disturb is not None:
            disturb(core)
        self.answers: dict[Any, Answer] = run(core, requests)
        self.stats = core.scheduler.stats()
        assert core.scheduler.cache.pool.counts.active == 0, "blocks leaked"
        assert core.scheduler.cache.num_promised == 0
        assert all(answer.finish_reason == "length" for answer in self.answers.values())

    @property
    def tokens(self) -> list[list[int]]:
        return [answer.token_ids for answer in self.answers.values()]


def test_first_the_format_then_eviction_then_somebody_is_preempted(mimir: Model) -> None:
    alone = Run(mimir, load(4), "", num_blocks=56)
    assert alone.stats.num_preemptions > 0, "the load is too small to show anything"
    packed = Run(mimir, load(4), LADDER, num_blocks=56)
    assert (set(packed.first), packed.stats.num_preemptions) == ({"int8"}, 0), "the format was enough"
    both = Run(mimir, load(9), LADDER, num_blocks=34)
    assert (set(both.first), both.stats.num_preemptions) == ({"int8", "streaming_llm"}, 0)
    assert both.first["int8"] < both.first["streaming_llm"]
    only = Run(mimir, load(9), "int8", num_blocks=34)
    assert only.stats.num_preemptions > 0, "the format alone was not enough"
    assert only.first["int8"] < only.first["preemption"]


def test_what_was_done_is_reported(mimir: Model) -> None:
    done = Run(mimir, load(6), LADDER)
    by_policy = {name: sum(rung.policy == name for kv in done.kv.values() for rung in kv.rungs) for name in done.first}
    assert by_policy == done.stats.rungs
    assert done.stats.num_shrunk == sum(by_policy.values())
    for kv in done.kv.values():
        assert [rung.policy for rung in kv.rungs][:1] == ["int8"]
        assert [rung.at_token for rung in kv.rungs] == sorted(rung.at_token for rung in kv.rungs)
        assert kv.policy == kv.rungs[-1].policy
        assert (kv.format, kv.bits_per_value) == ("int8", 8.0)
        assert (kv.evicted_tokens > 0) == (kv.policy == "streaming_llm")
        assert kv.evicted_tokens % 32 == 0, "whole packed blocks of four groups of eight tokens"
        assert kv.peak_slots <= 159
        assert kv.evicted_tokens + kv.steady_slots == 159


def test_requests_that_did_not_allow_it_are_never_touched(mimir: Model) -> None:
    lossless = [msgspec.structs.replace(one, request_id=f"whole{i}", kv_policy={"name": "full"})
                for i, one in enumerate(load(3))]  # fmt: skip
    expected = Run(mimir, lossless, "", num_blocks=160).tokens
    mixed = Run(mimir, [*load(4), *lossless], LADDER)
    assert [mixed.answers[one.request_id, 0].token_ids for one in lossless] == expected
    assert not any(name.startswith("whole") for name in mixed.kv)
    assert mixed.stats.num_preemptions > 0
    assert mixed.first["int8"] < mixed.first["streaming_llm"] < mixed.first["preemption"]


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_preempted_request_shrinks_again_at_the_same_tokens(mimir: Model, prefix_cache: bool) -> None:
    """Replayed alone with as much room as it wants and thrown back now and then, it says the same."""
    first = Run(mimir, load(6), LADDER, prefix_cache=prefix_cache)
    replayed = {}

    def throw_back(core: EngineCore) -> None:
        """Every request that has shrunk, once: it comes back with its rungs and is computed again."""
        scheduler, schedule = core.scheduler, core.scheduler.schedule
        thrown: set[str] = set()

        def disturbed() -> Any:
            for request in list(scheduler.roster.running):
                is_shrunk = request.is_compressed and request.num_output_tokens > 90
                if is_shrunk and request.request_id not in thrown:
                    thrown.add(request.request_id)
                    replayed[request.request_id] = list(request.rungs)
                    scheduler.roster.requeue(request, 0.0)
                    scheduler._release(request)
            return schedule()

        scheduler.schedule = disturbed  # type: ignore[method-assign]

    again = Run(mimir, load(6), LADDER, prefix_cache=prefix_cache, disturb=throw_back)
    assert replayed, "nobody was thrown back"
    for name, rungs in replayed.items():
        assert again.kv[name].rungs[: len(rungs)] == rungs
        if again.kv[name].rungs == first.kv[name].rungs:
            assert again.answers[name, 0].token_ids == first.answers[name, 0].token_ids
    assert any(again.kv[name].rungs == first.kv[name].rungs for name in replayed), "nothing was compared"


def test_a_preemption_in_the_middle_of_anything_leaks_nothing(mimir: Model) -> None:
    Run(mimir, load(5), LADDER, disturb=lambda core: preempting(core, every=23))


def test_aborts_while_rungs_are_taken_leak_nothing(mimir: Model) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=46, pressure_policy=LADDER)
    step = poisoned(core)
    for one in load(6):
        core.add(one)
    while core.has_work:
        plan_had = dict(core.scheduler.stats().rungs)
        step()
        if core.scheduler.stats().rungs != plan_had and core.scheduler.roster.running:
            core.abort(core.scheduler.roster.running[0].request_id)
            step()
    assert core.scheduler.stats().num_shrunk > 2
    assert core.scheduler.cache.pool.counts.active == 0


def test_an_abort_while_packed_blocks_are_dropped_leaks_nothing(mimir: Model) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=46, pressure_policy=LADDER)
    for one in load(6):
        core.add(one)
    while True:
        plan = core.scheduler.schedule()
        dropping = [c.row for c in plan.chunks if c.compaction is not None and c.compaction.num_packed is not None]
        if dropping:
            core.abort(core.scheduler.rows[dropping[0]].request_id)
        core.scheduler.commit(plan, core.runner.execute(plan))
        if dropping:
            break
    step = poisoned(core)
    while core.has_work:
        step()
    assert core.scheduler.cache.pool.counts.active == 0


def test_choices_of_a_request_that_shrinks_do_not_start_from_what_is_left_of_another(mimir: Model) -> None:
    """A choice that comes to run late would share blocks that are packed or gone by then."""
    (one,) = load(1, num_choices=3)
    others = [msgspec.structs.replace(r, request_id=f"o{r.request_id}") for r in load(4)]
    alone = Run(mimir, [msgspec.structs.replace(one, kv_policy=None)], "", num_blocks=160)
    together = Run(mimir, [*others, one], "int8", max_num_seqs=4)
    assert together.stats.num_shrunk > 0
    for choice in range(3):
        shared = together.answers["r0", choice].token_ids[:1]
        assert shared == alone.answers["r0", choice].token_ids[:1]


def test_one_rung_that_evicts_works_as_before(mimir: Model) -> None:
    done = Run(mimir, load(5), "tova")
    assert set(done.first) <= {"tova", "preemption"}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("int8,snapkv", "snapkv, which needs more than the newest query to choose; use int8"),
        ("int8,tova", "tova, which looks at keys or attention, which packed tokens do not show; use streaming_llm"),
        ("random,int8", "int8, which packs what another rung has left; the format comes first"),
        ("int8,kivi", "kivi, which packs what another rung has left"),
        ("random,streaming_llm", "streaming_llm, which evicts after another that does; one is enough"),
        ('[{"name": "snapkv", "format": "int8"}]', "snapkv, which comes with a format; make the format a rung"),
        ("int8,", "kv_policy.name is ''"),
        ("[]", "needs names"),
        ("[3]", "needs names"),
        ('["int8"', "is no JSON"),
        ('[{"name": "streaming_llm", "ratio": 2}]', "ratio is 2"),
    ],
)
def test_rungs_that_cannot_be_honoured_are_refused_at_the_start(mimir: Model, choice: str, words: str) -> None:
    with pytest.raises(ConfigError, match="pressure_policy") as refused:
        core_for(mimir, pressure_policy=choice)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
