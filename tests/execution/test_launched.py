"""Steps launched before the host knows the last tokens, with real models: the tokens of steps one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.core import EngineCore
from engine.execution.runner import ModelRunner
from engine.launch import wire
from engine.models import load_model
from engine.models.batch import ForwardBatch, KVCache, Model
from engine.scheduling.plan import StepPlan
from engine.types import EngineRequest
from tests.e2e.driving import core_for, request, run, tokens
from tests.execution.test_cuda_graphs import prompt
from tests.models.families import VOCAB, Case, save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = save(Case("llama", "Llama").build(), tmp_path_factory.mktemp("llama"))
    return load_model(folder, dtype="float32", deterministic=True)


def launches_of(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each plan that the core wants to launch from now on: whether it was."""
    seen: list[bool] = []
    launch = cast(ModelRunner, core.runner).launch

    def watched(plan: StepPlan) -> Any:
        step = launch(plan)
        seen.append(step is not None)
        return step

    monkeypatch.setattr(core.runner, "launch", watched)
    return seen


def plain(num_requests: int) -> list[EngineRequest]:
    """Long and short prompts, greedy and sampled, some that stop; some share a beginning."""
    shared = prompt(17, seed=50)
    requests = []
    for i in range(num_requests):
        options: dict[str, Any] = {"max_tokens": 3 + 5 * (i % 4)}
        if i % 3 == 1:
            options |= {"temperature": 0.8, "seed": i, "top_p": 0.9}
        if i % 4 == 2:
            options |= {"stop_token_ids": tuple(range(0, VOCAB, 5))}
        requests.append(request(f"r{i}", shared * (i % 2) + prompt(2 + 7 * (i % 3), seed=i), **options))
    return requests


@pytest.mark.parametrize("budget", [12, 512])
@pytest.mark.parametrize("num_blocks", [24, 256])
def test_launched_steps_give_the_tokens_of_steps_one_by_one(
    llama: Model, monkeypatch: pytest.MonkeyPatch, budget: int, num_blocks: int
) -> None:
    options: dict[str, Any] = {"budget": budget, "num_blocks": num_blocks}
    expected = run(core_for(llama, **options), plain(12), stagger=2)
    core = core_for(llama, overlap="on", **options)
    launched = launches_of(core, monkeypatch)
    found = run(core, plain(12), stagger=2)
    assert tokens(found) == tokens(expected)
    assert {key: answer.finish_reason for key, answer in found.items()} == {
        key: answer.finish_reason for key, answer in expected.items()
    }
    assert len(launched) > 10
    assert all(launched)


def test_rows_that_need_the_host_take_the_other_way_and_change_no_token(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def requests() -> list[EngineRequest]:
        return [
            *plain(4),
            request("likely", prompt(6, seed=30), max_tokens=5, logprobs=2),
            request("counts", prompt(6, seed=31), max_tokens=5, frequency_penalty=0.5),
            request("words", prompt(6, seed=32), max_tokens=5, bad_words_ids=((30, 31),)),
            request("prompt", prompt(6, seed=33), max_tokens=5, prompt_logprobs=1),
            request("forks", prompt(6, seed=34), max_tokens=5, temperature=1.0, seed=1, num_choices=3),
        ]

    expected = run(core_for(llama), requests(), stagger=5)
    core = core_for(llama, overlap="on")
    launched = launches_of(core, monkeypatch)
    found = run(core, requests(), stagger=5)
    assert tokens(found) == tokens(expected)
    assert found["likely", 0].logprobs == expected["likely", 0].logprobs
    assert True in launched
    assert False in launched


@pytest.mark.parametrize("at", [4, 9])
def test_numbers_that_are_not_finite_end_their_request_and_no_other(
    llama: Model, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """In the prompt of eight tokens, in a piece that does not sample, or as it decodes."""
    expected = tokens(run(core_for(llama), plain(4)))
    core = core_for(llama, overlap="on", budget=6)
    forward = core.runner.model.forward  # type: ignore[attr-defined]

    def poisoned(batch: ForwardBatch, cache: KVCache) -> Tensor:
        hidden: Tensor = forward(batch, cache)
        places = (batch.positions == at).nonzero()[:, 0].tolist()
        hidden[[place for place in places if first_block(batch, place) in first_blocks_of(core, "ill")]] = torch.nan
        return hidden

    monkeypatch.setattr(core.runner.model, "forward", poisoned)  # type: ignore[attr-defined]
    answers = run(core, [request("ill", prompt(8, seed=77), max_tokens=6), *plain(4)])
    assert answers["ill", 0].finish_reason == "error"
    assert len(answers["ill", 0].token_ids) == max(0, at - 8 + 1)
    assert {key: ids for key, ids in tokens(answers).items() if key[0] != "ill"} == expected


def first_block(batch: ForwardBatch, token: int) -> int:
    """Of the token's row."""
    row = int(torch.searchsorted(batch.cu_seqlens_q, token, right=True)) - 1
    return int(batch.block_table[row, 0])


def first_blocks_of(core: EngineCore, request_id: str) -> set[int]:
    return {r.tables[0].block_ids[0] for r in core.scheduler.roster.running if r.request_id == request_id}


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
def test_a_launch_on_cuda_does_not_wait_and_changes_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_graphs: str
) -> None:
    """Prompts, joins, new blocks and ends included; torch raises at whatever waits for the device in a launch."""
    folder = save(Case("llama", "Llama").build(), tmp_path)
    device = torch.device("cuda")
    model = load_model(folder, dtype="float32", device=device, deterministic=True)

    def core(overlap: str, graphs: str) -> EngineCore:
        config = Config(
            model=ModelConfig(max_model_len=128),
            cache=CacheConfig(block_size=8, num_blocks=256),
            scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=24),
            runtime=RuntimeConfig(overlap=overlap, cuda_graphs=graphs, deterministic=True),
        )
        return wire(model, config, device)[0]

    expected = tokens(run(core("off", "off"), plain(12), stagger=2))
    overlapped = core("on", cuda_graphs)
    run(overlapped, plain(3))  # kernels are compiled
    launch = cast(ModelRunner, overlapped.runner).launch

    def without_waiting(plan: StepPlan) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(overlapped.runner, "launch", without_waiting)
    assert tokens(run(overlapped, plain(12), stagger=2)) == expected
