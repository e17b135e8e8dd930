"""Drives an EngineCore with real models in-process: builds cores around one loaded model, collects their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig, SpeculationConfig
from engine.constraints.vocabulary import Vocabulary
from engine.core import EngineCore
from engine.launch import wire
from engine.models.batch import Model
from engine.types import EngineRequest, SamplingParams, TokenLogprob

BLOCK_SIZE = 8


@dataclass
class Answer:
    """Everything that came out for one choice of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


def core_for(
    model: Model,
    *,
    num_blocks: int = 256,
    budget: int = 512,
    prefix_cache: bool = True,
    max_num_seqs: int = 16,
    max_model_len: int = 128,
    kv_cache_dtype: str = "auto",
    vocabulary: Vocabulary | None = None,
    jump_ahead: bool = True,
    pressure_policy: str = "",
    eagle_head: str = "auto",
    overlap: str = "auto",
) -> EngineCore:
    """A fresh core around a loaded model; small blocks, so that short prompts span several."""
    config = Config(
        model=ModelConfig(max_model_len=max_model_len),
        cache=CacheConfig(
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            enable_prefix_cache=prefix_cache,
            kv_cache_dtype=kv_cache_dtype,
            pressure_policy=pressure_policy,
        ),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
        runtime=RuntimeConfig(jump_ahead=jump_ahead, overlap=overlap),
        speculation=SpeculationConfig(speculative_eagle_head=eagle_head),
    )
    core, _ = wire(model, config, torch.device("cpu"), vocabulary)
    return core


def run(core: EngineCore, requests: Iterable[EngineRequest], *, stagger: int = 0) -> dict[tuple[str, int], Answer]:
    """Adds the requests, `stagger` steps apart, and steps until all have ended. Each choice must end exactly once."""
    answers: dict[tuple[str, int], Answer] = {}
    pending = list(requests)
    expected = sum(request.num_choices for request in pending)
    steps = 0
    while pending or core.has_work:
        while pending and (stagger == 0 or steps % stagger == 0 or not core.has_work):
            core.add(pending.pop(0))
            if stagger:
                break
        for output in core.advance():
            answer = answers.setdefault((output.request_id, output.choice), Answer())
            assert answer.finish_reason is None, f"{output.request_id} got output after its end"
            answer.token_ids.extend(output.token_ids)
            answer.logprobs.extend(output.logprobs or [])
            answer.finish_reason = output.finish_reason
            answer.num_cached_tokens = output.num_cached_tokens or answer.num_cached_tokens
            answer.num_preemptions = output.num_preemptions or answer.num_preemptions
        steps += 1
        assert steps < 20_000, "the core makes no progress"
    assert len(answers) == expected
    assert all(answer.finish_reason for answer in answers.values())
    return answers


def request(request_id: str, prompt: list[int], *, num_choices: int = 1, **sampling: object) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        num_choices=num_choices,
        sampling=SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling}),  # type: ignore[arg-type]
    )


def tokens(answers: dict[tuple[str, int], Answer]) -> dict[tuple[str, int], list[int]]:
    return {key: answer.token_ids for key, answer in answers.items()}


def greedy(model: Model, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Outputs of the whole engine: continuous batching, chunks of at most 20 tokens, requests that join late."""
    core = core_for(model, budget=20, max_model_len=min(128, model.max_model_len))
    requests = [request(f"r{i}", prompt, max_tokens=num_tokens) for i, prompt in enumerate(prompts)]
    answers = run(core, requests, stagger=3)
    return [answers[f"r{i}", 0].token_ids for i in range(len(prompts))]
