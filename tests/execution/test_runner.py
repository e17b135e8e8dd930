"""The runner with real models: one request's failure stays its own, prompt log-probabilities survive any schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.core import EngineCore
from engine.errors import EngineDead
from engine.execution.runner import PROMPT_LOGITS_ROWS, ModelRunner
from engine.models import load_model
from engine.models.batch import ForwardBatch, KVCache, Model
from engine.scheduling.invariants import check_invariants
from engine.scheduling.plan import StepPlan
from engine.scheduling.scheduler import _Draft
from engine.types import EngineRequest, TokenLogprob, TokenOutput
from tests.e2e.driving import Answer, core_for, request, run, tokens
from tests.models.families import VOCAB, Case, save
from tests.models.paged_driver import prompt_logits

POISON = 7  # a token that no other request of these tests has


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = save(Case("llama", "Llama").build(), tmp_path_factory.mktemp("llama"))
    return load_model(folder, dtype="float32", deterministic=True)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Three layers that see three tokens each: what happened more than six positions ago cannot show."""
    folder = save(Case("mistral", "Mistral", {"sliding_window": 3}).build(), tmp_path_factory.mktemp("mistral"))
    return load_model(folder, dtype="float32", deterministic=True)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(20, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def traffic() -> list[EngineRequest]:
    """Rows with state of every kind: counts, bad words, masks, noise, forks."""
    shared = prompt(19, seed=1)
    return [
        request("counts", shared, max_tokens=9, presence_penalty=1.5, repetition_penalty=1.4, frequency_penalty=0.5),
        request("forks", shared + prompt(3, seed=2), max_tokens=9, temperature=0.9, seed=5, num_choices=3),
        request(
            "words", prompt(12, seed=3), max_tokens=9, bad_words_ids=tuple((i, j) for i in (30, 31) for j in (1, 2))
        ),
        request("ends", prompt(5, seed=4), max_tokens=9, stop_token_ids=tuple(range(0, VOCAB, 2)), min_tokens=6),
    ]


def poison_forward(core: EngineCore, monkeypatch: pytest.MonkeyPatch, *, after_outputs: int) -> None:
    """The forward raises, after it has written keys and values, when POISON is at the row's place `after_outputs`."""
    assert isinstance(core.runner, ModelRunner)
    forward = core.runner.model.forward

    def broken(batch: ForwardBatch, cache: KVCache) -> Tensor:
        hidden = forward(batch, cache)
        if bool(((batch.token_ids == POISON) & (batch.positions == after_outputs)).any()):
            raise RuntimeError("injected")
        return hidden

    monkeypatch.setattr(core.runner.model, "forward", broken)


@pytest.mark.parametrize("budget", [6, 512])
@pytest.mark.parametrize("position", [3, 14])
def test_a_request_that_raises_changes_no_token_of_the_others(
    llama: Model, monkeypatch: pytest.MonkeyPatch, budget: int, position: int
) -> None:
    """Raising in its prompt, or as it decodes among rows whose state the failed run has touched already."""
    expected = run(core_for(llama, budget=budget), traffic())
    core = core_for(llama, budget=budget)
    culprit = request("culprit", [POISON] * 10, max_tokens=30, allowed_token_ids=(POISON,))
    poison_forward(core, monkeypatch, after_outputs=position)
    requests = traffic()
    got = run(core, [*requests[:2], culprit, *requests[2:]])
    failed = got.pop(("culprit", 0))
    assert failed.finish_reason == "error"
    assert failed.token_ids == [POISON] * max(0, position - 9)
    assert tokens(got) == tokens(expected)
    check_invariants(core.scheduler)
    # its row and blocks serve the next request as if nothing had been
    assert tokens(run(core, traffic())) == tokens(expected)


def test_freed_rows_give_back_counts_and_masks(llama: Model) -> None:
    core = core_for(llama)
    runner = core.runner
    assert isinstance(runner, ModelRunner)
    run(core, traffic())
    runner.execute(StepPlan(freed_rows=tuple(range(16))))
    assert runner._params == {}
    assert runner._sampler._masks == runner._sampler._penalties._slots == {}


def test_a_failed_device_ends_the_engine_and_no_single_request(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sticky error meets every request of the process: ending them one by one would never bring it back."""
    core = core_for(llama)
    assert isinstance(core.runner, ModelRunner)

    def forward(batch: ForwardBatch, cache: KVCache) -> Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(core.runner.model, "forward", forward)
    for name in ("a", "b"):
        core.add(request(name, [1, 2, 3]))
    with pytest.raises(EngineDead, match="illegal memory access"):
        core.step()


@pytest.mark.parametrize("budget", [1, 5, 512])
def test_a_broken_position_ends_its_request_and_stays_out_of_the_prefix_cache(
    windowed: Model, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Its logits would be finite: the last token does not see so far back."""
    core = core_for(windowed, budget=budget)
    assert isinstance(core.runner, ModelRunner)
    forward = windowed.forward

    def overflowing(batch: ForwardBatch, cache: KVCache) -> Tensor:
        hidden = forward(batch, cache)
        return hidden.masked_fill((batch.token_ids == POISON)[:, None], math.nan)

    monkeypatch.setattr(core.runner.model, "forward", overflowing)
    healthy, broken = prompt(40, seed=1), prompt(40, seed=2)
    broken[4] = POISON
    got = run(core, [request("healthy", healthy, max_tokens=4), request("broken", broken, max_tokens=4)])
    assert got["healthy", 0].finish_reason == "length"
    assert (got["broken", 0].finish_reason, got["broken", 0].token_ids) == ("error", [])
    again = run(core, [request("again", broken, max_tokens=4), request("fine", healthy, max_tokens=4)])
    assert again["again", 0].num_cached_tokens == 0
    assert again["fine", 0].num_cached_tokens > 0


def prompt_logprobs(core: EngineCore, requests: Iterable[EngineRequest]) -> dict[str, list[TokenLogprob | None]]:
    """Of choice 0 of each request; no other output may carry any."""
    found: dict[str, list[TokenLogprob | None]] = {}
    for each in requests:
        core.add(each)
    while core.has_work:
        outputs: list[TokenOutput] = core.step()
        for output in outputs:
            if output.prompt_logprobs is not None:
                assert output.choice == 0
                assert output.request_id not in found
                found[output.request_id] = output.prompt_logprobs
    return found


def asking() -> list[EngineRequest]:
    shared = prompt(2 * PROMPT_LOGITS_ROWS // 3, seed=6)
    return [
        request("one", [50], max_tokens=20, prompt_logprobs=1),
        request("long", shared + prompt(PROMPT_LOGITS_ROWS, seed=7), max_tokens=8, prompt_logprobs=3),
        request("three", shared, max_tokens=30, num_choices=3, temperature=1.0, seed=2, prompt_logprobs=0),
        request("same", shared, max_tokens=30, prompt_logprobs=2),
    ]


@pytest.mark.parametrize(
    ("budget", "num_blocks", "preempted_at"), [(1, 64, ()), (7, 64, (4, 9, 13)), (512, 64, ()), (512, 17, ())]
)
def test_prompt_logprobs_are_complete_and_the_same_under_any_schedule(
    llama: Model, monkeypatch: pytest.MonkeyPatch, budget: int, num_blocks: int, preempted_at: tuple[int, ...]
) -> None:
    """preempted_at: steps before which a request is thrown back in the middle of its prompt."""
    core = core_for(llama, budget=budget, num_blocks=num_blocks)
    scheduler, steps = core.scheduler, itertools.count()
    schedule = scheduler.schedule

    def preempting() -> StepPlan:
        if next(steps) in preempted_at:
            victim = next(r for r in scheduler.roster.running if 0 < r.num_computed_tokens < r.num_prompt_tokens)
            scheduler._preempt(victim, _Draft(budget=0))
        return schedule()

    monkeypatch.setattr(scheduler, "schedule", preempting)
    for _ in range(2):  # the second time all prompts are in the prefix cache
        found = prompt_logprobs(core, asking())
        for each in asking():
            ids, top_n = each.prompt_token_ids, each.sampling.prompt_logprobs
            first, *rest = found[each.request_id]
            assert first is None
            assert [entry.token_id for entry in rest if entry is not None] == ids[1:]
            for entry, expected in zip(rest, all_logprobs(llama, ids), strict=True):
                assert entry is not None
                assert len(entry.top_ids) == top_n
                assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-5)
                assert entry.top_ids == expected.topk(top_n).indices.tolist()
    if num_blocks < 64 or preempted_at:
        assert core.stats().num_preemptions >= max(len(preempted_at), 1)


def all_logprobs(model: Model, token_ids: list[int]) -> Tensor:
    """[T - 1, V], of the positions that have a next token, by a plain run of the model."""
    if len(token_ids) == 1:
        return torch.empty(0, VOCAB)
    with torch.inference_mode():
        return prompt_logits(model, token_ids, first_chunk=1)[:-1].log_softmax(dim=-1)


def test_choices_of_one_request_differ_and_each_has_its_own_logprobs(llama: Model) -> None:
    """Forked rows compute the last prompt token themselves; what they report is the distribution they drew from."""
    ids = prompt(21, seed=9)
    answers = run(
        core_for(llama), [request("r", ids, max_tokens=6, num_choices=4, temperature=1.5, seed=1, logprobs=2)]
    )
    assert len({tuple(answer.token_ids) for answer in answers.values()}) > 1
    for answer in answers.values():
        expected = all_logprobs(llama, ids + answer.token_ids)[len(ids) - 1 :]
        check_logprobs(answer, expected)


def check_logprobs(answer: Answer, expected: Tensor) -> None:
    for token_id, entry, row in zip(answer.token_ids, answer.logprobs, expected, strict=True):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-5)
        assert entry.rank == int((row > row[token_id]).sum()) + 1
        assert entry.top_ids == row.topk(2).indices.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_caches_give_the_same_tokens_under_any_schedule(tmp_path: Path, dtype: str, llama: Model) -> None:
    """Rounding happens once, when a key is stored: it must not depend on chunks, batch or preemption."""
    expected: dict[tuple[str, int], Answer] = {}
    for single in traffic():
        expected.update(run(core_for(llama, prefix_cache=False, kv_cache_dtype=dtype), [single]))
    core = core_for(llama, budget=11, num_blocks=17, kv_cache_dtype=dtype)
    assert isinstance(core.runner, ModelRunner)
    assert core.runner.cache.k.dtype == getattr(torch, dtype)
    assert tokens(run(core, traffic())) == tokens(expected)
