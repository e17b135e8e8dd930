"""From what a request asks of speculation to checked options, and the state that one choice keeps. Integers and names.

The one place that refuses combinations. Whether anything is guessed in a step is decided later, by the load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config import SpeculationConfig
from engine.errors import ConfigError, InvalidParameter
from engine.speculation.base import Taps
from engine.speculation.base import drafters as registry
from engine.speculation.catalogue import HEAD_DRAFTERS, MODEL_DRAFTERS
from engine.speculation.tree import EMPTY, DraftTree
from engine.speculation.verifiers import VERIFIERS
from engine.types import SpeculationUsage

MAX_ACCEPT = "max_accept"  # whichever rule accepts most of a draft
NAMES = ("walk", MAX_ACCEPT, *(name for name in VERIFIERS if name != "walk"))
FIELDS = ("drafters", "max_nodes", "verifier", "off")


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """
    drafters   names, in order of preference
    max_nodes  most nodes of one draft
    verifier   walk: the target's own choice at every node, which no drafter can change. The others accept more of what
               was drawn at random; their output has the same distribution, but is not the same
    """

    drafters: tuple[str, ...]
    max_nodes: int
    verifier: str = "walk"

    @property
    def first_taps(self) -> Taps | None:
        """What is to be seen of the step that computes a prompt's end, before any drafter was made or asked."""
        needs_hidden = any(registry.needs(name).hidden_last for name in self.drafters)
        return Taps(hidden_last=True) if needs_hidden else None


@dataclass(slots=True)
class Speculating:
    """One choice's speculation.

    draft     for its next step; empty in between, and whenever nothing was guessed
    taps      what its drafters want to see of the model's pass
    num_steps steps that checked a draft; nodes checked and accepted, by who guessed them
    usage     what answers report of these numbers; None: they have changed since it was made
    """

    options: SpeculationOptions
    draft: DraftTree = EMPTY
    taps: Taps | None = None
    num_steps: int = 0
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    usage: SpeculationUsage | None = None
    is_followed: bool = False  # its drafters know of it: steps without a draft need not be told at once


class SpeculationResolver:
    """What this server offers of the drafters that exist. Raises ConfigError when its own default is not among them."""

    def __init__(self, config: SpeculationConfig, known: Collection[str]) -> None:
        self._config = config
        self._known = sorted(known)
        self._allowed = _allowed(config.speculative_allowed, self._known)
        self._default: SpeculationOptions | None = None
        if config.speculative:
            try:
                self._check_names(config.speculative)
            except InvalidParameter as error:
                raise ConfigError(f"speculative: {error}") from error
            self._default = SpeculationOptions(config.speculative, config.speculative_max_nodes)

    @property
    def offered(self) -> tuple[str, ...]:
        """Drafters that may be needed."""
        return tuple(name for name in self._known if name in self._allowed)

    def resolve(self, choice: Mapping[str, Any] | None) -> SpeculationOptions | None:
        """The options of a request, None without speculation.

        choice   the request's `speculative`; None: the server's default
        Raises InvalidParameter for an unknown field, name or number.
        """
        if choice is None:
            return self._default
        unknown = sorted(set(choice).difference(FIELDS))
        if unknown:
            raise _refusal(f"speculative has no field {unknown[0]!r}; it has {', '.join(FIELDS)}")
        off = choice.get("off", False)
        if not isinstance(off, bool):
            raise _refusal("speculative.off must be true or false")
        if off:
            return None
        drafters = self._drafters(choice.get("drafters"))
        verifier = choice.get("verifier", "walk")
        if verifier not in NAMES:
            raise _refusal(f"speculative.verifier must be one of {', '.join(NAMES)}")
        return SpeculationOptions(drafters, self._max_nodes(choice.get("max_nodes")), verifier)

    def _drafters(self, given: Any) -> tuple[str, ...]:
        if given is None:
            if self._default is None:
                raise _refusal(f"speculative needs drafters; {self._offer()}")
            return self._default.drafters
        names = (given,) if isinstance(given, str) else given
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise _refusal(f"speculative.drafters must be a name or a list of names; {self._offer()}")
        self._check_names(names)
        return tuple(dict.fromkeys(names))

    def _check_names(self, names: Collection[str]) -> None:
        for name in names:
            if name not in self._allowed:
                what = "is not offered here" if name in self._known else _lack_of(name)
                raise _refusal(f"drafter {name[:40]!r} {what}; {self._offer()}")

    def _max_nodes(self, given: Any) -> int:
        if given is None:
            return self._config.speculative_max_nodes
        most = self._config.speculative_max_nodes_limit
        if isinstance(given, float) and given.is_integer():
            given = int(given)
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
            raise _refusal(f"speculative.max_nodes must be an integer from 1 to {most}; off: true turns it off")
        return int(given)

    def _offer(self) -> str:
        return f"choose from {', '.join(self.offered)}" if self.offered else "this server offers none"


def _lack_of(name: str) -> str:
    """Why a drafter is not known to this server."""
    if name in HEAD_DRAFTERS:
        return "needs a trained head, which this model has none of (kvasir train-drafter, --speculative-eagle-head)"
    if name in MODEL_DRAFTERS:
        return "needs a draft model, which this server has none of (--speculative-draft-model)"
    return "is unknown"


def _refusal(message: str) -> InvalidParameter:
    return InvalidParameter(message, param="speculative")


def _allowed(names: tuple[str, ...], known: Collection[str]) -> frozenset[str]:
    if names == ("all",):
        return frozenset(known)
    if names == ("none",):
        return frozenset()
    unknown = sorted(set(names).difference(known))
    if unknown:
        raise ConfigError(f"speculative_allowed has {', '.join(unknown)}; known are all, none, {', '.join(known)}")
    return frozenset(names)
