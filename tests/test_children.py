"""A child process and its socket: answers in order, and an error for whoever waits when it ends or talks nonsense."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

import msgspec
import pytest

from engine import ipc
from engine.child_loop import answer_frames
from engine.children import Worker

MODULE = "tests.test_children"


class Say(msgspec.Struct, frozen=True, tag=True):
    text: str


class Said(msgspec.Struct, frozen=True, tag=True):
    text: str


async def started() -> Worker[Said]:
    worker: Worker[Said]
    worker, answer = await Worker.start(MODULE, Say("first"), Said)
    assert answer == Said("FIRST")
    return worker


async def test_frames_are_answered_in_order_and_of_any_size() -> None:
    worker = await started()
    try:
        for text in ("a", "b" * 3_000_000, "c"):
            assert await worker.ask(ipc.encode(Say(text))) == Said(text.upper())
    finally:
        await worker.kill()


async def test_whoever_waits_for_a_child_that_ends_is_told_and_so_is_whoever_asks_later() -> None:
    worker = await started()
    with pytest.raises(OSError, match="ended"):
        await worker.ask(ipc.encode(Say("exit")))
    with pytest.raises(OSError, match="ended"):
        await worker.ask(ipc.encode(Say("anybody?")))
    await worker.kill()


async def test_nonsense_is_an_error_of_the_protocol() -> None:
    worker = await started()
    with pytest.raises(ipc.ProtocolError):
        await worker.ask(ipc.encode(Say("nonsense")))
    await worker.kill()


def test_a_child_whose_parent_was_killed_leaves_without_a_word() -> None:
    ours, its = socket.socketpair()
    child = subprocess.Popen([sys.executable, "-m", MODULE], stdin=its, stdout=its, stderr=subprocess.PIPE)
    its.close()
    ours.sendall(ipc.encode(Say("first")))
    ours.recv(1)
    ours.close()  # with the rest of the answer unread: the child's next read fails
    _, error = child.communicate(timeout=30)
    assert (child.returncode, error) == (0, b"")


async def test_a_killed_child_is_gone_and_leaves_nobody_waiting() -> None:
    worker = await started()
    waiting = asyncio.create_task(worker.ask(ipc.encode(Say("hang"))))
    await asyncio.sleep(0.05)
    await worker.kill()
    with pytest.raises(OSError, match="ended"):
        await asyncio.wait_for(waiting, 5.0)


def _answer(question: Say) -> msgspec.Struct:
    match question.text:
        case "exit":
            sys.exit(0)
        case "nonsense":
            return Say("not an answer")
        case "hang":
            sys.stdin.buffer.read()
    return Said(question.text.upper())


if __name__ == "__main__":
    sys.exit(answer_frames(Say, _answer))
