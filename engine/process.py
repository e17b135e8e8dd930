"""The engine process: config from standard input, then load, then step until told to stop or the parent is gone.

Started as `python -m engine.process --socket PATH` by `supervisor`. Knows the core, not the scheduler or the model.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from engine import ipc, logs
from engine.config import Config
from engine.errors import CapacityError, ConfigError, KvasirError
from engine.faults import Faults
from engine.hardening import forbid_pickle
from engine.types import ModelInfo, TokenOutput

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.launch import Progress

    Build = Callable[[Config, Progress], tuple[EngineCore, ModelInfo]]

logger = logging.getLogger("engine.process")

CONFIG_EXIT_CODE = 2
SEND_BUFFER_BYTES = 4 * 1024 * 1024
READ_BYTES = 1 << 18
ORPHAN_EXIT_S = 3.0  # a step that takes longer is cut short when the parent is gone
SET_NAME = 15  # prctl


def main(argv: Sequence[str] | None = None, build: Build | None = None) -> int:
    """Runs the process; returns its exit code. `build` replaces `launch.build_core` in tests."""
    parser = argparse.ArgumentParser(prog="engine.process")
    parser.add_argument("--socket", required=True, help="Unix socket of the front end")
    arguments = parser.parse_args(argv)
    os.umask(0o077)
    _name_process("kvasir-engine")
    # A terminal interrupts the whole process group and a service manager ends it: the front end hears it too, lets the
    # running requests finish, and then tells this process to stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=Config)
    logs.setup(config.server.log_level, config.server.log_format)
    link = _Link(arguments.socket)
    inbox = _Inbox(link.connection)
    pulse = _Pulse(link, config.runtime.heartbeat_s)
    try:
        core, info = _load(config, link, build)
        gc.collect()
        gc.freeze()  # what is loaded now lives as long as the process
        forbid_pickle()
        link.send(ipc.Ready(info))
        _EngineLoop(core, link, inbox, pulse, config).run()
    except ConfigError as error:  # told to the user by the front end, once
        link.send(ipc.Fatal(str(error), is_config=True))
        return CONFIG_EXIT_CODE
    except BrokenPipeError:  # the front end is gone
        return 0
    except Exception:
        logger.exception("the engine stops: a step or loading failed")
        return 1
    finally:
        pulse.stop()
        link.close()
    return 0


def _load(config: Config, link: _Link, build: Build | None) -> tuple[EngineCore, ModelInfo]:
    link.send(ipc.Phase("loading", "libraries", 0.0))
    if build is None:
        from engine.launch import build_core

        build = build_core
    return build(config, lambda phase, detail, share: link.send(ipc.Phase(phase, detail, share)))


def _name_process(name: str) -> None:
    """The name that ps and top show."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: only the name is missing
        ctypes.CDLL(None).prctl(SET_NAME, name.encode(), 0, 0, 0)


class _Link:
    """The sending side of the socket, shared by the step loop and the heartbeat."""

    def __init__(self, path: str) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.connection.connect(path)
        if ipc.peer_uid(self.connection) != os.getuid():
            raise ConfigError("the engine's socket belongs to another user; check the temporary folder")
        self._lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Raises BrokenPipeError when the front end is gone."""
        frame = ipc.encode(message)
        with self._lock:
            try:
                self.connection.sendall(frame)
            except OSError as error:
                raise BrokenPipeError("the front end closed the connection") from error

    def close(self) -> None:
        self.connection.close()


class _Inbox:
    """Messages from the front end, read by a thread so that they wait decoded when a step ends."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[ipc.ToEngine] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self, *, is_blocking: bool) -> Iterator[ipc.ToEngine]:
        """Everything that waits; with is_blocking, sleeps until there is something."""
        if is_blocking:
            yield self._messages.get()
        while not self._messages.empty():
            yield self._messages.get()

    def _read(self) -> None:
        decoder: ipc.Decoder[ipc.ToEngine] = ipc.Decoder(ipc.ToEngine)
        try:
            while data := self._connection.recv(READ_BYTES):
                for message in decoder.feed(data):
                    self._messages.put(message)
        except OSError:
            logger.info("the connection to the front end broke")
        except ipc.ProtocolError:
            logger.exception("the front end sent a malformed frame")
        # The front end is gone, and nobody waits for results: leave after this step, or in the middle of a long one.
        self._messages.put(ipc.Shutdown())
        time.sleep(ORPHAN_EXIT_S)
        os._exit(0)


class _Pulse:
    """Heartbeats from a thread, so that the front end can tell a long step from a hanging one."""

    def __init__(self, link: _Link, interval_s: float) -> None:
        self._link = link
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._num_steps = 0
        self._is_stepping = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def begin_step(self) -> None:
        self._is_stepping = True

    def end_step(self) -> None:
        self._num_steps += 1
        self._is_stepping = False

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        step_s = 0.0
        seen = 0
        while not self._stopped.wait(self._interval_s):
            # Counted in own beats, not read from a clock: time in which the whole process was suspended is no hang.
            step_s = step_s + self._interval_s if self._is_stepping and self._num_steps == seen else 0.0
            seen = self._num_steps
            try:
                self._link.send(ipc.Heartbeat(self._num_steps, step_s))
            except BrokenPipeError:  # the inbox thread sees it too, and ends the process
                return


class _EngineLoop:
    """Messages in, step, outputs out."""

    def __init__(self, core: EngineCore, link: _Link, inbox: _Inbox, pulse: _Pulse, config: Config) -> None:
        self._core = core
        self._link = link
        self._inbox = inbox
        self._pulse = pulse
        self._stats_interval_s = config.runtime.heartbeat_s
        self._faults = Faults.parse(config.runtime.faults)
        self._num_received = 0
        self._num_steps = 0
        self._stats_sent_at = 0.0
        self._is_idle_reported = False

    def run(self) -> None:
        """Returns when told to shut down."""
        while True:
            is_idle = not self._core.has_work
            if is_idle and not self._is_idle_reported:
                self._report([], is_idle=True)
            for message in self._inbox.take(is_blocking=is_idle):
                if isinstance(message, ipc.Shutdown):
                    return
                self._receive(message)
            self._is_idle_reported = False
            if self._core.has_work:
                self._step()

    def _step(self) -> None:
        self._num_steps += 1
        _inject(self._faults, self._num_steps)
        self._pulse.begin_step()
        self._faults.check("forward_raise", step=self._num_steps)
        if self._faults.fires("forward_sleep", step=self._num_steps):
            threading.Event().wait()
        outputs = self._core.advance()
        self._pulse.end_step()
        self._report(outputs, is_idle=not self._core.has_work)

    def _report(self, outputs: list[TokenOutput], *, is_idle: bool) -> None:
        now = time.monotonic()
        is_due = is_idle or now - self._stats_sent_at >= self._stats_interval_s
        if is_due:
            self._stats_sent_at = now
        self._is_idle_reported = is_idle
        started, self._core.started = self._core.started, []
        if outputs or is_due or started:
            stats = self._core.stats() if is_due else None
            self._link.send(ipc.Outputs(outputs, stats, self._num_received, started))

    def _receive(self, message: ipc.ToEngine) -> None:
        if isinstance(message, ipc.AddRequest):
            self._num_received += 1
            self._add(message)
        elif isinstance(message, ipc.Abort):
            self._core.abort(message.request_id, message.choice)
        elif isinstance(message, ipc.Control):
            self._link.send(self._core.controls.answer(message))

    def _add(self, message: ipc.AddRequest) -> None:
        request = message.request
        try:
            self._core.add(request)
        except KvasirError as error:
            retry_after_s = error.retry_after_s if isinstance(error, CapacityError) else 1
            code = getattr(error, "code", "internal_error")
            param = getattr(error, "param", None)
            self._link.send(ipc.Rejected(request.request_id, code, str(error), retry_after_s, param))
        except Exception:  # one request's fault must not end the others
            logger.exception("request %s could not be added", request.request_id)
            message_text = "the engine could not take the request"
            self._link.send(ipc.Rejected(request.request_id, "internal_error", message_text))


def _inject(faults: Faults, step: int) -> None:
    if faults.fires("engine_kill", step=step):
        os.kill(os.getpid(), signal.SIGKILL)
    if faults.fires("engine_stop", step=step):
        os.kill(os.getpid(), signal.SIGSTOP)
    if faults.fires("engine_exit0", step=step):
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
