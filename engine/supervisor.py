"""Keeps one engine process running: starts it, watches it, restarts it with back-off, gives up on a crash loop.

Knows processes, sockets and messages; nothing about requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from engine import children, ipc
from engine.config import Config
from engine.conversation import Conversation

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "engine.process")
CONNECT_TIMEOUT_S = 60.0  # the interpreter starts and connects before it loads anything heavy
MIN_BACK_OFF_S, MAX_BACK_OFF_S = 1.0, 30.0
MAX_CRASHES, CRASH_WINDOW_S = 5, 600.0
WATCH_INTERVAL_S = 0.25
DUMP_S = 0.5  # for the stacks of a hanging process to be written
EXIT_S = 2.0  # from the end of the connection, or the order to stop, to the end of the process


class Listener(Protocol):
    """Told what happens; all methods run on the event loop."""

    def engine_starting(self, detail: str) -> None: ...

    def engine_progress(self, phase: ipc.Phase) -> None: ...

    def engine_ready(self, ready: ipc.Ready) -> None: ...

    def engine_message(self, message: ipc.Outputs | ipc.Rejected | ipc.ControlReply) -> None: ...

    def engine_lost(self) -> None:
        """The process ended or is about to be killed; no message of this one follows."""

    def engine_failed(self, message: str) -> None:
        """There will be no further start."""


class Supervisor:
    """Runs `command` again and again until stopped."""

    def __init__(self, config: Config, listener: Listener, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._config = config
        self._listener = listener
        self._command = tuple(command)
        self._process: asyncio.subprocess.Process | None = None
        self._connection: asyncio.Transport | None = None
        self._stopping = asyncio.Event()
        self._is_ready = False
        self._is_lost = False
        self._fatal: ipc.Fatal | None = None
        self._ended_because: str | None = None
        self._num_silent_checks = 0
        self._awake = asyncio.Event()
        self._awake.set()
        self._is_paused = False
        self.num_starts = 0
        self.num_resumes = 0
        self.last_heard_s = time.monotonic()  # when the engine last sent anything
        self._step_s = 0.0

    @property
    def pid(self) -> int | None:
        """The running engine process."""
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        """Returns after `stop`, or after telling the listener that it gave up."""
        crashes: deque[float] = deque(maxlen=MAX_CRASHES)
        detail = "the engine process starts"
        while not self._stopping.is_set():
            await self._awake.wait()
            if self._stopping.is_set():
                return
            self._listener.engine_starting(detail)
            try:
                reason = await self._run_once()
            except OSError as error:
                reason = f"it could not be started: {error.strerror}"
            if self._stopping.is_set():
                return
            if self._is_paused:
                self._is_paused = False
                detail = "the engine process starts"
                continue
            if self._fatal is not None and self._fatal.is_config:
                self._listener.engine_failed(self._fatal.message)
                return
            now = time.monotonic()
            crashes.append(now)
            num_recent = sum(1 for moment in crashes if now - moment <= CRASH_WINDOW_S)
            if num_recent >= MAX_CRASHES:
                minutes = f"{CRASH_WINDOW_S / 60:.0f} minutes"
                self._listener.engine_failed(f"the engine ended {num_recent} times within {minutes}; {reason}")
                return
            delay_s = min(MIN_BACK_OFF_S * 2 ** (num_recent - 1), MAX_BACK_OFF_S)
            logger.error("the engine ended: %s; next start in %g s", reason, delay_s)
            detail = f"the engine process restarts: {reason}"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)

    def send(self, message: msgspec.Struct) -> bool:
        """Queues a message; False when no engine is connected."""
        if self._connection is None or self._connection.is_closing():
            return False
        self._connection.write(ipc.encode(message))
        return True

    async def pause(self) -> None:
        """Ends the process, by force after a moment, and starts none until `resume`."""
        self._is_paused = True
        self._awake.clear()
        self.send(ipc.Shutdown())
        if self._process is not None:
            await _end(self._process)

    def resume(self) -> None:
        """Takes back a `pause`."""
        self.num_resumes += 1
        self._awake.set()

    async def stop(self) -> None:
        """Ends the process, by force after a moment. `run` returns after it."""
        self._stopping.set()
        self._awake.set()
        self.send(ipc.Shutdown())
        process = self._process
        if process is not None:
            await _end(process)

    async def _run_once(self) -> str:
        """One life of the process. Returns why it ended."""
        self._is_ready, self._is_lost, self._fatal, self._ended_because = False, False, None, None
        self._num_silent_checks, self._step_s = 0, 0.0
        self.num_starts += 1
        try:
            process, connection = await self._start()
            if connection is not None:
                await self._converse(connection)
            await _end(process)
            return self._reason(process)
        finally:
            if self._process is not None:
                await _end(self._process)
            self._process = None

    async def _start(self) -> tuple[asyncio.subprocess.Process, socket.socket | None]:
        """A new process and its connection, or None when it ended or did not connect."""
        folder = Path(tempfile.mkdtemp(prefix="kvasir-"))  # mode 0700
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
                path = folder / "engine.sock"
                listening.bind(str(path))
                listening.listen(1)
                listening.setblocking(False)
                process = self._process = await self._spawn(path)
                return process, await self._accept(listening, process)
        finally:
            shutil.rmtree(folder)

    async def _spawn(self, path: Path) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *self._command, "--socket", str(path), stdin=asyncio.subprocess.PIPE, env=children.environment()
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it ended at once; its exit code tells
            process.stdin.write(msgspec.json.encode(_without_secrets(self._config)))
            await process.stdin.drain()
            process.stdin.close()
        return process

    async def _accept(self, listening: socket.socket, process: asyncio.subprocess.Process) -> socket.socket | None:
        """The engine's connection, or None when the process ended or did not connect."""
        loop = asyncio.get_running_loop()
        accepting = asyncio.create_task(loop.sock_accept(listening))
        exiting = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({accepting, exiting}, timeout=CONNECT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                if not exiting.done():
                    self._ended_because = f"it did not connect within {CONNECT_TIMEOUT_S:g} s"
                return None
            connection: socket.socket = accepting.result()[0]
        finally:
            accepting.cancel()
            exiting.cancel()
        if ipc.peer_uid(connection) != os.getuid():
            self._ended_because = "a process of another user connected to its socket"
            connection.close()
            return None
        return connection

    async def _converse(self, connection: socket.socket) -> None:
        """Takes what comes until the connection ends."""
        decoder: ipc.Decoder[ipc.FromEngine] = ipc.Decoder(ipc.FromEngine)

        def take(data: bytes) -> None:
            self.last_heard_s = time.monotonic()
            self._num_silent_checks = 0
            for message in decoder.feed(data):
                self._dispatch(message)

        loop = asyncio.get_running_loop()
        self._connection, conversation = await loop.create_unix_connection(lambda: Conversation(take), sock=connection)
        watch = asyncio.create_task(self._watch())
        try:
            await conversation.ended
        except (ConnectionError, ipc.ProtocolError) as error:
            self._ended_because = self._ended_because or str(error)
        finally:
            watch.cancel()
            self._connection.close()
            self._connection = None
            self._lose()

    def _lose(self) -> None:
        """Tells the listener once per life."""
        if not self._is_lost:
            self._is_lost = True
            self._listener.engine_lost()

    def _dispatch(self, message: ipc.FromEngine) -> None:
        if self._is_lost:
            return  # declared dead: its requests have been dealt with
        match message:
            case ipc.Heartbeat():
                self._step_s = message.step_s
            case ipc.Phase():
                self._listener.engine_progress(message)
            case ipc.Ready():
                self._is_ready = True
                self._listener.engine_ready(message)
            case ipc.Fatal():
                self._fatal = message
            case _:
                self._listener.engine_message(message)

    async def _watch(self) -> None:
        """Kills an engine that is ready but neither finishes its step nor sends anything."""
        limit_s = self._config.runtime.hang_timeout_s
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            # counted in checks, not read from a clock: time in which this process itself stood still does not count
            self._num_silent_checks += 1
            is_silent = self._num_silent_checks * WATCH_INTERVAL_S > limit_s
            if self._is_ready and (is_silent or self._step_s > limit_s):
                what = "sent nothing" if is_silent else "did not finish a step"
                self._ended_because = f"it {what} for {limit_s:g} s"
                await self._kill_hanging()
                return

    async def _kill_hanging(self) -> None:
        assert self._process is not None
        logger.error("the engine hangs: %s; its stacks follow, then it is killed", self._ended_because)
        self._lose()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(DUMP_S)
            self._process.kill()

    def _reason(self, process: asyncio.subprocess.Process) -> str:
        if self._ended_because is not None:
            return self._ended_because
        code = process.returncode
        if self._fatal is not None:
            return self._fatal.message
        if code is not None and code < 0:
            return f"it was ended by signal {signal.Signals(-code).name}"
        return f"it exited with code {code}; the log says why"


async def _end(process: asyncio.subprocess.Process) -> None:
    """Waits for the process, kills it when it takes too long or when this is cancelled."""
    try:
        await asyncio.wait_for(process.wait(), EXIT_S)
    except TimeoutError:
        _kill(process)
        await process.wait()
    finally:
        _kill(process)


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def _without_secrets(config: Config) -> Config:
    """The engine needs no keys."""
    server = dataclasses.replace(config.server, api_keys=(), api_key_file=None, admin_api_keys=())
    return dataclasses.replace(config, server=server)
