"""Fault injection for tests: named points in the code at which a failure can be ordered. Costs one lookup when unused.

Form: point:when:count, comma separated. `when` is a probability ("0.01"), a step number ("7") or "label=<client
request id>"; `count` is how often it fires at most.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from engine.errors import ConfigError

POINTS = {
    "tokenizer": "tokenizing a prompt raises",
    "template": "rendering a chat prompt raises",
    "compile": "compiling a constraint raises",
    "detok": "turning an output token into text raises",
    "engine_kill": "the engine process is killed before a step",
    "engine_stop": "the engine process stops answering before a step",
    "engine_exit0": "the engine process exits with code 0 before a step",
    "forward_sleep": "a step never ends",
    "forward_raise": "a step raises",
}


class InjectedFault(Exception):
    """What an ordered failure raises: deliberately not one of engine.errors."""


@dataclass
class _Order:
    probability: float | None
    step: int | None
    label: str | None
    remaining: int

    def matches(self, step: int | None, label: str) -> bool:
        if self.label is not None:
            return label == self.label
        if self.step is not None:
            return step is not None and step >= self.step
        return random.random() < (self.probability or 0.0)


class Faults:
    """The orders of one process."""

    def __init__(self, orders: dict[str, list[_Order]]) -> None:
        self._orders = orders

    @classmethod
    def parse(cls, spec: str) -> Faults:
        """Raises ConfigError that quotes the part it cannot read."""
        orders: dict[str, list[_Order]] = {}
        for part in filter(None, (item.strip() for item in spec.split(","))):
            fields = part.split(":")
            if len(fields) != 3 or fields[0] not in POINTS:
                raise ConfigError(f"fault {part!r} is not point:when:count; points: {', '.join(sorted(POINTS))}")
            orders.setdefault(fields[0], []).append(_parse_order(part, fields[1], fields[2]))
        return cls(orders)

    def fires(self, point: str, *, step: int | None = None, label: str = "") -> bool:
        """Whether the point fails now. A step order fires at the first step that is not before it."""
        for order in self._orders.get(point, ()):
            if order.remaining > 0 and order.matches(step, label):
                order.remaining -= 1
                return True
        return False

    def check(self, point: str, *, step: int | None = None, label: str = "") -> None:
        """Raises InjectedFault when the point fails now."""
        if self._orders and self.fires(point, step=step, label=label):
            raise InjectedFault(point)


def _parse_order(part: str, when: str, count: str) -> _Order:
    try:
        remaining = int(count)
        if when.startswith("label="):
            return _Order(None, None, when.removeprefix("label="), remaining)
        if "." in when:
            return _Order(float(when), None, None, remaining)
        return _Order(None, int(when), None, remaining)
    except ValueError:
        raise ConfigError(f"fault {part!r}: when must be a number or label=..., count a number") from None
