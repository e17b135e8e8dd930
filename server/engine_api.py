"""What the server needs of an engine. `engine.client.AsyncEngine` has it, and so has the fake one of the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from engine.types import (
    AdapterInfo,
    ChatPrompt,
    Constraint,
    EngineStats,
    GenerationRequest,
    ModelInfo,
    PooledOutput,
    PoolingRequest,
    TextOutput,
)


class EngineState(Protocol):
    """Where the engine is in its life. "dead" is final: the engine will not be started again."""

    @property
    def phase(self) -> str:
        """starting, loading, warming, ready, draining, sleeping or dead."""

    @property
    def detail(self) -> str:
        """A few words for people, for instance how much of the weights is loaded."""

    @property
    def is_ready(self) -> bool:
        """True while the model is loaded and the engine has shown life recently."""


class Stream(Protocol):
    """One running request. Nobody waits for its reader; what is not taken is merged per choice when it is."""

    @property
    def unsent_bytes(self) -> int:
        """About how many bytes wait to be taken."""

    @property
    def is_started(self) -> bool:
        """The engine has begun to compute it: it waits no more."""

    @property
    def is_done(self) -> bool:
        """Nothing more will come; something may still wait to be taken."""

    def take(self) -> TextOutput | None:
        """The next piece that is there already, or None. Raises what ended the request early, after the last piece."""

    def close(self) -> None:
        """The reader is gone: aborts what still runs. Must be called in the end; repeating is harmless."""


class OutputFormat(Protocol):
    """How the model writes tool calls and thinking."""

    @property
    def tool_parser(self) -> str:
        """The parser's name; "none" when the model does not call."""

    def call_constraint(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        must_call: bool,
        is_parallel: bool,
        answer: dict[str, Any] | None,
    ) -> tuple[Constraint, str]:
        """What makes calls follow their schemas, and the name of the parser that reads them.

        answer   the form of an output without calls, as a format of a structural tag; None: any text
        """


class Engine(Protocol):
    """Text in, text out, asynchronously."""

    on_stats: Callable[[EngineStats], None] | None  # called with every report of the core
    on_constraint: Callable[[str, str, float], None] | None  # called with kind, outcome and seconds of a constraint
    on_timing: Callable[[str, float], None] | None  # called with "tokenize" or "detokenize", and seconds

    @property
    def state(self) -> EngineState: ...

    @property
    def info(self) -> ModelInfo | None:
        """None until the engine was ready for the first time."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """Served names, the first is the one that answers carry."""

    @property
    def num_restarts(self) -> int:
        """Starts of the engine process after the first."""

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine process last sent anything; small also while it is idle."""

    async def start(self) -> None:
        """Starts the engine in the background and returns at once."""

    async def stop(self, drain_s: float) -> None: ...

    async def sleep(self, *, is_patient: bool, timeout_s: float) -> None:
        """Gives back weights and cache; running requests may finish first, for at most timeout_s, or end with errors.

        Then `state.phase` is "sleeping", and requests are refused. Raises NotReady.
        """

    async def wake_up(self) -> None:
        """Comes back from `sleep`, and returns when ready. Raises ConfigError, NotReady."""

    async def open(self, request: GenerationRequest, notify: Callable[[], None]) -> Stream:
        """Starts a request; `notify` is called whenever there is something to take, or nothing more will come.

        Raises RequestError or CapacityError; taking raises EngineError, or one of those when the core refuses.
        """

    async def pool(self, request: PoolingRequest) -> PooledOutput:
        """The embedding or scores of one prompt. Raises RequestError, CapacityError and EngineError."""

    async def tokenize(self, prompt: str | ChatPrompt, *, add_special_tokens: bool = True) -> list[int]: ...

    async def detokenize(self, token_ids: list[int]) -> str: ...

    async def infill(
        self, prefix: str | list[int], suffix: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> tuple[list[int], tuple[int, ...]]:
        """A prompt for the text between two parts, and the tokens that end it. Raises RequestError."""

    @property
    def output_format(self) -> OutputFormat:
        """Raises NotReady."""

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """The loaded low-rank adapters by the name that requests give."""

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> AdapterInfo:
        """Raises Conflict for a name in use, RequestError for a path or file that cannot be."""

    async def unload_adapter(self, name: str) -> None:
        """New requests no longer find it; those that run finish. Raises ModelNotFound."""

    async def control(
        self, name: str, payload: dict[str, Any] | None = None, *, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """An operator's action, done by the engine between two steps. Raises what it raises, NotReady, EngineError."""

    def token_text(self, token_id: int) -> str:
        """One token for display."""
