"""A second set of names for the metrics that routers, autoscalers and stock dashboards of vLLM read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from engine.metrics import EngineMetrics

# our family -> theirs; labels that differ are in LABELS
NAMES = {
    "kvasir_requests_running": "vllm:num_requests_running",
    "kvasir_requests_waiting": "vllm:num_requests_waiting",
    "kvasir_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "kvasir_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "kvasir_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "kvasir_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "kvasir_request_e2e_seconds": "vllm:e2e_request_latency_seconds",
    "kvasir_request_queue_seconds": "vllm:request_queue_time_seconds",
    "kvasir_prompt_tokens": "vllm:prompt_tokens",
    "kvasir_generation_tokens": "vllm:generation_tokens",
    "kvasir_prefix_cache_queried_tokens": "vllm:prefix_cache_queries",
    "kvasir_prefix_cache_hit_tokens": "vllm:prefix_cache_hits",
    "kvasir_preemptions": "vllm:num_preemptions",
    "kvasir_requests": "vllm:request_success",
    "kvasir_spec_steps": "vllm:spec_decode_num_drafts",
    "kvasir_spec_verified_tokens": "vllm:spec_decode_num_draft_tokens",
    "kvasir_spec_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}
LABELS = {"model": "model_name", "finish_reason": "finished_reason"}
# their series has no such label: ours is summed over it
DROPPED = frozenset({"source", "tier", "mode", "priority_class", "drafter"})
ENGINE = "0"


class VllmNames(Collector):
    """Re-exposes families of one registry. Values are the same; prefix cache queries and hits count tokens."""

    def __init__(self, families: Mapping[str, Collector], engine: EngineMetrics) -> None:
        self._families = families
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for ours, theirs in NAMES.items():
            for family in self._families[ours].collect():
                yield _renamed(family, theirs)
                if ours == "kvasir_kv_cache_usage_ratio":
                    yield _renamed(family, "vllm:gpu_cache_usage_perc")
        if self._engine.info is not None:
            info = self._engine.info
            yield _constant(
                "vllm:cache_config_info", {"block_size": str(info.block_size), "num_gpu_blocks": str(info.num_blocks)}
            )


def _renamed(family: Metric, name: str) -> Metric:
    renamed = Metric(name, family.documentation, family.type)
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        labels = {LABELS.get(key, key): value for key, value in sample.labels.items() if key not in DROPPED}
        labels["engine"] = ENGINE
        key = (name + sample.name.removeprefix(family.name), tuple(labels.items()))
        # creation times are not summed: the oldest stands for all
        if sample.name.endswith("_created"):
            sums[key] = min(sums.get(key, sample.value), sample.value)
        else:
            sums[key] = sums.get(key, 0.0) + sample.value
    for (sample_name, label_items), value in sums.items():
        renamed.add_sample(sample_name, dict(label_items), value)
    return renamed


def _constant(name: str, labels: dict[str, Any]) -> Metric:
    metric = Metric(name, "Settings of the cache", "gauge")
    metric.add_sample(name, labels, 1)
    return metric
