"""Runs the server process: binds the port, serves, drains on a signal, and says with which code to exit."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import uvicorn
import uvloop

from engine.config import Config
from engine.config_load import describe
from engine.errors import ConfigError, EngineDead, NotReady
from engine.launch import resolve_model_path
from engine.version import __version__
from server.app import create_app, make_context, metrics_app
from server.auth import is_loopback
from server.context import ServerContext
from server.engine_api import Engine
from server.http_protocol import protocol_class

logger = logging.getLogger(__name__)

ABORT_GRACE_S = 1.0  # for error answers to be sent after the running requests were ended
CLOSE_GRACE_S = 2  # for connections to close after that
FORCED_EXIT_S = 1.8  # after a second signal
FORCED_EXIT_CODE = 1


def run(config: Config) -> int:
    """Serves until a signal. Returns the exit code; raises ConfigError when the server cannot start."""
    return run_loop(serve(config))


def run_loop(main: Coroutine[Any, Any, int]) -> int:
    """Runs the program in a new event loop: uvloop's, which takes a quarter off what a streamed token costs."""
    return uvloop.run(main)


async def serve(config: Config) -> int:
    """As `run`, in a running event loop."""
    from engine.client import AsyncEngine

    resolve_model_path(config.model.model)  # a wrong path is told at once, before a port is opened
    return await prepare(AsyncEngine(config), config).serve_to_end()


def prepare(engine: Engine, config: Config) -> DrainingServer:
    """A server that holds its port already. Raises ConfigError."""
    check_exposure(config)
    context = make_context(engine, config)
    app = create_app(engine, config, context)
    listener = bind(config.server.host, config.server.port)
    host, port = listener.getsockname()[:2]
    context.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return DrainingServer(_uvicorn_config(app, config), context, listener)


class DrainingServer(uvicorn.Server):
    """First signal: refuse new work, let the running finish for a while, exit 0. Second: exit at once.

    An engine that is dead for good ends the server with code 1, so that an orchestrator sees it.
    """

    def __init__(self, config: uvicorn.Config, context: ServerContext, listener: socket.socket) -> None:
        super().__init__(config)
        self.context = context
        self._listener = listener
        self._ending: asyncio.Task[None] | None = None
        self.exit_code = 0
        self.is_forced = False

    async def serve_to_end(self) -> int:
        """Returns the exit code. Raises ConfigError when the engine could not be started at all."""
        engine = self.context.engine
        async with _metrics_server(self.context):
            settings = " ".join(f"{name}={value!r}" for name, value in describe(self.context.config).items())
            logger.info("kvasir %s: %s", __version__, settings)
            logger.info("listening on %s; /readyz tells when the model is loaded", self.context.url)
            gc.collect()
            gc.freeze()  # what is loaded now lives as long as the process: no collection need look at it
            await self.serve(sockets=[self._listener])
        if self.is_forced:
            # uvicorn skips the end of the lifespan then, which stops the engine
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FORCED_EXIT_S / 2):
                    await self.lifespan.shutdown()
        if engine.state.phase == "dead" and engine.info is None:
            raise ConfigError(engine.state.detail or "the engine could not be started")
        return self.exit_code

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.on_signal)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def on_tick(self, counter: int) -> bool:
        engine = self.context.engine
        if engine.state.phase == "dead" and self.exit_code == 0:
            self.exit_code = 1
            if engine.info is not None:  # one that never ran is the ConfigError of `serve_to_end`
                logger.critical("the engine has stopped for good: %s", engine.state.detail)
            self._end_with(EngineDead("the engine has stopped and will not be restarted"), drain_s=0.0)
        return await super().on_tick(counter)

    def on_signal(self) -> None:
        if self._ending is None:
            drain_s = self.context.config.server.drain_timeout_s
            logger.info(
                "draining: %d requests have up to %g seconds; a second signal ends them at once",
                self.context.gate.num_in_flight,
                drain_s,
            )
            reason = NotReady("the server is shutting down; send this to another one", code="draining")
            self._end_with(reason, drain_s)
            return
        logger.warning("second signal: exiting now")
        self.is_forced = self.force_exit = self.should_exit = True
        self.exit_code = FORCED_EXIT_CODE
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        last_resort = threading.Timer(FORCED_EXIT_S, os._exit, (FORCED_EXIT_CODE,))
        last_resort.daemon = True
        last_resort.start()

    def _end_with(self, reason: Exception, drain_s: float) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(reason, drain_s))

    async def _end(self, reason: Exception, drain_s: float) -> None:
        gate = self.context.gate
        if not await gate.drain(drain_s):
            logger.warning("ending %d requests that are still running", gate.num_in_flight)
            await gate.abort_all(reason, ABORT_GRACE_S)
        self.should_exit = True


def check_exposure(config: Config) -> None:
    """Raises ConfigError for a public address without keys, and for injected faults on a public address."""
    server = config.server
    if is_loopback(server.host):
        return
    if not (server.api_keys or server.api_key_file or server.allow_unauthenticated):
        raise ConfigError(
            f"host {server.host!r} can be reached by others and no API key is set; give --api-keys or "
            "--api-key-file, or say --allow-unauthenticated"
        )
    if config.runtime.faults:
        raise ConfigError(f"faults are injected on loopback only, not on host {server.host!r}")


def bind(host: str, port: int, *, flag: str = "--port") -> socket.socket:
    """A socket that holds the port, which `flag` sets. Raises ConfigError with the remedy."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must be at least 0 and at most 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"cannot resolve host {host!r}: {error.strerror}; choose another with --host") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on port {port} of {host!r}: {error.strerror}; stop what uses it, or choose another with "
            f"{flag}"
        ) from None
    listener.setblocking(False)
    return listener


def _uvicorn_config(app: object, config: Config) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=protocol_class(config.limits),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=config.server.root_path.rstrip("/"),
        timeout_keep_alive=config.server.keep_alive_s,
        timeout_graceful_shutdown=CLOSE_GRACE_S,
        h11_max_incomplete_event_size=config.limits.max_header_bytes,
    )


@contextlib.asynccontextmanager
async def _metrics_server(context: ServerContext) -> AsyncIterator[None]:
    """/metrics on a loopback port of its own, when one is configured."""
    port = context.config.server.metrics_port
    if port is None:
        yield
        return
    listener = bind("127.0.0.1", port, flag="--metrics-port")
    config = uvicorn.Config(
        metrics_app(context), ws="none", lifespan="off", log_config=None, log_level="warning", access_log=False
    )
    server = _QuietServer(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await task


class _QuietServer(uvicorn.Server):
    """Leaves the signals to the server that matters."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
