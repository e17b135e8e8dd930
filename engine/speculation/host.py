"""What drafters that live on the host share: their options' bounds, following requests, and memory by tenant.

A drafter reads a request's tokens when it is asked to guess, so that its state depends on the tokens alone; tokens of
the last step, which no guess follows, reach it when the request is dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from engine.errors import ConfigError
from engine.speculation.base import RequestView, TapRows, Taps
from engine.speculation.tree import EMPTY, DraftTree

INT_BYTES = 32  # a Python integer below 2^60, rounded up to what the allocator hands out
ENTRY_BYTES = 48  # a place in a dictionary: hash, key, value and index, at the usual fill
TUPLE_BYTES = 48  # an empty tuple; 8 more for every item


def check_bounds(drafter: str, options: object, **bounds: tuple[float, float]) -> None:
    """Raises ConfigError if a field of `options` is outside its (lowest, highest); integer bounds want an integer."""
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        wanted = int if isinstance(low, int) and isinstance(high, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not low <= value <= high:
            kind = "an integer" if wanted is int else "a number"
            raise ConfigError(f"drafter {drafter}: {name} is {value!r}; need {kind} from {low} to {high}")


State = TypeVar("State")


class Follower(Generic[State]):
    """A drafter's state of one request: how far it has read, and what came since."""

    __slots__ = ("num_read", "state", "unread")

    def __init__(self, state: State, num_read: int) -> None:
        self.state = state
        self.num_read = num_read  # tokens of the request that `state` knows
        self.unread: list[int] = []  # tokens committed since then


class HostDrafter(ABC, Generic[State]):
    """A drafter whose state of a request is made of its tokens and brought up to date before each guess."""

    name: str
    needs = Taps()

    def __init__(self) -> None:
        self._requests: dict[str, Follower[State]] = {}

    @abstractmethod
    def _start(self, prompt: Sequence[int]) -> State:
        """State of a request that has this prompt."""

    @abstractmethod
    def _read(self, state: State, view: RequestView, start: int) -> None:
        """Learn the tokens of the request from index `start` on."""

    @abstractmethod
    def _guess(self, state: State, view: RequestView, max_nodes: int, max_depth: int) -> DraftTree:
        """A tree within the bounds, both at least 1. `state` knows all tokens of the view."""

    def _finish(self, state: State, unread: Sequence[int]) -> None:
        """The request is over; `unread` are the tokens at its end that were never read."""

    def admit(self, key: str, token_ids: Sequence[int], tenant: str) -> None:
        self._requests[key] = Follower(self._start(token_ids), len(token_ids))

    def fork(self, key: str, child: str) -> None:
        """The child's state is made from its tokens when it is first asked for."""

    def propose(self, views: Sequence[RequestView], caps: Sequence[int]) -> list[DraftTree]:
        return [self._propose(view, cap) for view, cap in zip(views, caps, strict=True)]

    def on_commit(
        self, key: str, tree: DraftTree, accepted: Sequence[int], new_tokens: Sequence[int], taps: TapRows
    ) -> None:
        request = self._requests.get(key)
        if request is not None:
            request.unread.extend(new_tokens)

    def drop(self, key: str) -> None:
        request = self._requests.pop(key, None)
        if request is not None:
            self._finish(request.state, request.unread)

    def _propose(self, view: RequestView, cap: int) -> DraftTree:
        if cap <= 0 or view.max_depth <= 0 or not view.token_ids:
            return EMPTY
        return self._guess(self._follow(view), view, cap, view.max_depth)

    def _follow(self, view: RequestView) -> State:
        """The request's state, up to date; made anew if it is missing or knows more than the request has."""
        request = self._requests.get(view.key)
        num_tokens = len(view.token_ids)
        if request is None or request.num_read > num_tokens:
            request = Follower(self._start(view.token_ids[: view.num_prompt_tokens]), view.num_prompt_tokens)
            self._requests[view.key] = request
        if request.num_read < num_tokens:
            self._read(request.state, view, request.num_read)
            request.num_read = num_tokens
        request.unread.clear()
        return request.state


class Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


Learnt = TypeVar("Learnt", bound=Sized)


class Scopes(Generic[Learnt]):
    """What was learnt from requests, one table per tenant and adapter, so that nothing passes between tenants.

    Tables beyond `max_scopes` are forgotten, the least recently used first.
    """

    def __init__(self, make: Callable[[], Learnt], max_scopes: int) -> None:
        self._make = make
        self._max_scopes = max_scopes
        self._tables: OrderedDict[tuple[str, str], Learnt] = OrderedDict()

    def get(self, tenant: str, adapter: str) -> Learnt:
        scope = (tenant, adapter)
        table = self._tables.get(scope)
        if table is None:
            if len(self._tables) >= self._max_scopes:
                self._tables.popitem(last=False)
            table = self._tables[scope] = self._make()
        else:
            self._tables.move_to_end(scope)
        return table

    def __iter__(self) -> Iterator[Learnt]:
        """Tables, the least recently used first."""
        return iter(self._tables.values())

    def forget(self, tenant: str) -> None:
        """Wipe all that was learnt from a tenant."""
        for scope in [scope for scope in self._tables if scope[0] == tenant]:
            del self._tables[scope]

    @property
    def num_bytes(self) -> int:
        return sum(table.num_bytes for table in self._tables.values())
