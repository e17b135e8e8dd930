"""Drives one engine core in this process: quality of answers, and what a setting costs. No masks: blocks are freed."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.launch import build_core
from engine.text.tokenizer import Tokenizer
from engine.types import EngineRequest, KVUsage, SamplingParams, TokenLogprob
from loadtest.frontier.policies import Setting
from loadtest.frontier.samples import Sample, TaskSpec

BLOCK_SIZE = 16
ROWS = 16
DECODE_ROWS = 8
DECODE_TOKENS = 40
SETTLED = 8  # steps before decoding is timed


@dataclass
class Outcome:
    """What came of one request."""

    token_ids: list[int]
    kv: KVUsage | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(frozen=True)
class Quality:
    """quality: mean score in [0, 1], or the perplexity; kept: bytes held at the end, as a share of the full cache's."""

    quality: float
    kept: float
    bytes_per_token: float


@dataclass(frozen=True)
class Cost:
    """Of one request alone (blocks, time to the first token) and of a batch (decoding), in processor time."""

    peak_blocks: int
    steady_blocks: int
    ttft_ms: float
    tokens_per_s: float


class Bench:
    """A loaded model and its engine. One thread, so that processor time means something on a busy machine."""

    def __init__(self, model: str, tokenizer: Tokenizer, max_model_len: int, num_samples: int) -> None:
        """num_samples: as many prompts of the longest kind stay in the prefix cache from setting to setting."""
        blocks_each = max_model_len // BLOCK_SIZE + 1
        config = Config(
            model=ModelConfig(model=model, max_model_len=max_model_len),
            cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=(num_samples + 2 * ROWS) * blocks_each),
            scheduler=SchedulerConfig(max_num_seqs=ROWS, max_waiting_requests=4096, max_waiting_pools=1e6),
            runtime=RuntimeConfig(threads=1),
        )
        self.tokenizer = tokenizer
        self.core, self.info = build_core(config, has_yardsticks=True)
        self._serial = itertools.count()
        self._token_bytes = self.info.kv_cache_bytes / self.info.num_blocks / BLOCK_SIZE

    def quality(self, samples: Sequence[Sample], setting: Setting, task: TaskSpec) -> Quality:
        is_text = not task.maker
        sampling = SamplingParams(
            temperature=0.0, max_tokens=task.max_new_tokens, prompt_logprobs=0 if is_text else None, seed=0
        )
        outcomes = self._run([self._request(sample, setting, sampling) for sample in samples])
        if is_text:
            value = perplexity(samples, outcomes)
        else:
            value = statistics.mean(
                sample.score(self.tokenizer.decode(outcome.token_ids))
                for sample, outcome in zip(samples, outcomes, strict=True)
            )
        held = tokens = 0.0
        for sample, outcome in zip(samples, outcomes, strict=True):
            num_tokens = len(sample.token_ids) + len(outcome.token_ids) - 1
            tokens += num_tokens
            kv = outcome.kv
            held += num_tokens * self._token_bytes if kv is None else kv.private_bytes + kv.shared_bytes
        return Quality(value, held / (tokens * self._token_bytes), held / tokens)

    def cost(self, samples: Sequence[Sample], setting: Setting) -> Cost:
        """samples: DECODE_ROWS of them. The first is read anew: it does not come from the prefix cache."""
        sampling = SamplingParams(temperature=0.0, max_tokens=DECODE_TOKENS, ignore_eos=True, seed=0)
        pool = self.core.scheduler.cache.pool
        started, ttft_s, peak_slots, steady = time.process_time(), 0.0, 0, 0
        self.core.add(self._request(samples[0], setting, sampling, is_new=True))
        while self.core.has_work:
            for output in self.core.step():
                ttft_s = ttft_s or time.process_time() - started
                peak_slots = max(peak_slots, 0 if output.kv is None else output.kv.peak_slots)
            steady = pool.counts.active or steady
        peak = max(steady, -(-peak_slots // BLOCK_SIZE))
        return Cost(peak, steady, 1000 * ttft_s, self._decode_rate(samples[:DECODE_ROWS], setting))

    def _decode_rate(self, samples: Sequence[Sample], setting: Setting) -> float:
        """Tokens a second while all rows decode."""
        num_tokens = DECODE_TOKENS + SETTLED + 6 * len(samples)  # a prompt takes some steps, in which others decode
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, seed=0)
        for sample in samples:
            self.core.add(self._request(sample, setting, sampling))
        roster = self.core.scheduler.roster
        while roster.num_waiting or any(request.num_remaining_tokens > 1 for request in roster.running):
            self.core.step()
        for _ in range(SETTLED):
            self.core.step()
        started = time.process_time()
        num_tokens = sum(len(output.token_ids) for _ in range(DECODE_TOKENS // 2) for output in self.core.step())
        seconds = time.process_time() - started
        while self.core.has_work:
            self.core.step()
        return num_tokens / seconds

    def _request(
        self, sample: Sample, setting: Setting, sampling: SamplingParams, *, is_new: bool = False
    ) -> EngineRequest:
        name = f"frontier-{next(self._serial)}"
        return EngineRequest(
            request_id=name,
            prompt_token_ids=sample.token_ids,
            sampling=sampling,
            kv_policy=setting.choice(sample),
            cache_salt=name if is_new else "",
        )

    def _run(self, requests: list[EngineRequest]) -> list[Outcome]:
        outcomes = {request.request_id: Outcome([]) for request in requests}
        coming = iter(requests)
        for request in itertools.islice(coming, 2 * ROWS):  # all at once would wait longer than a server lets them
            self.core.add(request)
        while self.core.has_work:
            for output in self.core.step():
                if output.finish_reason is not None:
                    for request in itertools.islice(coming, 1):
                        self.core.add(request)
                outcome = outcomes[output.request_id]
                if output.error is not None:
                    raise RuntimeError(f"a request of the frontier ended with {output.error}")
                outcome.token_ids += output.token_ids
                outcome.kv = output.kv or outcome.kv
                outcome.prompt_logprobs = output.prompt_logprobs or outcome.prompt_logprobs
        return [outcomes[request.request_id] for request in requests]


def perplexity(samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> float:
    """Of the tokens after the first turns."""
    logprobs = [
        known.logprob
        for sample, outcome in zip(samples, outcomes, strict=True)
        for known in (outcome.prompt_logprobs or [])[sample.first_turn :]
        if known is not None
    ]
    return math.exp(-statistics.mean(logprobs))
