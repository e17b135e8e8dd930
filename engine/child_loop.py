"""The child's end of `children.Worker`: frames from standard input are answered on standard output until input ends.

Apart from `children`, so that a child does not load asyncio. Knows nothing of what the messages mean.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from engine import ipc

READ_BYTES = 1 << 18

Question = TypeVar("Question")


def answer_frames(question_type: Any, answer: Callable[[Question], msgspec.Struct]) -> int:
    """The child's main loop; `question_type` is the union of what may come. Returns the exit code.

    Files that the child makes are its owner's alone, and it leaves no core file: prompts may be in its memory.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    questions: ipc.Decoder[Question] = ipc.Decoder(question_type)
    while data := _read():
        for question in questions.feed(data):
            frame = ipc.encode(answer(question))
            try:
                _write(frame)
            except BrokenPipeError:  # the front end is gone, and nobody waits for this
                return 0
    return 0


def _read() -> bytes:
    """What has come; nothing when the front end is gone, also where it was killed and its end of a socket reset."""
    try:
        return os.read(sys.stdin.fileno(), READ_BYTES)
    except ConnectionResetError:
        return b""


def _write(frame: bytes) -> None:
    view = memoryview(frame)
    while view:
        view = view[os.write(sys.stdout.fileno(), view) :]
