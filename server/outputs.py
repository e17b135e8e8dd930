"""Arithmetic on engine outputs: merging pieces of the same choice, and counting tokens for `usage`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from engine.types import KVUsage, SpeculationUsage, TextOutput

# one piece of choice `output.choice` of prompt number `index`: (index, output)
Piece = tuple[int, TextOutput]


class TokenCounts(Protocol):
    """Totals so far: a TextOutput, or the chat pipeline's event made of one."""

    @property
    def choice(self) -> int: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_cached_tokens(self) -> int: ...

    @property
    def cache_miss(self) -> str | None: ...

    @property
    def num_output_tokens(self) -> int: ...

    @property
    def num_reasoning_tokens(self) -> int: ...

    @property
    def kv(self) -> KVUsage | None: ...

    @property
    def speculative(self) -> SpeculationUsage | None: ...


def merge(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece per choice, in the order in which the choices first appear."""
    if len(pieces) <= 1:
        return list(pieces)
    by_choice: dict[tuple[int, int], list[TextOutput]] = {}
    for index, output in pieces:
        by_choice.setdefault((index, output.choice), []).append(output)
    return [(index, TextOutput.join(outputs)) for (index, _), outputs in by_choice.items()]


class UsageCounter:
    """Adds up `usage` over the prompts and choices of one HTTP request; each prompt counts once."""

    def __init__(self) -> None:
        self._misses: dict[int, str] = {}
        self._last: dict[tuple[int, int], TokenCounts] = {}  # of each prompt and choice: counts are totals so far

    def add(self, index: int, output: TokenCounts) -> None:
        """Called for every piece, so it only keeps it."""
        self._last[index, output.choice] = output
        if output.cache_miss is not None:
            self._misses.setdefault(index, output.cache_miss)

    def as_dict(self, *, counts_output: bool = True) -> dict[str, Any]:
        """The `usage` object. Without `counts_output`, for a request that only scores its prompt."""
        prompts: dict[int, tuple[int, int]] = {}
        for (index, _), last in self._last.items():
            num_prompt, num_cached = prompts.get(index, (0, 0))
            prompts[index] = (max(num_prompt, last.num_prompt_tokens), max(num_cached, last.num_cached_tokens))
        num_prompt = sum(num for num, _ in prompts.values())
        num_output = sum(last.num_output_tokens for last in self._last.values()) if counts_output else 0
        details: dict[str, Any] = {"cached_tokens": sum(num for _, num in prompts.values())}
        if self._misses:
            details["cache_miss_reason"] = self._misses[min(self._misses)]
        num_reasoning = sum(last.num_reasoning_tokens for last in self._last.values())
        usage: dict[str, Any] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": details,
            "completion_tokens_details": {"reasoning_tokens": num_reasoning},
        }
        if caches := [last.kv for last in self._last.values() if last.kv is not None]:
            usage["kv"] = _joined(caches)
        if speculations := [last.speculative for last in self._last.values() if last.speculative is not None]:
            usage["speculative"] = _added(speculations)
        return usage


def _added(speculations: Sequence[SpeculationUsage]) -> dict[str, Any]:
    """The sums over all choices."""
    by_source: dict[str, dict[str, int]] = {}
    for speculation in speculations:
        for source, (drafted, accepted) in speculation.by_source.items():
            entry = by_source.setdefault(source, {"drafted": 0, "accepted": 0})
            entry["drafted"] += drafted
            entry["accepted"] += accepted
    return {
        "steps": sum(speculation.steps for speculation in speculations),
        "drafted": sum(speculation.drafted for speculation in speculations),
        "accepted": sum(speculation.accepted for speculation in speculations),
        "by_source": by_source,
    }


def _joined(caches: Sequence[KVUsage]) -> dict[str, Any]:
    """Slots are those of the largest cache; tokens, bytes and rungs those of all choices together.

    Policy and format are the first one's: where memory was short, choices may have shrunk in different ways.
    """
    totals = ("evicted_tokens", "merged_tokens", "released_bytes", "private_bytes", "shared_bytes")
    return {
        "policy": caches[0].policy,
        "peak_slots": max(cache.peak_slots for cache in caches),
        "steady_slots": max(cache.steady_slots for cache in caches),
        **{name: sum(getattr(cache, name) for cache in caches) for name in totals},
        "bits_per_value": caches[0].bits_per_value,
        "format": caches[0].format,
        "rungs": [{"policy": rung.policy, "at_token": rung.at_token} for cache in caches for rung in cache.rungs],
    }
