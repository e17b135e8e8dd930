"""Every metric of the server, registered once, with closed label sets. Knows no HTTP framework and no tensors.

`Metrics` has three parts, by who writes them: `http` (middleware), `requests` (the life of a generation request) and
`engine` (one `update` per report of the core, never per token). Every label value exists from the start at 0.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.gc_collector import GCCollector

from engine.metrics_compat import VllmNames
from engine.metrics_compression import CompressionMetrics
from engine.metrics_factory import (
    ITL_BUCKETS,
    LATENCY_BUCKETS,
    STEP_BUCKETS,
    STEP_TOKEN_BUCKETS,
    TOKEN_BUCKETS,
    TTFT_BUCKETS,
    Histogram,
    MetricFactory,
)
from engine.metrics_grammar import GrammarMetrics
from engine.metrics_speculation import SpeculationMetrics
from engine.types import EngineStats, ModelInfo
from engine.version import __version__, commit

FINISH_REASONS = ("stop", "length", "tool_calls", "abort", "error", "timeout")
REJECTIONS = (
    *("auth", "rate_limit", "body_too_large", "queue_full", "queue_tokens", "draining", "loading", "sleeping"),
    *("validation", "context_length", "model_not_found", "other"),
)
STATES = ("starting", "loading", "warming", "ready", "draining", "sleeping", "dead")
STEP_KINDS = ("prefill", "decode", "mixed")
STATUSES = ("200", "400", "401", "404", "405", "408", "413", "415", "429", "431", "499", "500", "503", "504")
DISCONNECT_PHASES = ("queued", "prefill", "decode")
PRIORITIES = ("high", "normal", "low")
OTHER = "other"


class Metrics:
    """All metrics of one server. `model` is the served name, `compat` whose names to expose in addition."""

    def __init__(self, model: str, *, compat: str = "") -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.http = HttpMetrics(self.registry)
        factory = MetricFactory(self.registry, model)
        self.requests = RequestMetrics(factory)
        self.engine = EngineMetrics(factory)
        self.grammar = GrammarMetrics(factory)
        if compat == "vllm":
            self.registry.register(VllmNames(factory.families, self.engine))


class HttpMetrics:
    """What the middleware sees. Methods and routes outside the known ones count as "other"."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._known: set[tuple[str, str]] = set()
        self._in_flight_of: dict[str, Gauge] = {}  # by route: finding a series by its labels takes the library a while
        self._requests = Counter(
            "kvasir_http_requests", "Answered HTTP requests", ["route", "method", "status"], registry=registry
        )
        self._durations = Histogram(
            "kvasir_http_request_duration_seconds",
            "From request head to the end of the answer",
            ["route"],
            LATENCY_BUCKETS,
            registry,
        )
        self._in_flight = Gauge("kvasir_http_in_flight", "HTTP requests being answered", ["route"], registry=registry)
        rejections = Counter("kvasir_http_rejections", "Requests refused, by reason", ["reason"], registry=registry)
        self._rejections = {reason: rejections.labels(reason) for reason in REJECTIONS}
        disconnects = Counter(
            "kvasir_client_disconnects",
            "Clients that left before the end: before the first step, before the first token, or later",
            ["phase"],
            registry=registry,
        )
        self.disconnects = {phase: disconnects.labels(phase) for phase in DISCONNECT_PHASES}
        self.unknown_fields = Counter(
            "kvasir_unknown_request_fields", "Request fields that were ignored", registry=registry
        )
        self.buffer_overflows = Counter(
            "kvasir_sse_buffer_overflow", "Streams ended because the reader was too slow", registry=registry
        )
        self.tokenize_seconds = Histogram(
            "kvasir_tokenize_seconds",
            "Template and tokenizer for one prompt, waiting for a thread included",
            (),
            STEP_BUCKETS,
            registry,
        ).labels()
        self.detokenize_seconds = Histogram(
            "kvasir_detokenize_seconds",
            "Tokens of one step into text, for all its requests",
            (),
            STEP_BUCKETS,
            registry,
        ).labels()
        self.loop_lag = Histogram(
            "kvasir_event_loop_lag_seconds",
            "Delay of a timer on the front end's event loop",
            (),
            STEP_BUCKETS,
            registry,
        ).labels()
        self.declare([(OTHER, OTHER)])

    def declare(self, routes: Iterable[tuple[str, str]]) -> None:
        """(route template, method) pairs that exist; their series start at 0."""
        for route, method in routes:
            self._known.add((route, method))
            for status in STATUSES:
                self._requests.labels(route, method, status)
            self._durations.labels(route)
            self._in_flight_of[route] = self._in_flight.labels(route)

    def began(self, route: str) -> None:
        self._in_flight_of[route].inc()

    def ended(self, route: str, method: str, status: int, seconds: float) -> None:
        self._in_flight_of[route].dec()
        self._durations.labels(route).observe(seconds)
        label = method if (route, method) in self._known else OTHER
        self._requests.labels(route, label, str(status)).inc()

    def observe_text(self, work: str, seconds: float) -> None:
        """`work` is "tokenize" or "detokenize"."""
        (self.tokenize_seconds if work == "tokenize" else self.detokenize_seconds).observe(seconds)

    def rejected(self, reason: str) -> None:
        self._rejections[reason if reason in self._rejections else OTHER].inc()


class RequestMetrics:
    """The life of generation requests as the front end sees it: one request is one prompt with all its choices."""

    def __init__(self, make: MetricFactory) -> None:
        self.finished = make.counters(
            "kvasir_requests", "Finished requests, by the reason of the end", "finish_reason", FINISH_REASONS
        )
        self.queue_seconds = make.histograms(
            "kvasir_request_queue_seconds",
            "From arrival in the engine to the first step",
            LATENCY_BUCKETS,
            "priority_class",
            PRIORITIES,
        )
        self.prefill_seconds = make.histogram(
            "kvasir_request_prefill_seconds", "From the first step to the first token", LATENCY_BUCKETS
        )
        self.decode_seconds = make.histogram(
            "kvasir_request_decode_seconds", "From the first token to the last", LATENCY_BUCKETS
        )
        self.e2e_seconds = make.histogram("kvasir_request_e2e_seconds", "From arrival to the end", LATENCY_BUCKETS)
        self.ttft_seconds = make.histogram(
            "kvasir_time_to_first_token_seconds", "From arrival to the first token", TTFT_BUCKETS
        )
        self.itl_seconds = make.histogram(
            "kvasir_inter_token_latency_seconds",
            "Gap before each token but a choice's first; k tokens at once are k gaps of one k-th",
            ITL_BUCKETS,
        )
        self.tpot_seconds = make.histogram(
            "kvasir_time_per_output_token_seconds", "Mean gap between the tokens of a request", ITL_BUCKETS
        )
        self.prompt_tokens = make.histogram("kvasir_request_prompt_tokens", "Prompt tokens of a request", TOKEN_BUCKETS)
        self.output_tokens = make.histogram("kvasir_request_output_tokens", "Output tokens of a request", TOKEN_BUCKETS)
        self.cached_tokens = make.histogram(
            "kvasir_request_cached_tokens", "Prompt tokens of a request that the prefix cache served", TOKEN_BUCKETS
        )
        self.preemptions = make.histogram(
            "kvasir_request_preemptions", "How often a request was preempted", (0, 1, 2, 3, 5, 10)
        )
        self.deadline_misses = make.counters(
            "kvasir_deadline_misses", "Requests that ran past their time limit", "kind", ("e2e",)
        )


class EngineMetrics:
    """Gauges and counters of the core, from its reports."""

    def __init__(self, make: MetricFactory) -> None:
        self._make = make
        self._seen: dict[str, float] = {}
        self.info: ModelInfo | None = None
        self._build_info = _BuildInfo(make)
        make.gauge("kvasir_start_time_seconds", "When the front end started, in Unix time").set_to_current_time()
        self.ready = make.gauge("kvasir_ready", "1 while requests are accepted")
        self.state = make.gauges("kvasir_state", "1 for the state the server is in", "state", STATES)
        self.startup_seconds = make.gauges(
            "kvasir_startup_phase_seconds", "Duration of each phase of the last start", "phase", STATES[:3]
        )
        self.restarts = make.counter("kvasir_engine_restarts", "Starts of the engine process after the first")
        self.heartbeat_age = make.gauge(
            "kvasir_engine_heartbeat_age_seconds", "Time since the engine process last sent anything"
        )
        self._define_queue(make)
        self._define_steps(make)
        self._define_tokens(make)
        self._define_cache(make)
        self.speculation = SpeculationMetrics(make)
        self.compression = CompressionMetrics(make)

    def _define_queue(self, make: MetricFactory) -> None:
        self.running = make.gauge("kvasir_requests_running", "Token streams in the running batch")
        self.waiting = make.gauge("kvasir_requests_waiting", "Token streams that wait for a place in the batch")
        self.queue_tokens = make.gauge("kvasir_queue_tokens", "Prompt tokens that wait")
        self.queue_age = make.gauge("kvasir_queue_oldest_age_seconds", "How long the oldest waiting request waits")

    def _define_steps(self, make: MetricFactory) -> None:
        self.steps = make.counters("kvasir_engine_steps", "Steps of the engine", "kind", STEP_KINDS)
        self.step_seconds = make.histograms(
            "kvasir_engine_step_seconds", "Duration of a step", STEP_BUCKETS, "kind", STEP_KINDS
        )
        self.step_tokens = make.histogram("kvasir_engine_step_tokens", "Tokens computed in a step", STEP_TOKEN_BUCKETS)
        self.step_requests = make.histogram(
            "kvasir_engine_step_requests", "Token streams in a step", STEP_TOKEN_BUCKETS
        )
        self.scheduler_seconds = make.histogram("kvasir_scheduler_seconds", "Scheduling work of a step", STEP_BUCKETS)
        self.sampler_seconds = make.histogram("kvasir_sampler_seconds", "Sampling work of a step", STEP_BUCKETS)
        self.preemptions = make.counters(
            "kvasir_preemptions", "Running requests that gave way", "mode", ("recompute", "compress")
        )

    def _define_tokens(self, make: MetricFactory) -> None:
        self.prompt_tokens = make.counters(
            "kvasir_prompt_tokens", "Prompt tokens, by where they came from", "source", ("computed", "cache_device")
        )
        self.generation_tokens = make.counter("kvasir_generation_tokens", "Tokens generated")
        self.aborted_tokens = make.counter("kvasir_aborted_tokens", "Tokens computed for requests that were aborted")

    def _define_cache(self, make: MetricFactory) -> None:
        self.usage_ratio = make.gauge("kvasir_kv_cache_usage_ratio", "Share of the cache blocks held by requests")
        self.blocks = make.gauges("kvasir_kv_blocks", "Cache blocks", "state", ("free", "active", "cached"))
        self.block_size = make.gauge("kvasir_kv_block_size_tokens", "Tokens per cache block")
        self.cache_bytes = make.gauges(
            "kvasir_kv_cache_bytes", "Bytes of the cache pool", "state", ("free", "active", "cached"), tier="device"
        )
        self.device_bytes = make.gauges(
            "kvasir_device_memory_bytes", "Memory taken on the device", "kind", ("weights", "kv")
        )
        self.prefix_queries = make.counter("kvasir_prefix_cache_queries", "Requests looked up in the prefix cache")
        self.prefix_hits = make.counter("kvasir_prefix_cache_hits", "Requests with at least one cached block")
        self.prefix_queried_tokens = make.counter("kvasir_prefix_cache_queried_tokens", "Prompt tokens looked up")
        self.prefix_hit_tokens = make.counters(
            "kvasir_prefix_cache_hit_tokens", "Prompt tokens found", "tier", ("device",)
        )
        self.prefix_evicted = make.counters(
            "kvasir_prefix_cache_evicted_blocks", "Blocks evicted from the prefix cache", "reason", ("capacity",)
        )

    def describe_model(self, info: ModelInfo, config_labels: Mapping[str, str]) -> None:
        """Once, when the engine is ready for the first time."""
        if self.info is None:
            self._make.info("kvasir_engine_config_info", "Settings of the engine", config_labels)
        self.info = info
        self._build_info.set_device(info.device)
        self.block_size.set(info.block_size)
        self.device_bytes["weights"].set(info.weight_bytes)
        self.device_bytes["kv"].set(info.kv_cache_bytes)

    def update(self, stats: EngineStats) -> None:
        """Takes over one report of the core. The lists in it hold what happened since the report before."""
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.queue_tokens.set(stats.waiting_tokens)
        self.queue_age.set(stats.oldest_waiting_s)
        self._update_blocks(stats)
        for kind, count in stats.num_steps.items():
            self._advance(self.steps[kind], f"steps.{kind}", count)
        for kind, seconds, tokens, requests in stats.step_seconds:
            self.step_seconds[kind].observe(seconds)
            self.step_tokens.observe(tokens)
            self.step_requests.observe(requests)
        for seconds in stats.scheduler_seconds:
            self.scheduler_seconds.observe(seconds)
        for seconds in stats.sampler_seconds:
            self.sampler_seconds.observe(seconds)
        for counter, name in (
            (self.preemptions["recompute"], "num_preemptions"),
            (self.preemptions["compress"], "num_shrunk"),
            (self.prompt_tokens["computed"], "prompt_tokens_computed"),
            (self.prompt_tokens["cache_device"], "prompt_tokens_cached"),
            (self.generation_tokens, "generation_tokens"),
            (self.aborted_tokens, "aborted_tokens"),
            (self.prefix_queries, "prefix_queries"),
            (self.prefix_hits, "prefix_hits"),
            (self.prefix_queried_tokens, "prefix_queried_tokens"),
            (self.prefix_hit_tokens["device"], "prefix_hit_tokens"),
            (self.prefix_evicted["capacity"], "prefix_evicted_blocks"),
        ):
            self._advance(counter, name, getattr(stats, name))
        self.speculation.update(stats, self._advance)
        self.compression.update(stats, self._advance)

    def set_state(self, phase: str, *, is_ready: bool, num_restarts: int, heartbeat_age_s: float) -> None:
        """Once per scrape."""
        self.ready.set(is_ready)
        for name, gauge in self.state.items():
            gauge.set(name == phase)
        self.heartbeat_age.set(heartbeat_age_s)
        self._advance(self.restarts, "restarts", num_restarts)

    def _update_blocks(self, stats: EngineStats) -> None:
        counts = {"free": stats.blocks_free, "active": stats.blocks_active, "cached": stats.blocks_cached}
        total = sum(counts.values())
        self.usage_ratio.set(stats.blocks_active / total if total else 0.0)
        block_bytes = self.info.kv_cache_bytes / max(self.info.num_blocks, 1) if self.info else 0
        for state, count in counts.items():
            self.blocks[state].set(count)
            self.cache_bytes[state].set(count * block_bytes)

    def _advance(self, counter: Counter, key: str, value: float) -> None:
        """A restarted engine counts from 0 again: then its whole value is new."""
        before = self._seen.get(key, 0.0)
        if value != before:
            counter.inc(value - before if value > before else value)
            self._seen[key] = value


class _BuildInfo:
    """One constant series; the device joins it when the engine has told which one it is."""

    def __init__(self, make: MetricFactory) -> None:
        try:
            torch_version = metadata.version("torch")
        except metadata.PackageNotFoundError:
            torch_version = "none"
        self._labels = {
            "version": __version__,
            "commit": commit(),
            "python": platform.python_version(),
            "torch": torch_version,
            "device": "",
        }
        self._family = make.info("kvasir_build_info", "Versions of what is running", self._labels)
        self._model = make.model

    def set_device(self, device: str) -> None:
        self._labels["device"] = device
        self._family.clear()
        self._family.labels(self._model, *self._labels.values()).set(1)
