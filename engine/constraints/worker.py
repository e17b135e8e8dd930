"""Child process that compiles constraints: one frame in, one frame out, until its input ends.

A process of its own because only that can be stopped: a grammar may take too long, or too much memory.
Started as `python -m engine.constraints.worker` by `compiler`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from typing import Any

import msgspec

from engine import ipc
from engine.constraints.grammar import compile_constraint
from engine.constraints.limits import ConstraintLimits
from engine.constraints.vocabulary import Vocabulary
from engine.errors import ConfigError, RequestError
from engine.types import Constraint

READ_BYTES = 1 << 18
STATUS_FILE = "/proc/self/statm"


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first message. `max_memory_bytes` is what compiling may need beyond the vocabulary.

    A constraint that takes more than `max_cpu_s` of processor time ends the process.
    """

    definition: dict[str, Any]
    eos_token_ids: list[int]
    limits: ConstraintLimits
    max_memory_bytes: int
    max_cpu_s: float


class Compile(msgspec.Struct, frozen=True, tag=True):
    constraint: Constraint


class Compiled(msgspec.Struct, frozen=True, tag=True):
    grammar: str = ""
    seconds: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`code` as in engine.errors, or NO_VOCABULARY."""

    code: str
    message: str


# no vocabulary, so no constraint will work
NO_VOCABULARY = "no_vocabulary"


def main() -> int:
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    messages: ipc.Decoder[Setup | Compile] = ipc.Decoder(Setup | Compile)
    vocabulary: Vocabulary | None = None
    setup: Setup | None = None
    while data := os.read(sys.stdin.fileno(), READ_BYTES):
        for message in messages.feed(data):
            if isinstance(message, Setup):
                setup = message
                vocabulary, answer = _set_up(setup)
            elif vocabulary is None or setup is None:
                answer = Failed(NO_VOCABULARY, "no vocabulary was set up")
            else:
                # SIGPROF, which nothing handles, ends the process: the time is its own, however busy the machine is
                signal.setitimer(signal.ITIMER_PROF, setup.max_cpu_s)
                answer = _compile(message.constraint, vocabulary, setup.limits)
                signal.setitimer(signal.ITIMER_PROF, 0.0)
            try:
                _write(ipc.encode(answer))
            except BrokenPipeError:  # the front end is gone, and nobody waits for this
                return 0
    return 0


def _set_up(setup: Setup) -> tuple[Vocabulary | None, Compiled | Failed]:
    try:
        vocabulary = Vocabulary(setup.definition, setup.eos_token_ids)
    except ConfigError as error:
        return None, Failed(NO_VOCABULARY, str(error))
    limit = _address_space() + setup.max_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return vocabulary, Compiled()


def _compile(constraint: Constraint, vocabulary: Vocabulary, limits: ConstraintLimits) -> Compiled | Failed:
    started = time.perf_counter()
    try:
        grammar = compile_constraint(constraint, vocabulary, limits)
    except RequestError as error:
        return Failed(error.code, str(error))
    return Compiled(grammar, time.perf_counter() - started)


def _address_space() -> int:
    """Bytes that are mapped now."""
    with open(STATUS_FILE, encoding="ascii") as file:  # noqa: PTH123 - a read of procfs, not of a path
        return int(file.read().split()[0]) * resource.getpagesize()


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sys.stdout.fileno(), view) :]


if __name__ == "__main__":
    sys.exit(main())
