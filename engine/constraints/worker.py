"""Child process that compiles constraints: one frame in, one frame out, until its input ends.

A process of its own because only that can be stopped: a grammar may take too long, or too much memory.
Started as `python -m engine.constraints.worker` by `compiler`.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from typing import Any

import msgspec

from engine.child_loop import answer_frames
from engine.constraints.grammar import compile_constraint
from engine.constraints.limits import ConstraintLimits
from engine.constraints.vocabulary import Vocabulary
from engine.errors import ConfigError, RequestError
from engine.types import Constraint

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


class Worker:
    """What the process knows between frames: the vocabulary, once it is set up."""

    def __init__(self) -> None:
        self._vocabulary: Vocabulary | None = None
        self._setup: Setup | None = None

    def answer(self, message: Setup | Compile) -> Compiled | Failed:
        if isinstance(message, Setup):
            self._setup = message
            self._vocabulary, answer = _set_up(message)
            return answer
        if self._vocabulary is None or self._setup is None:
            return Failed(NO_VOCABULARY, "no vocabulary was set up")
        # SIGPROF, which nothing handles, ends the process: the time is its own, however busy the machine is
        signal.setitimer(signal.ITIMER_PROF, self._setup.max_cpu_s)
        try:
            return _compile(message.constraint, self._vocabulary, self._setup.limits)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)


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


if __name__ == "__main__":
    sys.exit(answer_frames(Setup | Compile, Worker().answer))
