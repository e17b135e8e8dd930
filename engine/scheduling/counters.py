"""What a scheduler counts, and the report of it. Counters only grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.scheduling.block_pool import BlockCounts
from engine.scheduling.drafts import DraftCounters
from engine.scheduling.prefix_cache import PrefixStats
from engine.types import CompressionCounts, EngineStats


@dataclass(slots=True)
class Counters:
    """See EngineStats."""

    num_preemptions: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    aborted_tokens: int = 0
    compression: dict[str, CompressionCounts] = field(default_factory=dict)  # by policy
    drafts: DraftCounters = field(default_factory=DraftCounters)


def report(counters: Counters, blocks: BlockCounts, prefix: PrefixStats, gauges: Mapping[str, Any]) -> EngineStats:
    """Everything but the step times, which the core knows. gauges: fields of EngineStats that are no counters."""
    drafts = counters.drafts
    return EngineStats(
        blocks_free=blocks.free,
        blocks_active=blocks.active + blocks.pinned,
        blocks_cached=blocks.cached,
        num_preemptions=counters.num_preemptions,
        compression=counters.compression,
        prompt_tokens_computed=counters.prompt_tokens_computed,
        prompt_tokens_cached=counters.prompt_tokens_cached,
        generation_tokens=counters.generation_tokens,
        prefix_queries=prefix.queries,
        prefix_hits=prefix.hits,
        prefix_queried_tokens=prefix.queried_tokens,
        prefix_hit_tokens=prefix.hit_tokens,
        prefix_evicted_blocks=sum(prefix.evicted_blocks.values()),
        aborted_tokens=counters.aborted_tokens,
        spec_steps=drafts.num_steps,
        spec_emitted=drafts.num_emitted,
        spec_drafted=dict(drafts.drafted),
        spec_accepted=dict(drafts.accepted),
        spec_reached_at_depth=list(drafts.reached_at_depth),
        spec_accepted_at_depth=list(drafts.accepted_at_depth),
        **gauges,
    )
