"""How child processes are started: by exec, with our package importable and nothing else changed.

`Worker` is a child that answers one frame with one frame (`child_loop` is its end of it), and can be killed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from engine import ipc
from engine.conversation import Conversation

START_TIMEOUT_S = 30.0

Answer = TypeVar("Answer")


def environment() -> dict[str, str]:
    """The parent's variables, with the folder of our packages first on the module path."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = root if not inherited else os.pathsep.join((root, inherited))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


class Worker(Generic[Answer]):
    """One child and the socket that is its input and output."""

    def __init__(self, process: asyncio.subprocess.Process, answer_type: Any) -> None:
        self._process = process
        self._answers: ipc.Decoder[Answer] = ipc.Decoder(answer_type)
        self._socket: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._is_over = False

    @classmethod
    async def start(cls, module: str, setup: msgspec.Struct, answer_type: Any) -> tuple[Worker[Answer], Answer]:
        """Runs `python -m module` and sends it `setup`: the child and its answer. Raises OSError and TimeoutError."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    module,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    env=environment(),
                    start_new_session=True,  # a terminal's interrupt is for the server, which then ends its children
                )
        except BaseException:
            ours.close()
            raise
        worker = cls(process, answer_type)
        try:
            await worker._connect(ours)
            async with asyncio.timeout(START_TIMEOUT_S):
                return worker, await worker.ask(ipc.encode(setup))
        except BaseException:
            await worker.kill()
            raise

    async def ask(self, frame: bytes) -> Answer:
        """The answer to one frame. Raises OSError when the child has ended, ProtocolError when it talks nonsense."""
        assert self._socket is not None
        if self._is_over:
            raise ConnectionResetError("the child process has ended")
        self._waiting = asyncio.get_running_loop().create_future()
        self._socket.write(frame)
        return await self._waiting

    async def kill(self) -> None:
        if self._socket is not None:
            self._socket.abort()
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _connect(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._socket, conversation = await loop.create_unix_connection(
                lambda: Conversation(self._take), sock=connection
            )
        except BaseException:
            connection.close()
            raise
        conversation.ended.add_done_callback(self._ended)

    def _take(self, data: bytes) -> None:
        for answer in self._answers.feed(data):
            if self._waiting is not None and not self._waiting.done():
                self._waiting.set_result(answer)

    def _ended(self, ended: asyncio.Future[None]) -> None:
        self._is_over = True
        error = ended.exception() or ConnectionResetError("the child process has ended")
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)
