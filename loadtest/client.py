"""Sends one workload and records when each piece of each answer arrived."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.workloads import Workload, arrival_times

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible server."""

    url: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = True


@dataclass
class Record:
    """One request: times in seconds on one clock, counts from the server's usage."""

    sent: float
    first: float | None = None
    finished: float | None = None
    arrivals: list[float] = field(default_factory=list)  # of every piece with text
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return (self.first or self.finished or self.sent) - self.sent

    @property
    def latency_s(self) -> float:
        return (self.finished or self.sent) - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """Times between pieces: the inter-token latency when the server sends one token a piece."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def time_per_output_token_s(self) -> float:
        if self.first is None or self.finished is None or self.output_tokens < 2:
            return 0.0
        return (self.finished - self.first) / (self.output_tokens - 1)


@dataclass
class Run:
    """All records of one measured run."""

    records: list[Record]
    duration_s: float


async def run_workload(
    target: Target, workload: Workload, *, concurrency: int | None = None, rate: float | None = None
) -> Run:
    """Closed loop with `concurrency` requests in flight, or open loop with Poisson arrivals at `rate` per second."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    gate = asyncio.Semaphore(concurrency or workload.num_requests)
    started = time.perf_counter()
    async with httpx.AsyncClient(
        base_url=target.url, headers=headers, timeout=httpx.Timeout(TIMEOUT_S, connect=10.0), limits=limits
    ) as http:

        async def one(prompt: list[int] | str, at: float) -> Record:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            async with gate:
                return await _send(http, target, workload, prompt)

        times = arrival_times(workload.num_requests, rate, workload.seed)
        tasks = [asyncio.create_task(one(p, at)) for p, at in zip(workload.prompts(), times, strict=True)]
        records = await asyncio.gather(*tasks)
    return Run(records=list(records), duration_s=time.perf_counter() - started)


async def _send(http: httpx.AsyncClient, target: Target, workload: Workload, prompt: list[int] | str) -> Record:
    body: dict[str, Any] = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": workload.output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.ignore_eos:
        body["ignore_eos"] = True
    record = Record(sent=time.perf_counter())
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                record.error = f"{response.status_code}: {response.text[:200]}"
            else:
                async for line in response.aiter_lines():
                    _read_line(line, record)
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    record.finished = time.perf_counter()
    return record


def _read_line(line: str, record: Record) -> None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    now = time.perf_counter()
    if "error" in event:
        record.error = str(event["error"].get("message", event["error"]))
    for choice in event.get("choices", []):
        if choice.get("text"):
            record.first = record.first or now
            record.arrivals.append(now)
    usage = event.get("usage")
    if usage:
        record.prompt_tokens = usage["prompt_tokens"]
        record.output_tokens = usage["completion_tokens"]
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
