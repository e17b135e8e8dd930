"""AsyncEngine around a real child process with a fake model: streams, limits, aborts, crashes, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio

from engine import children, ipc, supervisor
from engine.client import AsyncEngine
from engine.config import Config, Limits, ModelConfig, RuntimeConfig, SchedulerConfig, ServerConfig
from engine.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineDead,
    EngineError,
    InvalidParameter,
    NotReady,
    PromptTooLong,
    QueueFull,
    TemplateError,
    UnsupportedParameter,
)
from engine.prompts import MAX_INLINE_CHARS
from engine.recovery import PoisonedRequest
from engine.types import ChatPrompt, EngineStats, GenerationRequest, SamplingParams, TextOutput
from tests.fake_engine_process import EOS, MAX_MODEL_LEN, POISON, VOCAB_SIZE
from tests.text import vocabularies

COMMAND = (sys.executable, "-m", "tests.fake_engine_process")
TIMEOUT_S = 20.0

Start = Callable[..., Awaitable[AsyncEngine]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[AsyncEngine]:
    """One engine for the tests that leave it as they found it."""
    shared = AsyncEngine(Config(runtime=RuntimeConfig(heartbeat_s=0.05)), command=COMMAND)
    await shared.start()
    await shared.wait_ready()
    yield shared
    await shared.stop(0)


@pytest_asyncio.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Starts engines of a test's own."""
    monkeypatch.setattr(supervisor, "MIN_BACK_OFF_S", 0.05)
    started: list[AsyncEngine] = []

    async def begin(*, is_ready: bool = True, **sections: Any) -> AsyncEngine:
        sections.setdefault("runtime", RuntimeConfig(heartbeat_s=0.05))
        own = AsyncEngine(Config(**sections), command=COMMAND)
        started.append(own)
        await own.start()
        if is_ready:
            await asyncio.wait_for(own.wait_ready(), TIMEOUT_S)
        return own

    yield begin
    for own in started:
        await own.stop(0)


def request(
    prompt: str | list[int] | ChatPrompt = "hello", *, options: dict[str, Any] | None = None, **sampling: Any
) -> GenerationRequest:
    """A seeded request that runs to max_tokens unless told otherwise."""
    sampling = {"max_tokens": 12, "ignore_eos": True, **sampling}
    options = {"seed_given": True, **(options or {})}
    return GenerationRequest(prompt=prompt, sampling=msgspec.convert(sampling, SamplingParams), **options)


async def collect(engine: AsyncEngine, given: GenerationRequest) -> dict[int, list[TextOutput]]:
    """All outputs by choice. Each choice must end exactly once, with its last output."""
    outputs: dict[int, list[TextOutput]] = {}
    async with asyncio.timeout(TIMEOUT_S):
        async for output in engine.generate(given):
            outputs.setdefault(output.choice, []).append(output)
    for pieces in outputs.values():
        assert [piece.finish_reason is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    return outputs


def text_of(pieces: list[TextOutput]) -> str:
    return "".join(piece.text for piece in pieces)


def ids_of(pieces: list[TextOutput]) -> list[int]:
    return [token_id for piece in pieces for token_id in piece.token_ids]


async def until(is_true: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_true():
            await asyncio.sleep(0.01)


shared = pytest.mark.asyncio(loop_scope="module")


# ---- streams


@shared
async def test_streams_text_ids_and_counts_that_agree(engine: AsyncEngine) -> None:
    pieces = (await collect(engine, request("hello wörld", max_tokens=20)))[0]
    ids = ids_of(pieces)
    assert len(ids) == 20
    assert text_of(pieces) == await engine.detokenize(ids)
    prompt_ids = await engine.tokenize("hello wörld")
    assert [piece.prompt_token_ids for piece in pieces] == [prompt_ids] + [None] * (len(pieces) - 1)
    assert pieces[0].queued_s is not None
    last = pieces[-1]
    assert (last.finish_reason, last.stop_reason) == ("length", None)
    assert (last.num_output_tokens, last.num_prompt_tokens) == (20, len(prompt_ids))


@shared
async def test_every_choice_ends_once_and_follows_its_own_noise(engine: AsyncEngine) -> None:
    outputs = await collect(engine, request(options={"num_choices": 4}))
    assert sorted(outputs) == [0, 1, 2, 3]
    assert len({tuple(ids_of(pieces)) for pieces in outputs.values()}) == 4


@shared
async def test_a_seed_repeats_and_no_seed_does_not(engine: AsyncEngine) -> None:
    seeded = [ids_of((await collect(engine, request(seed=7)))[0]) for _ in range(2)]
    free = [ids_of((await collect(engine, request(options={"seed_given": False})))[0]) for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert free[0] != free[1]


@shared
async def test_a_stop_string_ends_the_choice_here_and_in_the_core(engine: AsyncEngine) -> None:
    given = request(max_tokens=400, temperature=0.0)
    whole = text_of((await collect(engine, given))[0])
    stop = whole[30:36]
    cut = whole[: whole.index(stop)]
    pieces = (await collect(engine, msgspec.structs.replace(given, stop=(stop, "never there"))))[0]
    assert (text_of(pieces), pieces[-1].finish_reason, pieces[-1].stop_reason) == (cut, "stop", stop)
    kept = msgspec.structs.replace(given, stop=(stop,), include_stop_str_in_output=True)
    assert text_of((await collect(engine, kept))[0]) == cut + stop
    await until(lambda: engine.stats.num_running == 0 and engine.stats.generation_tokens > 400)


@shared
async def test_end_tokens_are_hidden_and_only_asked_ones_are_named(engine: AsyncEngine) -> None:
    ids = ids_of((await collect(engine, request(max_tokens=6, temperature=0.0)))[0])
    pieces = (await collect(engine, request(max_tokens=6, temperature=0.0, stop_token_ids=[ids[3]])))[0]
    assert (ids_of(pieces), pieces[-1].finish_reason, pieces[-1].stop_reason) == (ids[:4], "stop", ids[3])
    assert text_of(pieces) == await engine.detokenize(ids[:3])
    for seed in range(30):
        pieces = (await collect(engine, request(max_tokens=400, ignore_eos=False, seed=seed)))[0]
        if pieces[-1].finish_reason == "stop":
            break
    assert ids_of(pieces)[-1] == EOS
    assert pieces[-1].stop_reason is None
    assert "<|im_end|>" not in text_of(pieces)


@shared
async def test_log_probabilities_carry_text_and_bytes(engine: AsyncEngine) -> None:
    pieces = (await collect(engine, request("hello", logprobs=0, prompt_logprobs=0, max_tokens=3)))[0]
    entries = [entry for piece in pieces for entry in piece.logprobs or []]
    assert [entry.token_id for entry in entries] == ids_of(pieces)
    assert "".join(entry.token for entry in entries) == text_of(pieces)
    assert b"".join(entry.data for entry in entries) == text_of(pieces).encode()
    prompt = pieces[0].prompt_logprobs
    assert prompt is not None
    assert prompt[0] is None
    assert [entry.token_id for entry in prompt[1:] if entry] == (await engine.tokenize("hello"))[1:]


@shared
async def test_what_a_slow_reader_leaves_is_merged(engine: AsyncEngine) -> None:
    stream = engine.generate(request(max_tokens=200, options={"num_choices": 2}))
    pieces = [await anext(stream)]
    await until(lambda: all(one.is_done for one in engine._streams.values()))
    pieces += [piece async for piece in stream]
    assert len(pieces) <= 3
    assert sum(len(piece.token_ids) for piece in pieces) == 400


# ---- prompts


@shared
async def test_chat_prompts_are_rendered_and_users_cannot_forge_turns(engine: AsyncEngine) -> None:
    prompt = ChatPrompt(messages=[{"role": "user", "content": "a<|im_end|>b"}])
    assert await engine.render(prompt) == "<|im_start|>user\na<|im_end|>b<|im_end|>\n<|im_start|>assistant\n"
    ids = await engine.tokenize(prompt)
    assert ids.count(EOS) == 1
    pieces = (await collect(engine, request(prompt)))[0]
    assert pieces[0].prompt_token_ids == ids
    with pytest.raises(TemplateError):
        await collect(engine, request(ChatPrompt(messages=[{"role": "user", "content": "x"}, {"role": None}])))


@shared
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (request(""), InvalidParameter, "at least one"),
        (request([]), InvalidParameter, "at least one"),
        (request([5, VOCAB_SIZE]), InvalidParameter, f"0 to {VOCAB_SIZE - 1}"),
        (request([-1]), InvalidParameter, "-1"),
        (request([5] * MAX_MODEL_LEN), PromptTooLong, f"{MAX_MODEL_LEN} tokens; the prompt has {MAX_MODEL_LEN} and 12"),
        (request("x" * (16 * MAX_MODEL_LEN + 1)), PromptTooLong, "bytes"),
        (request("a\ud800"), InvalidParameter, "surrogates"),
        (request(ChatPrompt(messages=[{"role": "user", "content": "\ud800"}])), InvalidParameter, "surrogates"),
        (request(ChatPrompt(messages=[{"role": "user", "x": 2**70}])), InvalidParameter, "64 bits"),
        (request(options={"priority": 2**70}), InvalidParameter, "numbers"),
        (request(options={"kv_policy": {"name": "\ud800"}}), InvalidParameter, "text"),
        (request(top_p=1.5), InvalidParameter, "top_p"),
        (request(temperature=float("nan")), InvalidParameter, "temperature"),
        (request(stop_token_ids=[VOCAB_SIZE]), InvalidParameter, "stop_token_ids"),
        (request(options={"bad_words": ("",)}), InvalidParameter, "bad_words"),
        (request(options={"truncate_prompt_tokens": 0}), InvalidParameter, "truncate_prompt_tokens"),
    ],
)
async def test_what_cannot_be_served_is_refused_before_it_reaches_the_core(
    engine: AsyncEngine, given: GenerationRequest, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        await collect(engine, given)
    assert engine._streams == {}


@shared
async def test_output_is_cut_to_the_room_that_the_prompt_leaves(engine: AsyncEngine) -> None:
    for max_tokens in (0, 10_000):
        pieces = (await collect(engine, request([5] * (MAX_MODEL_LEN - 3), max_tokens=max_tokens)))[0]
        assert (len(ids_of(pieces)), pieces[-1].finish_reason) == (3, "length")
    for keep, num_prompt_tokens in ((4, 4), (-1, MAX_MODEL_LEN - 1), (9999, 600)):
        given = request([5, 6] * 300, max_tokens=1, options={"truncate_prompt_tokens": keep})
        if num_prompt_tokens > MAX_MODEL_LEN:
            with pytest.raises(PromptTooLong):
                await collect(engine, given)
        else:
            pieces = (await collect(engine, given))[0]
            assert pieces[0].prompt_token_ids == ([5, 6] * 300)[-num_prompt_tokens:]


async def test_strict_servers_refuse_instead_of_cutting(start: Start) -> None:
    engine = await start(server=ServerConfig(strict_max_tokens=True))
    with pytest.raises(PromptTooLong, match="10000 were requested"):
        await collect(engine, request(max_tokens=10_000))
    await collect(engine, request(max_tokens=0))


@shared
async def test_bad_words_reach_the_core_with_and_without_a_space(engine: AsyncEngine) -> None:
    words = await engine._text().encoder.bad_words(["user", " the"])
    texts = {await engine.detokenize(list(word)) for word in words}
    assert texts == {"user", " user", " the"}


async def test_without_a_chat_template_only_text_is_served(start: Start, tmp_path: Path) -> None:
    folder = vocabularies.save(tmp_path, vocabularies.byte_level(), chat_template=None)
    engine = await start(model=ModelConfig(tokenizer=str(folder)))
    with pytest.raises(UnsupportedParameter, match="--chat-template"):
        await collect(engine, request(ChatPrompt(messages=[{"role": "user", "content": "x"}])))
    assert len(await collect(engine, request("hello"))) == 1


async def test_tokenizing_has_a_time_limit_and_holds_nobody_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start(limits=Limits(tokenize_timeout_s=0.2))
    tokenizer = engine._text().tokenizer
    encode = tokenizer.encode

    def slow_encode(text: str, **options: Any) -> list[int]:
        if text == long:
            time.sleep(0.6)
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", slow_encode)
    long = "slow " * MAX_INLINE_CHARS  # shorter ones are done at once, in less time than a thread takes to start
    slow = asyncio.create_task(collect(engine, request(long)))
    await asyncio.sleep(0.05)
    assert len(await collect(engine, request("quick"))) == 1
    with pytest.raises(PromptTooLong, match=r"0\.2 s"):
        await slow


# ---- leaving


async def test_closing_the_iterator_frees_the_core(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "0.02")
    engine = await start()
    stream = engine.generate(request(max_tokens=0, options={"num_choices": 2}))
    await anext(stream)
    await until(lambda: engine.stats.num_running == 2)
    await stream.aclose()
    await until(lambda: engine.stats.num_running == 0, 1.0)
    assert engine.stats.blocks_active == 0
    assert engine._num_open == 0
    assert engine._streams == {}


async def test_cancelling_frees_the_core_from_every_state(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "0.02")
    engine = await start(scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16))
    for delay_s in (0, 0.001, 0.01, 0.03, 0.1):  # tokenizing, waiting, in the prompt, in the output
        tasks = [asyncio.create_task(collect(engine, request([5] * 60, max_tokens=300))) for _ in range(4)]
        await asyncio.sleep(delay_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert engine._streams == {}
    await until(lambda: engine.stats.num_running == engine.stats.num_waiting == engine.stats.blocks_active == 0)
    assert len(await collect(engine, request())) == 1


# ---- limits


async def test_a_full_queue_answers_at_once_with_the_time_to_come_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "1")
    engine = await start(scheduler=SchedulerConfig(max_num_seqs=2, max_waiting_requests=4))
    running = [asyncio.create_task(collect(engine, request(max_tokens=1))) for _ in range(6)]
    await until(lambda: len(engine._streams) == 6)
    started = time.monotonic()
    for _ in range(10):
        with pytest.raises(QueueFull) as caught:
            await collect(engine, request())
        assert 1 <= caught.value.retry_after_s <= 30
    assert time.monotonic() - started < 1, "not one step"
    assert all(await asyncio.gather(*running)), "nothing that was admitted is dropped"
    await collect(engine, request(max_tokens=1))


async def test_deadlines_end_requests_wherever_they_are(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "0.05")
    engine = await start()
    with pytest.raises(DeadlineExceeded):
        await collect(engine, request(max_tokens=0, options={"deadline_s": 0.2}))


async def test_a_fault_in_one_requests_own_work_ends_it_alone(start: Start) -> None:
    faults = "tokenizer:label=a:1,template:label=b:1,detok:label=c:1"
    engine = await start(runtime=RuntimeConfig(faults=faults))
    chat = ChatPrompt(messages=[{"role": "user", "content": "x"}])
    given = {
        label: request(chat if label == "b" else "hello", max_tokens=50, options={"client_request_id": label})
        for label in "abcd"
    }
    answers = await asyncio.gather(*(collect(engine, one) for one in given.values()), return_exceptions=True)
    assert [type(answer) for answer in answers] == [EngineError, EngineError, EngineError, dict]
    assert {error.code for error in answers if isinstance(error, EngineError)} == {"internal_error"}
    again = await asyncio.gather(*(collect(engine, one) for one in given.values()))
    assert len(again) == 4, "ordered once each"


# ---- crashes


async def test_streams_go_on_with_the_same_tokens_after_the_engine_was_killed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start(scheduler=SchedulerConfig(max_num_seqs=4))
    given = [
        request(f"hello {index}", max_tokens=24, seed=index, options={"num_choices": 1 + index % 2})
        for index in range(6)
    ]
    expected = [await collect(engine, one) for one in given]
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "0.02")
    os.kill(engine._supervisor.pid or 0, signal.SIGKILL)  # the next one is slow enough to be caught in the act
    await until(lambda: not engine.state.is_ready, 1.0)
    await asyncio.wait_for(engine.wait_ready(), TIMEOUT_S)

    began = asyncio.Event()

    async def stream(one: GenerationRequest) -> dict[int, list[TextOutput]]:
        outputs: dict[int, list[TextOutput]] = {}
        async for output in engine.generate(one):
            outputs.setdefault(output.choice, []).append(output)
            if output.num_output_tokens > 8:
                began.set()
        return outputs

    tasks = [asyncio.create_task(stream(one)) for one in given]
    await asyncio.wait_for(began.wait(), TIMEOUT_S)
    os.kill(engine._supervisor.pid or 0, signal.SIGKILL)
    await until(lambda: not engine.state.is_ready, 1.0)
    with pytest.raises(NotReady) as caught:
        await collect(engine, request())
    assert caught.value.code == "loading"
    resumed = await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT_S)
    for before, after in zip(expected, resumed, strict=True):
        assert {index: ids_of(pieces) for index, pieces in before.items()} == {
            index: ids_of(pieces) for index, pieces in after.items()
        }
        assert {index: text_of(pieces) for index, pieces in before.items()} == {
            index: text_of(pieces) for index, pieces in after.items()
        }
    assert engine.num_restarts == 2
    await until(lambda: engine.stats.num_running == engine.stats.num_waiting == 0)


async def test_a_request_that_kills_the_engine_ends_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_BACK_OFF_S", 0.05)
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "0.01")
    engine = await start()
    others = [asyncio.create_task(collect(engine, request(f"hello {index}", max_tokens=100))) for index in range(3)]
    await until(lambda: engine.stats.num_running == 3)
    with pytest.raises(PoisonedRequest, match="do not send it again"):
        await collect(engine, request([5, POISON]))
    finished = await asyncio.gather(*others)
    assert [len(ids_of(outputs[0])) for outputs in finished] == [100, 100, 100]
    assert engine.num_restarts == 3
    assert len(await collect(engine, request())) == 1


async def test_a_hanging_engine_is_killed_and_replaced(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "0.02")
    engine = await start(runtime=RuntimeConfig(heartbeat_s=0.05, hang_timeout_s=0.6))
    task = asyncio.create_task(collect(engine, request(max_tokens=40)))
    await until(lambda: engine.stats.num_running == 1)
    os.kill(engine._supervisor.pid or 0, signal.SIGSTOP)
    await until(lambda: not engine.state.is_ready, 3.0)
    assert len(ids_of((await asyncio.wait_for(task, TIMEOUT_S))[0])) == 40


async def test_a_step_that_never_ends_is_a_hang_although_heartbeats_come(start: Start) -> None:
    engine = await start(runtime=RuntimeConfig(heartbeat_s=0.05, hang_timeout_s=0.5, faults="forward_sleep:3:1"))
    with pytest.raises(PoisonedRequest):  # every engine process hangs at its third step
        await collect(engine, request())
    assert engine.num_restarts >= 2


async def test_an_idle_engine_does_not_count_as_hanging(start: Start) -> None:
    engine = await start(runtime=RuntimeConfig(heartbeat_s=0.05, hang_timeout_s=0.4))
    await asyncio.sleep(1.0)
    assert engine.state.is_ready
    assert engine.num_restarts == 0
    assert engine.heartbeat_age_s < 0.4


async def test_settings_that_cannot_be_honoured_are_final(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVASIR_FAKE_LOAD", "config_error")
    engine = await start(is_ready=False)
    with pytest.raises(ConfigError, match="choose a smaller model"):
        await asyncio.wait_for(engine.wait_ready(), TIMEOUT_S)
    assert (engine.state.phase, engine.num_restarts) == ("dead", 0)
    with pytest.raises(EngineDead):
        await collect(engine, request())
    monkeypatch.delenv("KVASIR_FAKE_LOAD")
    (tmp_path / "tokenizer.json").write_text("[")
    engine = await start(is_ready=False, model=ModelConfig(tokenizer=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        await asyncio.wait_for(engine.wait_ready(), TIMEOUT_S)


async def test_a_crash_loop_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_FAKE_LOAD", "crash")
    monkeypatch.setattr(supervisor, "MAX_BACK_OFF_S", 0.05)
    engine = await start(is_ready=False)
    with pytest.raises(ConfigError, match="5 times within 10 minutes"):
        await asyncio.wait_for(engine.wait_ready(), TIMEOUT_S)
    assert engine.fatal is not None
    assert engine.num_restarts == 4


# ---- life


async def test_states_and_reports_are_told_on_the_way(start: Start) -> None:
    engine = await start(is_ready=False)
    reports: list[EngineStats] = []
    engine.on_stats = reports.append
    assert engine.state.phase == "starting"
    with pytest.raises(NotReady) as caught:
        await collect(engine, request())
    assert (caught.value.code, caught.value.retry_after_s) == ("loading", 2)
    await asyncio.wait_for(engine.wait_ready(), TIMEOUT_S)
    assert engine.model_names == ("mimir",)
    assert engine.info is not None
    await collect(engine, request(max_tokens=5))
    await until(lambda: sum(len(report.step_seconds) for report in reports) == 5)
    assert reports[-1].generation_tokens == 5


async def test_a_broken_metrics_hook_does_not_stop_the_service(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    engine = await start()

    def broken(stats: EngineStats) -> None:
        raise KeyError("new kind of step")

    engine.on_stats = broken
    assert len(await collect(engine, request())) == 1
    await until(lambda: "could not be processed" in caplog.text)


async def test_the_state_says_how_much_is_loaded() -> None:
    engine = AsyncEngine(Config())
    engine.engine_progress(ipc.Phase("loading", "weights", 0.42))
    assert (engine.state.phase, engine.state.detail) == ("loading", "weights, 42% done")


async def test_a_bug_in_the_background_ends_the_engine_visibly(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start()

    def broken(message: object) -> None:
        if getattr(message, "outputs", None):  # not the idle report, which may come before the request is sent
            raise KeyError("a bug")

    monkeypatch.setattr(engine, "engine_message", broken)
    with pytest.raises(EngineDead, match="internal error"):
        await collect(engine, request())
    assert engine.state.phase == "dead"


async def test_stopping_lets_running_requests_finish_and_leaves_nothing_behind(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "0.02")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    others = set(psutil.Process().children(recursive=True))
    engine = await start()
    assert list(tmp_path.iterdir()) == [], "the socket's folder is gone once it is used"
    processes = set(psutil.Process().children(recursive=True)) - others
    assert len(processes) in (2, 3), "the engine, the worker for templates, and that for grammars, which starts last"
    task = asyncio.create_task(collect(engine, request(max_tokens=20)))
    await until(lambda: engine.stats.num_running == 1)
    stopping = asyncio.create_task(engine.stop(10.0))
    await asyncio.sleep(0.05)
    with pytest.raises(NotReady) as caught:
        await collect(engine, request())
    assert caught.value.code == "draining"
    assert len(ids_of((await task)[0])) == 20
    await asyncio.wait_for(stopping, 3.0)
    _, alive = psutil.wait_procs(list(processes), timeout=2.0)
    assert alive == []


async def test_what_outlasts_the_drain_ends_with_an_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "0.05")
    engine = await start()
    task = asyncio.create_task(collect(engine, request(max_tokens=0)))
    await until(lambda: engine.stats.num_running == 1)
    await asyncio.wait_for(engine.stop(0.1), 3.0)
    with pytest.raises(EngineError) as caught:
        await task
    assert caught.value.code == "draining"


async def test_stopping_while_loading_is_quick(start: Start) -> None:
    engine = await start(is_ready=False)
    await asyncio.wait_for(engine.stop(10.0), 4.0)


async def test_a_stop_that_is_cut_short_leaves_no_process(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "30")
    engine = await start()
    task = asyncio.create_task(collect(engine, request()))
    await until(lambda: len(engine._streams) == 1)
    await asyncio.sleep(0.1)
    process = psutil.Process(engine._supervisor.pid)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.stop(0), 0.2)
    await asyncio.gather(task, return_exceptions=True)
    _, alive = psutil.wait_procs([process], timeout=2.0)
    assert alive == []


def test_children_leave_when_the_front_end_is_killed() -> None:
    program = (
        "import asyncio, sys\n"
        "from engine.client import AsyncEngine\n"
        "from engine.config import Config\n"
        "async def main():\n"
        f"    engine = AsyncEngine(Config(), command={COMMAND!r})\n"
        "    await engine.start()\n"
        "    await engine.wait_ready()\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=children.environment()
    ) as front_end:
        assert front_end.stdout is not None
        assert front_end.stdout.readline() == b"ready\n"
        started = psutil.Process(front_end.pid).children(recursive=True)
        front_end.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            front_end.wait(5)
    assert len(started) in (2, 3), "the engine, the worker for templates, and that for grammars, which starts last"
    _, alive = psutil.wait_procs(started, timeout=5.0)
    assert alive == []
