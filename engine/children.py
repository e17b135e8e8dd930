"""How child processes are started: by exec, with our package importable and nothing else changed.

`Worker` is a child that answers one frame with one frame over its pipes, and can be killed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from engine import ipc

READ_BYTES = 1 << 18
START_TIMEOUT_S = 30.0

Answer = TypeVar("Answer")


def environment() -> dict[str, str]:
    """The parent's variables, with the folder of our packages first on the module path."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = root if not inherited else os.pathsep.join((root, inherited))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


class Worker(Generic[Answer]):
    """One child and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process, answer_type: Any) -> None:
        self._process = process
        self._answers: ipc.Decoder[Answer] = ipc.Decoder(answer_type)

    @classmethod
    async def start(cls, module: str, setup: msgspec.Struct, answer_type: Any) -> tuple[Worker[Answer], Answer]:
        """Runs `python -m module` and sends it `setup`: the child and its answer. Raises OSError and TimeoutError."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment(),
            start_new_session=True,  # an interrupt from the terminal is for the server, which then ends its children
        )
        worker = cls(process, answer_type)
        try:
            return worker, await asyncio.wait_for(worker.ask(ipc.encode(setup)), START_TIMEOUT_S)
        except BaseException:
            await worker.kill()
            raise

    async def ask(self, frame: bytes) -> Answer:
        """The answer to one frame. Raises IncompleteReadError or OSError when the child has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(frame)
        await self._process.stdin.drain()
        while True:
            data = await self._process.stdout.read(READ_BYTES)
            if not data:
                raise asyncio.IncompleteReadError(b"", None)
            for answer in self._answers.feed(data):
                return answer

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
