"""The plug-in interface of drafters: what they see of a request, what they give, and how they are found by name.

Host drafters know integers only. Nothing a drafter does can change an output: the target model decides every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from engine.errors import ConfigError
from engine.speculation.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Taps:
    """What a drafter wants to see of the target model's pass, for the rows of a draft.

    topk           so many best token ids of each row; 0: none
    hidden_last    the last hidden state of each row, and of the tokens computed before the root in the same step
    hidden_layers  the residual stream behind these layers. No model shows it yet: a drafter that needs it is refused
    """

    topk: int = 0
    hidden_last: bool = False
    hidden_layers: tuple[int, ...] = ()

    def union(self, other: Taps) -> Taps:
        return Taps(
            topk=max(self.topk, other.topk),
            hidden_last=self.hidden_last or other.hidden_last,
            hidden_layers=tuple(sorted({*self.hidden_layers, *other.hidden_layers})),
        )


@dataclass(frozen=True, slots=True)
class TapRows:
    """What was asked for: row 0 is the root's (the request's last token before the step), row i + 1 that of node i.

    None where it was not asked for.
    """

    topk_ids: np.ndarray | None = None  # [rows, at least topk] int32, best first
    hidden: np.ndarray | None = None  # [rows, C] float32, behind the model's last norm
    # [n, C] float32: of the n tokens right before the root that were computed with it, the newest of them where they
    # are many: a prompt's last chunk, tokens that a grammar forced, what was lost with a preempted cache
    hidden_before: np.ndarray | None = None
    hidden_layers: np.ndarray | None = None  # [rows, layers, C] float32


NO_TAPS = TapRows()


@dataclass(frozen=True, slots=True)
class RequestView:
    """One decoding request. Valid during the call it is given to."""

    key: str  # of the request and choice, unique while it lives
    token_ids: Sequence[int]  # prompt, then outputs; the last one is the root of a draft. Not to be changed or kept
    num_prompt_tokens: int
    tenant: str = ""  # what is learnt from one tenant's text is never shown to another
    adapter: str = ""
    temperature: float = 0.0
    seed: int = 0
    choice: int = 0
    max_depth: int = 1 << 30  # tokens that may still follow the root, but for the one that the step itself adds
    samples: bool = False  # a rule that looks at q verifies: drafts should be drawn from the drafter's distribution


class Drafter(Protocol):
    """Guesses what comes next. Called from the thread of the step loop, between two steps.

    Every method must cope with any text, and its time is part of every step: O(tokens since the last call).
    """

    name: str
    needs: Taps

    def admit(self, key: str, token_ids: Sequence[int], tenant: str) -> None:
        """A request has this prompt. Called once per key, before its first `propose`, for which it may be long under
        way; where `needs` asks for hidden states, when it begins to decode.
        """

    def fork(self, key: str, child: str) -> None:
        """`child` has the prompt of `key`, which has got no token yet. In place of `admit` for choices 1 to n."""

    def propose(self, views: Sequence[RequestView], caps: Sequence[int]) -> list[DraftTree]:
        """A tree per view, of at most caps[i] nodes, often an empty one. Values are the drafter's own guess."""

    def on_commit(
        self, key: str, tree: DraftTree, accepted: Sequence[int], new_tokens: Sequence[int], taps: TapRows
    ) -> None:
        """The request got `new_tokens`, of which those of `accepted` (a path of nodes in `tree`) were guessed.

        Called in order for all tokens of every admitted request; those of several steps without a draft may come in one
        call, before the next `propose` or `drop`. What a request gets last is not told while the drafter may not guess.
        `tree` is what the model saw, which other drafters may have had a part in; see its sources.
        """

    def drop(self, key: str) -> None:
        """The request is over."""

    @property
    def state_bytes(self) -> int:
        """Memory held, as far as it grows with use."""


Class = TypeVar("Class", bound=type)


class Drafters:
    """Names of drafters, as clients and configuration use them."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[..., Drafter]] = {}

    def register(self, name: str) -> Callable[[Class], Class]:
        """Class decorator. The constructor's keyword arguments, plain numbers with defaults, are the options."""

        def add(maker: Class) -> Class:
            assert name not in self._makers, f"two drafters are named {name}"
            self._makers[name] = maker
            return maker

        return add

    def names(self) -> list[str]:
        return sorted(self._makers)

    def needs(self, name: str) -> Taps:
        """What a drafter wants to see, known before one is made; nothing for an unknown name."""
        return getattr(self._makers.get(name), "needs", Taps())

    def create(self, name: str, **options: Any) -> Drafter:
        """Raises ConfigError for an unknown name or option."""
        maker = self._makers.get(name)
        if maker is None:
            raise ConfigError(f"there is no drafter {name!r}; known are {', '.join(self.names())}")
        try:
            return maker(**options)
        except TypeError as error:
            raise ConfigError(f"drafter {name}: {error}") from None


drafters = Drafters()
