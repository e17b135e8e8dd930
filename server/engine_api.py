"""What the server needs of an engine. `engine.client.AsyncEngine` has it, and so has the fake one of the tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from engine.types import ChatPrompt, EngineStats, GenerationRequest, ModelInfo, TextOutput


class EngineState(Protocol):
    """Where the engine is in its life. "dead" is final: the engine will not be started again."""

    @property
    def phase(self) -> str:
        """starting, loading, warming, ready, draining or dead."""

    @property
    def detail(self) -> str:
        """A few words for people, for instance how much of the weights is loaded."""

    @property
    def is_ready(self) -> bool:
        """True while the model is loaded and the engine has shown life recently."""


class Engine(Protocol):
    """Text in, text out, asynchronously."""

    on_stats: Callable[[EngineStats], None] | None  # called with every report of the core

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

    def generate(self, request: GenerationRequest) -> AsyncIterator[TextOutput]:
        """Outputs of all choices. Raises RequestError or CapacityError before the first, EngineError later.

        Closing or cancelling the iterator aborts the request.
        """

    async def tokenize(self, prompt: str | ChatPrompt, *, add_special_tokens: bool = True) -> list[int]: ...

    async def detokenize(self, token_ids: list[int]) -> str: ...

    def token_text(self, token_id: int) -> str:
        """One token for display."""
