"""Batches on Mimir: through the official openai client and a server that is killed, and with `kvasir batch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from loadtest.own_server import free_port, stop, wait_ready
from server import cli
from server.batches import executor
from tests.conftest import SERVE_FLAGS

CHAT = "/v1/chat/completions"
SYSTEM = "You are a careful assistant. Answer with the number alone, without any explanation or other words."
TIMEOUT_S = 120.0


def requests(count: int, *, max_tokens: int = 8) -> list[dict[str, Any]]:
    """Two system messages in turn, so that there is something to group."""
    made = []
    for number in range(count):
        system = SYSTEM if number % 2 else SYSTEM.upper()
        messages = [{"role": "system", "content": system}, {"role": "user", "content": f"What is {number} + 1?"}]
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        made.append({"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body})
    return made


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@contextmanager
def server(folder: Path, log: Path) -> Iterator[tuple[OpenAI, subprocess.Popen[bytes]]]:
    port = free_port()
    command = [sys.executable, "-m", "server", "--port", str(port), *SERVE_FLAGS, "--data-folder", str(folder)]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_ready(f"http://127.0.0.1:{port}", process)
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield client, process
    finally:
        stop(process)


def test_a_killed_server_finishes_a_batch_of_the_openai_client_after_its_restart(tmp_path: Path) -> None:
    lines = requests(60, max_tokens=24)
    source, log = write(tmp_path / "in.jsonl", lines), tmp_path / "server.log"
    with server(tmp_path / "data", log) as (client, process):
        file = client.files.create(file=source, purpose="batch")
        assert client.files.retrieve(file.id).bytes == source.stat().st_size
        batch = client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"name": "sums"}
        )
        deadline = time.monotonic() + TIMEOUT_S
        while (done := _completed(client, batch.id)) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert done < 60, "it was meant to be killed on its way"
    with server(tmp_path / "data", log) as (client, _):
        deadline = time.monotonic() + TIMEOUT_S
        while (batch := client.batches.retrieve(batch.id)).status != "completed":
            assert time.monotonic() < deadline, batch
            time.sleep(0.05)
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed) == (60, 60)
        assert batch.usage is not None
        assert batch.usage.output_tokens == 60 * 24
        assert batch.metadata == {"name": "sums"}
        assert batch.output_file_id is not None
        output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert [line["custom_id"] for line in output] == [line["custom_id"] for line in lines]
        online = client.chat.completions.create(model="mimir", **_openai_fields(lines[7]["body"]))
        content = output[7]["response"]["body"]["choices"][0]["message"]["content"]
        assert content == online.choices[0].message.content
        assert [found.id for found in client.batches.list()] == [batch.id]
        assert {found.id for found in client.files.list()} == {file.id, batch.output_file_id}
        assert client.files.delete(file.id).deleted
    assert "Traceback" not in log.read_text()


def _completed(client: OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed


def _openai_fields(body: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in body.items() if name != "ignore_eos"}
    return {**own, "extra_body": {"ignore_eos": body["ignore_eos"]}}


class TestCommand:
    FLAGS = ("--threads", "1", "--max-num-seqs", "8", "--num-blocks", "256", "--max-model-len", "512")

    def run(self, source: Path, target: Path) -> int:
        return cli.main(["batch", str(source), "-o", str(target), *self.FLAGS])

    def test_it_answers_a_file_and_goes_on_where_it_was_interrupted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = requests(6)
        source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
        lines[4]["body"]["temperature"] = 9
        write(source, lines)
        assert self.run(source, target) == 1, "one request has an error"
        first = target.read_text().splitlines()
        records = [json.loads(line) for line in first]
        assert [record["custom_id"] for record in records] == [f"r{number}" for number in range(6)]
        assert [record["response"]["status_code"] for record in records] == [200] * 4 + [400, 200]

        lines[4]["body"]["temperature"] = 0
        write(source, lines)
        target.write_text("\n".join([first[5], first[4], first[0], first[1][:50]]))  # killed while it wrote
        asked: list[str] = []
        call = executor.call

        async def counted(*args: Any, **options: Any) -> Any:
            asked.append(args[2]["messages"][1]["content"])
            return await call(*args, **options)

        monkeypatch.setattr(executor, "call", counted)
        assert self.run(source, target) == 0
        assert sorted(asked) == [f"What is {number} + 1?" for number in (1, 2, 3, 4)]
        again = target.read_text().splitlines()
        assert [json.loads(line)["custom_id"] for line in again] == [f"r{number}" for number in range(6)]
        assert (again[0], again[5]) == (first[0], first[5])

    def test_a_wrong_file_runs_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lines = requests(2)
        lines[1]["custom_id"] = "r0"
        source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
        assert self.run(source, target) == 2
        assert "line 2: custom_id is that of line 1" in capsys.readouterr().err
        assert not target.exists()
        source = write(tmp_path / "in.jsonl", requests(2))
        target.write_text('{"custom_id": "something else"}\n')
        assert self.run(source, target) == 2
        assert "is no result of this input" in capsys.readouterr().err
        assert target.read_text() == '{"custom_id": "something else"}\n'
        assert self.run(tmp_path / "none.jsonl", target) == 2
