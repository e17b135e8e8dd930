"""The engine process on its own: start, failure to start, long steps, the end of its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from engine import children, ipc
from engine.config import Config, RuntimeConfig
from engine.types import EngineRequest, SamplingParams

TIMEOUT_S = 20.0


class Parent:
    """A front end reduced to its socket."""

    def __init__(self, config: Config, **environment: str) -> None:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            path = str(Path(folder) / "s")
            listening.bind(path)
            listening.listen(1)
            listening.settimeout(TIMEOUT_S)
            with (Path(folder) / "config").open("w+b") as config_file:
                config_file.write(msgspec.json.encode(config))
                config_file.seek(0)
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "tests.fake_engine_process", "--socket", path],
                    stdin=config_file,
                    stderr=subprocess.PIPE,
                    env={**children.environment(), **environment},
                )
            self.connection, _ = listening.accept()
        self.connection.settimeout(TIMEOUT_S)
        self._decoder: ipc.Decoder[ipc.FromEngine] = ipc.Decoder(ipc.FromEngine)
        self._messages: list[ipc.FromEngine] = []

    def send(self, message: msgspec.Struct) -> None:
        self.connection.sendall(ipc.encode(message))

    def until(self, is_wanted: Callable[[ipc.FromEngine], bool]) -> list[ipc.FromEngine]:
        """All messages up to the first that is wanted."""
        seen = []
        while True:
            while self._messages:
                seen.append(self._messages.pop(0))
                if is_wanted(seen[-1]):
                    return seen
            data = self.connection.recv(1 << 16)
            assert data, f"the engine closed the connection after {seen}"
            self._messages += self._decoder.feed(data)

    def end(self) -> bytes:
        """Standard error of the process, which must end by itself."""
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        return errors

    def close(self) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        if self.process.stderr is not None and not self.process.stderr.closed:
            self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Parent]]:
    parents: list[Parent] = []

    def begin(runtime: RuntimeConfig | None = None, **environment: str) -> Parent:
        config = Config(runtime=runtime or RuntimeConfig(heartbeat_s=0.05))
        parents.append(Parent(config, **environment))
        return parents[-1]

    yield begin
    for parent in parents:
        parent.close()


def is_ready(message: ipc.FromEngine) -> bool:
    return isinstance(message, ipc.Ready)


def add(request_id: str, **sampling: object) -> ipc.AddRequest:
    params = msgspec.convert({"max_tokens": 3, "ignore_eos": True, **sampling}, SamplingParams)
    return ipc.AddRequest(EngineRequest(request_id=request_id, prompt_token_ids=[5, 6], sampling=params))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_leave_the_end_to_the_front_end(
    start: Callable[..., Parent], number: signal.Signals
) -> None:
    parent = start(KVASIR_FAKE_STEP_S="0.02")
    parent.until(is_ready)
    parent.send(add("a", max_tokens=10))
    parent.until(lambda m: isinstance(m, ipc.Outputs) and bool(m.outputs))
    parent.process.send_signal(number)
    seen = parent.until(lambda m: isinstance(m, ipc.Outputs) and any(o.finish_reason for o in m.outputs))
    assert isinstance(seen[-1], ipc.Outputs)
    assert seen[-1].outputs[-1].finish_reason == "length"


def test_what_an_aborted_request_held_is_free_within_two_steps(start: Callable[..., Parent]) -> None:
    """Counted in reports, one a step: the step in flight when the abort arrives, and the next."""
    parent = start(RuntimeConfig(heartbeat_s=0.01), KVASIR_FAKE_STEP_S="0.05")
    parent.until(is_ready)
    parent.send(add("stays", max_tokens=400))
    parent.send(add("goes", max_tokens=400))
    *_, running = parent.until(lambda m: isinstance(m, ipc.Outputs) and bool(m.stats) and m.stats.num_running == 2)
    assert isinstance(running, ipc.Outputs)
    assert running.stats is not None
    parent.send(ipc.Abort("goes", None))
    reports: list[ipc.Outputs] = []
    while len(reports) < 2:
        reports += [m for m in parent.until(lambda m: isinstance(m, ipc.Outputs)) if isinstance(m, ipc.Outputs)]
    after = reports[-1].stats
    assert after is not None
    assert after.num_running == 1
    assert after.blocks_active <= running.stats.blocks_active // 2 + 1


def test_tells_its_phases_then_serves_then_rests(start: Callable[..., Parent]) -> None:
    parent = start()
    phases = [message for message in parent.until(is_ready) if isinstance(message, ipc.Phase)]
    assert [phase.phase for phase in phases] == ["loading", "loading", "warming"]
    assert psutil.Process(parent.process.pid).name() == "kvasir-engine"
    parent.send(add("a"))
    seen = parent.until(lambda m: isinstance(m, ipc.Outputs) and any(o.finish_reason for o in m.outputs))
    outputs = [output for message in seen if isinstance(message, ipc.Outputs) for output in message.outputs]
    assert sum(len(output.token_ids) for output in outputs) == 3
    last = seen[-1]
    assert isinstance(last, ipc.Outputs)
    assert last.num_received == 1
    assert last.stats is not None, "becoming idle is reported at once"
    assert last.stats.num_running == 0

    process = psutil.Process(parent.process.pid)
    before = process.cpu_times()
    time.sleep(0.5)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.1, "idle costs nothing but heartbeats"
    parent.send(ipc.Shutdown())
    assert parent.end() == b""
    assert parent.process.returncode == 0


def test_a_setting_that_cannot_be_honoured_is_told_to_the_front_end_alone(start: Callable[..., Parent]) -> None:
    parent = start(KVASIR_FAKE_LOAD="config_error")
    fatal = parent.until(lambda m: isinstance(m, ipc.Fatal))[-1]
    assert fatal == ipc.Fatal("the weights need 9 MiB and 1 MiB is free; choose a smaller model", is_config=True)
    assert parent.end() == b"", "the front end tells it, in one line"
    assert parent.process.returncode == 2


def test_a_bug_while_loading_ends_the_process_with_a_traceback(start: Callable[..., Parent]) -> None:
    parent = start(KVASIR_FAKE_LOAD="crash")
    errors = parent.end().decode()
    assert "RuntimeError: a bug while loading" in errors
    assert parent.process.returncode == 1


def test_refuses_what_the_core_refuses_and_goes_on(start: Callable[..., Parent]) -> None:
    parent = start()
    parent.until(is_ready)
    request = EngineRequest(request_id="long", prompt_token_ids=[5] * 4000, sampling=SamplingParams())
    parent.send(ipc.AddRequest(request))
    rejected = parent.until(lambda m: isinstance(m, ipc.Rejected))[-1]
    assert isinstance(rejected, ipc.Rejected)
    assert (rejected.request_id, rejected.code) == ("long", "context_length_exceeded")
    parent.send(add("a"))
    parent.until(lambda m: isinstance(m, ipc.Outputs) and any(o.finish_reason for o in m.outputs))


def test_heartbeats_tell_a_long_step_from_a_short_one(start: Callable[..., Parent]) -> None:
    parent = start(KVASIR_FAKE_STEP_S="0.6")
    parent.until(is_ready)
    parent.send(add("a", max_tokens=1))
    long = parent.until(lambda m: isinstance(m, ipc.Heartbeat) and m.step_s > 0.3)[-1]
    assert isinstance(long, ipc.Heartbeat)
    assert long.num_steps == 0
    parent.until(lambda m: isinstance(m, ipc.Heartbeat) and m.num_steps == 1 and m.step_s == 0)


@pytest.mark.parametrize("step_s", ["0", "60"])
def test_leaves_when_its_parent_is_gone_even_in_the_middle_of_a_step(start: Callable[..., Parent], step_s: str) -> None:
    parent = start(KVASIR_FAKE_STEP_S=step_s)
    parent.until(is_ready)
    if step_s != "0":
        parent.send(add("a"))
        parent.until(lambda m: isinstance(m, ipc.Heartbeat) and m.step_s > 0)
    parent.connection.close()
    started = time.monotonic()
    parent.end()
    assert time.monotonic() - started < 5.0


def test_survives_an_interrupt_from_the_terminal_and_dumps_stacks_on_request(start: Callable[..., Parent]) -> None:
    parent = start()
    parent.until(is_ready)
    os.kill(parent.process.pid, signal.SIGINT)
    os.kill(parent.process.pid, signal.SIGUSR1)
    parent.send(add("a"))
    parent.until(lambda m: isinstance(m, ipc.Outputs) and any(o.finish_reason for o in m.outputs))
    parent.send(ipc.Shutdown())
    assert b"most recent call first" in parent.end()


def test_a_malformed_frame_ends_the_process(start: Callable[..., Parent]) -> None:
    parent = start()
    parent.until(is_ready)
    parent.connection.sendall(b"\xff" * 64)
    assert b"malformed" in parent.end()
