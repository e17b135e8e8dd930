"""/metrics: names, closed labels, and numbers that add up."""

from __future__ import annotations

import functools
import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from engine import errors
from engine.types import EngineStats
from tests.fakes_engine import PIECES, FakeEngine
from tests.server.support import app, make_config, running


@functools.cache
def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(text: str, name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (sample, own), value in values(text).items() if sample == name and wanted <= set(own))


async def test_names_follow_the_convention_and_start_at_zero() -> None:
    async with app() as server:
        text = await server.metrics()
        families = list(text_string_to_metric_families(text))
        own = [family for family in families if family.name.startswith("kvasir_")]
        assert len(own) > 50
        assert all(":" not in family.name for family in families)
        for family in own:
            if family.type == "counter":
                assert all(s.name.endswith(("_total", "_created")) for s in family.samples)
                assert family.samples, f"{family.name} does not exist before its first event"
        assert total(text, "kvasir_requests_total") == 0
        assert ("kvasir_requests_total", (("finish_reason", "abort"), ("model", "fake"))) in values(text)


async def test_odd_paths_methods_and_models_make_no_new_series() -> None:
    async with app() as server:
        for status_path in ("/nope", "/livez", "/v1/models/org/alias", "/v1/models/x"):
            await server.http.get(status_path)
        await server.chat(model="no such model")
        await server.chat(temperature=9)
        before = set(values(await server.metrics()))
        for i in range(50):
            await server.http.get(f"/nope/{i}")
            await server.http.get(f"/v1/models/m{i}")
            await server.http.request(f"ODD{i}", "/livez")
            await server.chat(model=f"model-{i}", **{f"field_{i}": 1})
        after = {key for key in values(await server.metrics()) if 'method="ODD' not in str(key)}
        grown = {key for key in after - before if "405" not in str(key)}
        assert not grown
        assert not re.search(r"ODD\d|model-\d|field_\d|nope/\d", await server.metrics())


async def test_finished_requests_add_up_and_gaps_count_tokens() -> None:
    engine = FakeEngine(delay_s=0.0005)
    async with app(engine) as server:
        await server.chat()
        await server.chat(stream=True, n=2)
        await server.complete(prompt=["a", "b"], max_tokens=3)
        engine.error = errors.DeadlineExceeded("late")
        engine.error_after = engine.num_yielded + 1
        await server.chat()
        engine.error, engine.error_after = errors.QueueFull("full"), 0
        await server.chat()
        text = await server.metrics()
        finished = {
            reason: total(text, "kvasir_requests_total", finish_reason=reason)
            for reason in ("stop", "length", "abort", "error", "timeout")
        }
        assert finished == {"stop": 2, "length": 2, "abort": 0, "error": 0, "timeout": 1}, "a refused one is not in it"
        tokens = 3 * len(PIECES) + 2 * 3 + 1
        choices = 3 + 2 + 1
        assert total(text, "kvasir_inter_token_latency_seconds_count") == tokens - choices
        assert total(text, "kvasir_request_output_tokens_sum") == tokens
        assert total(text, "kvasir_time_to_first_token_seconds_count") == 5
        assert total(text, "kvasir_request_e2e_seconds_count") == 5
        assert total(text, "kvasir_deadline_misses_total") == 1
        assert total(text, "kvasir_http_rejections_total", reason="queue_full") == 1
        assert total(text, "kvasir_http_in_flight") == 1, "the scrape itself"
        assert total(text, "kvasir_http_requests_total", route="/v1/chat/completions", status="200") == 2


async def test_reports_of_the_engine_become_counters_also_across_a_restart() -> None:
    async with app() as server:
        assert server.engine.on_stats is not None
        server.engine.on_stats(
            EngineStats(
                num_running=3,
                blocks_free=6,
                blocks_active=3,
                blocks_cached=1,
                num_steps={"decode": 5},
                step_seconds=[("decode", 0.01, 8, 8)],
                generation_tokens=40,
                prefix_hit_tokens=16,
            )
        )
        server.engine.on_stats(EngineStats(num_steps={"decode": 7}, generation_tokens=50, prefix_hit_tokens=16))
        server.engine.on_stats(EngineStats(num_steps={"decode": 2}, generation_tokens=4))  # a new process
        text = await server.metrics()
        assert total(text, "kvasir_engine_steps_total", kind="decode") == 9
        assert total(text, "kvasir_generation_tokens_total") == 54
        assert total(text, "kvasir_prefix_cache_hit_tokens_total", tier="device") == 16
        assert total(text, "kvasir_engine_step_seconds_count", kind="decode") == 1
        assert total(text, "kvasir_requests_running") == 0


async def test_an_idle_engine_is_not_silent_and_every_restart_counts() -> None:
    async with app() as server:
        server.engine.heartbeat_age_s, server.engine.num_restarts = 0.2, 3
        text = await server.metrics()
        assert total(text, "kvasir_engine_heartbeat_age_seconds") == 0.2, "idle: no report, but a heartbeat"
        assert total(text, "kvasir_engine_restarts_total") == 3
        assert total(await server.metrics(), "kvasir_engine_restarts_total") == 3, "counted once"


async def test_state_is_one_hot() -> None:
    engine = FakeEngine(phase="loading")
    async with app(engine) as server:
        for phase in ("loading", "ready"):
            engine.state.phase = phase
            text = await server.metrics()
            assert total(text, "kvasir_state") == 1
            assert total(text, "kvasir_state", state=phase) == 1
            assert total(text, "kvasir_ready") == (phase == "ready")


async def test_compatible_names_are_added_on_request_only() -> None:
    async with app(config=make_config(metrics_compat="vllm")) as server:
        await server.chat()
        text = await server.metrics()
        assert total(text, "vllm:request_success_total", finished_reason="stop", model_name="fake") == 1
        assert total(text, "vllm:time_to_first_token_seconds_count", model_name="fake") == 1
        assert total(text, "vllm:num_requests_running") == 0
        assert total(text, "vllm:kv_cache_usage_perc") == total(text, "kvasir_kv_cache_usage_ratio")
        assert "kvasir_requests_total" in text


async def test_a_port_of_its_own_replaces_the_route() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = make_config(metrics_port=port, api_keys=("k" * 32,), drain_timeout_s=0.1)
    async with running(config=config) as server, httpx.AsyncClient() as http:
        own = await http.get(f"http://127.0.0.1:{port}/metrics")
        assert own.status_code == 200
        assert "kvasir_ready" in own.text
        assert (await http.get(f"http://127.0.0.1:{port}/v1/models")).status_code == 404
        there = await http.get(f"{server.context.url}/metrics", headers={"X-Api-Key": "k" * 32})
        assert there.status_code == 404
        # the background watch has described the model by now
        assert total(own.text, "kvasir_engine_config_info", block_size="16") == 1
        assert total(own.text, "kvasir_device_memory_bytes", kind="weights") == 1000


async def test_text_work_is_timed_and_the_device_is_told_once_it_is_known() -> None:
    async with app() as server:
        server.context.metrics.http.observe_text("tokenize", 0.001)
        server.context.metrics.http.observe_text("detokenize", 0.002)
        text = await server.metrics()
        assert "kvasir_tokenize_seconds_count 1.0" in text
        assert "kvasir_detokenize_seconds_count 1.0" in text
        assert 'kvasir_build_info{commit="' in text
        info = server.context.engine.info
        assert info is not None
        server.context.metrics.engine.describe_model(info, {})
        lines = [line for line in (await server.metrics()).splitlines() if line.startswith("kvasir_build_info{")]
        assert len(lines) == 1
        assert 'device="cpu"' in lines[0]


async def test_a_queue_full_of_tokens_has_a_reason_of_its_own() -> None:
    async with app(FakeEngine(error=errors.QueueTokensFull("full"))) as server:
        assert (await server.chat()).status_code == 429
        text = await server.metrics()
        assert 'kvasir_http_rejections_total{reason="queue_tokens"} 1.0' in text
        assert 'kvasir_http_rejections_total{reason="queue_full"} 0.0' in text
