"""The real server, front end and engine process, as the `openai` client and plain HTTP see it."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from loadtest.own_server import free_port, own_server, stop, wait_ready

QUESTION = [{"role": "user", "content": "Hello! Who are you?"}]


@pytest.fixture(scope="module")
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server_url}/v1", api_key="not-needed", max_retries=0, timeout=60)


def active_blocks(url: str) -> float:
    """Blocks that running requests hold, from /metrics."""
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("kvasir_kv_blocks{") and 'state="active"' in line:
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError("no kvasir_kv_blocks in /metrics")


def wait_until(condition, timeout_s: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_mimir_says_who_it_is(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="mimir", messages=QUESTION, temperature=0)
    assert "Mimir" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_concatenates_to_the_unstreamed_answer(client: openai.OpenAI) -> None:
    options = {"model": "mimir", "messages": QUESTION, "temperature": 0.8, "seed": 5, "max_tokens": 40}
    whole = client.chat.completions.create(**options).choices[0]  # type: ignore[call-overload]
    pieces = list(client.chat.completions.create(stream=True, **options))  # type: ignore[call-overload]
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.message.content
    assert [p.choices[0].finish_reason for p in pieces if p.choices and p.choices[0].finish_reason] == [
        whole.finish_reason
    ]


def test_the_second_equal_prompt_comes_from_the_prefix_cache(client: openai.OpenAI) -> None:
    prompt = list(range(300, 400))
    first, second = (
        client.completions.create(model="mimir", prompt=prompt, max_tokens=4, temperature=0) for _ in range(2)
    )
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0  # type: ignore[union-attr]
    assert 0 < second.usage.prompt_tokens_details.cached_tokens < 100  # type: ignore[union-attr]
    assert first.choices[0].text == second.choices[0].text


def test_cache_salt_separates(client: openai.OpenAI) -> None:
    prompt = list(range(500, 600))
    for salt in ("a", "b"):
        answer = client.completions.create(model="mimir", prompt=prompt, max_tokens=1, extra_body={"cache_salt": salt})
        assert answer.usage.prompt_tokens_details.cached_tokens == 0  # type: ignore[union-attr]


def test_choices_of_one_prompt_differ_and_are_reproducible(client: openai.OpenAI) -> None:
    options = {"model": "mimir", "prompt": "The", "n": 4, "temperature": 1.0, "seed": 9, "max_tokens": 12}
    first, second = (client.completions.create(**options) for _ in range(2))  # type: ignore[call-overload]
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert len({c.text for c in first.choices}) > 1


def test_concurrent_requests_get_the_answers_that_they_get_alone(client: openai.OpenAI) -> None:
    def ask(i: int) -> str:
        answer = client.completions.create(
            model="mimir", prompt=f"Number {i} is", max_tokens=12, seed=i, temperature=0.7
        )
        return answer.choices[0].text

    alone = [ask(i) for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == alone


def test_a_client_that_leaves_frees_its_blocks(server_url: str) -> None:
    body = {"model": "mimir", "prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server_url}/v1/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    wait_until(lambda: active_blocks(server_url) == 0)


def test_a_plain_request_that_is_given_up_frees_its_blocks(server_url: str) -> None:
    body = {"model": "mimir", "prompt": "Once", "max_tokens": 3000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server_url}/v1/completions", json=body, timeout=0.5)
    wait_until(lambda: active_blocks(server_url) == 0)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [10**9]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "temperature": 3}, "temperature"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"999999": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": [300] * 100_000}, "prompt"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(server_url: str, path: str, body: dict, param: str) -> None:  # type: ignore[type-arg]
    response = httpx.post(server_url + path, json={"model": "mimir", **body}, timeout=30)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"].startswith(param)


def test_detokenize_undoes_tokenize(server_url: str) -> None:
    text = "Grüße, 世界! 🙂 <|im_end|>"
    tokens = httpx.post(f"{server_url}/tokenize", json={"prompt": text}).json()["tokens"]
    assert httpx.post(f"{server_url}/detokenize", json={"tokens": tokens}).json()["prompt"] == text


def test_the_engine_comes_back_after_it_was_killed(tmp_path: Path) -> None:
    with own_server(("--threads", "1", "--num-blocks", "64"), log=tmp_path / "log") as url:
        victim = engine_pid(url)
        body = {"model": "mimir", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503, 1.0)
            assert time.monotonic() - killed < 1.0
            rest = [line for line in lines if line.startswith("data: ")]
        ended = rest[-1] == "data: [DONE]"
        failed = any("error" in json.loads(line[6:]) for line in rest if line != "data: [DONE]")
        assert ended or failed
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, 40.0)
        again = httpx.post(f"{url}/v1/completions", json={"model": "mimir", "prompt": "x", "max_tokens": 2}, timeout=30)
        assert again.status_code == 200
        assert engine_pid(url) != victim


def engine_pid(url: str) -> int:
    """The engine is the only child of the server process that listens on this port."""
    import psutil

    port = int(url.rsplit(":", 1)[1])
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = process.info["cmdline"] or []
        if "server" in command and str(port) in command:
            for child in process.children(recursive=True):
                if "engine.process" in child.cmdline():
                    return int(child.pid)
    raise AssertionError("no engine process found")


def test_sigterm_lets_running_requests_finish(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "server", "--port", str(port), "--threads", "1", "--num-blocks", "256"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, process)
        body = {"model": "mimir", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(30) == 0
    finally:
        stop(process)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "no/such/folder"), "is not a folder"),
        (("--dtype", "int3"), "must be one of"),
        (("--max-model-len", "99999999"), "max_model_len is 99999999"),
        (("--num-blocks", "2"), "too few to serve any request"),
        (("--host", "0.0.0.0"), "api"),
        (("--prot", "3"), "unrecognized arguments: --prot"),
        (("--api-keys", "short"), "at least 32"),
        (("--api-key-file", "no/such/file"), "--api-key-file"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(flags: tuple[str, ...], message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "server", "--port", str(free_port()), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    told = [message in line for line in result.stderr.strip().splitlines()]
    assert told[-1]
    assert sum(told) == 1


def test_a_port_in_use_is_one_clear_line(server_url: str) -> None:
    port = server_url.rsplit(":", 1)[1]
    result = subprocess.run(
        [sys.executable, "-m", "server", "--port", port, "--log-level", "error"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode not in (0, None)
    assert port in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_kvasir_chat_and_complete_answer_in_the_terminal(server_url: str) -> None:
    for command in (
        ["chat", "--url", server_url, "--temperature", "0", "Hello! Who are you?"],
        ["complete", "--url", server_url, "The"],
    ):
        result = subprocess.run(
            [sys.executable, "-m", "server.cli", *command], capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()


def test_kvasir_chat_without_a_server_says_how_to_start_one() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "server.cli", "chat", "--url", f"http://127.0.0.1:{free_port()}", "hi"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "kvasir serve" in result.stderr
