"""Which low-rank adapters are loaded, at which index, and how many requests use each. Integers and labels only.

A key names one version of an adapter: another content is another key, so requests that run keep what they began with.
An adapter that is removed takes no new requests; its index is given back when the last one that uses it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import InvalidParameter, ModelNotFound

NO_ADAPTER = 0


@dataclass(slots=True)
class _Entry:
    index: int  # in the model's tables, from 1 on
    num_choices: int = 0  # accepted and not over
    is_leaving: bool = False


class AdapterTable:
    """Room for `capacity` adapters; those that are leaving count until nobody uses them.

    One index more exists, so that a full table can replace an adapter by its new version.
    """

    def __init__(self, capacity: int = 0, on_free: Callable[[int], None] = lambda index: None) -> None:
        """on_free(index) is called when nothing uses the index any more, between steps."""
        self._on_free = on_free
        self._capacity = capacity
        self._entries: dict[str, _Entry] = {}
        self._free = list(range(self.num_indices - 1, 0, -1))

    def __contains__(self, key: str) -> bool:
        """Whether new requests may use it."""
        return key in self._entries and not self._entries[key].is_leaving

    @property
    def num_indices(self) -> int:
        """Indices that requests may have, 0 included."""
        return self._capacity + 2 if self._capacity else 1

    @property
    def num_loaded(self) -> int:
        """Those that take an index, leaving ones included."""
        return len(self._entries)

    def users(self) -> dict[str, int]:
        """Choices accepted and not over, of adapters that have any."""
        return {key: entry.num_choices for key, entry in self._entries.items() if entry.num_choices}

    def check_room(self, key: str, replaces: str = "") -> None:
        """Raises InvalidParameter when there is no index for an adapter that comes in place of another, or of none."""
        num_others = len(self._entries) - (replaces in self)
        if key not in self._entries and num_others >= self._capacity:
            num_leaving = sum(entry.is_leaving for entry in self._entries.values())
            leaving = f", {num_leaving} of them until their last requests end" if num_leaving else ""
            raise InvalidParameter(
                f"{len(self._entries)} adapters are loaded{leaving}, the limit is {self._capacity}; unload one, or "
                "raise --max-lora-adapters",
                param="lora_name",
            )

    def add(self, key: str, replaces: str = "") -> int | None:
        """The index for a new adapter, to be filled before the next step; None when its weights are still there.

        Raises InvalidParameter without room.
        """
        self.check_room(key, replaces)
        entry = self._entries.get(key)
        if entry is not None:
            entry.is_leaving = False
            return None
        entry = self._entries[key] = _Entry(self._free.pop())
        return entry.index

    def remove(self, key: str) -> None:
        """No new requests; harmless for an unknown key."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.is_leaving = True
            self._free_unused(key, entry)

    def check(self, key: str) -> None:
        """Raises ModelNotFound when a new request cannot use it. "" is no adapter."""
        if key and key not in self:
            raise ModelNotFound("that adapter is not loaded any more", param="model")

    def acquire(self, key: str, num_choices: int) -> int:
        """Counts the choices of a new request. Returns the adapter's index."""
        if not key:
            return NO_ADAPTER
        entry = self._entries[key]
        entry.num_choices += num_choices
        return entry.index

    def release(self, key: str) -> None:
        """One choice is over, and no step uses it."""
        if key:
            entry = self._entries[key]
            entry.num_choices -= 1
            self._free_unused(key, entry)

    def _free_unused(self, key: str, entry: _Entry) -> None:
        if entry.is_leaving and not entry.num_choices:
            del self._entries[key]
            self._free.append(entry.index)
            self._on_free(entry.index)
