"""The table of cache policies: one decorator per policy, creation from a request's options, errors that list the known.

A modifier (VATP, KVCrush) changes the scores or the choice of a base policy: its options are its own, `base`, and those
of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar, cast

from engine.compression.base import Policy
from engine.compression.options import Described, OptionError, Options, describe
from engine.errors import InvalidParameter

P = TypeVar("P", bound=type[Options])


class Hook(StrEnum):
    """What a policy needs of the engine beyond scores, a choice of slots and their compaction."""

    TEMPERATURES = "temperatures"  # a temperature per query for "noisy" evidence: policy.temperatures
    MERGE = "merge"  # Keep.merge_to
    STAMPS = "stamps"  # per block: the last query that used it, from bounds of the block's keys
    COMPENSATION = "compensation"  # one virtual key per kv head that stands for what was dropped
    SELECTION = "selection"  # a list of blocks or tokens to read, per token, layer and kv head: policy.select
    REWRITE = "rewrite"  # attention in parts, virtual keys among them: policy.rewrite
    HIDDEN = "hidden"  # a look at hidden states between layers: policy.on_hidden
    PROMPT_FILTER = "prompt_filter"  # a first pass over some layers that shortens the prompt
    FORMAT = "format"  # older tokens in packed blocks of another format
    FUTURE = "future"  # queries that come later: for measurements, never in serving


@dataclass(frozen=True, slots=True)
class Entry:
    """
    needs    hooks; the engine refuses a policy whose hooks it lacks
    bases    of a modifier: the policies that it can change, the default first
    offline  a yardstick that clients cannot ask for
    """

    name: str
    policy: type[Options]
    needs: frozenset[Hook]
    bases: tuple[str, ...]
    offline: bool

    @property
    def summary(self) -> str:
        """The first line of the policy's docstring."""
        return (self.policy.__doc__ or "").strip().split("\n")[0]

    @property
    def options(self) -> tuple[Described, ...]:
        """Without those of a modifier's base."""
        return describe(self.policy)


_entries: dict[str, Entry] = {}


def register(
    name: str, *, needs: tuple[Hook, ...] = (), bases: tuple[str, ...] = (), offline: bool = False
) -> Callable[[P], P]:
    """Make a policy class known as `name`. A modifier has a field `base`."""

    def add(policy: P) -> P:
        if name in _entries:
            raise ValueError(f"two cache policies are called {name}")
        policy.name = name
        _entries[name] = Entry(name, policy, frozenset(needs), bases, offline)
        return policy

    return add


def names(*, offline: bool = False) -> tuple[str, ...]:
    """Policies that a request may name, in alphabetical order; offline: yardsticks too."""
    return tuple(sorted(name for name, found in _entries.items() if offline or not found.offline))


def entry(name: str, *, offline: bool = False) -> Entry:
    """Raises InvalidParameter for an unknown name."""
    found = _entries.get(name) if isinstance(name, str) else None
    if found is None or (found.offline and not offline):
        raise InvalidParameter(
            f"kv_policy.name is {name!r}, known are {', '.join(names(offline=offline))}", param="kv_policy.name"
        )
    return found


def create(
    name: str, options: Mapping[str, Any] | None = None, *, offline: bool = False, param: str = "kv_policy"
) -> Policy:
    """The policy of that name with these options.

    options  by name; for a modifier also `base`: the name of a policy, which then takes the options that the modifier
             does not know, or an object {"name": ..., options of the base}
    offline  yardsticks may be named too
    Raises InvalidParameter for unknown names and options and for values out of bounds.
    """
    found = entry(name, offline=offline)
    own, others = _split(found, dict(options or {}))
    if found.bases:
        own["base"] = _create_base(found, others, offline, param)
    elif others:
        raise _unknown(found, sorted(others), found.options, param)
    try:
        return cast(Policy, found.policy(**own))
    except OptionError as error:
        raise InvalidParameter(f"{name}: {error}", param=f"{param}.{error.option}") from None


def needs(policy: Policy) -> frozenset[Hook]:
    """The hooks that a policy needs, those of its base included."""
    found = _entries[type(policy).name]  # type: ignore[attr-defined]
    base = getattr(policy, "base", None)
    return found.needs | (needs(base) if found.bases and base is not None else frozenset())


def _create_base(modifier: Entry, options: dict[str, Any], offline: bool, param: str) -> Policy:
    choice = options.pop("base", None) or modifier.bases[0]
    if isinstance(choice, Mapping):
        if options:
            raise _unknown(modifier, sorted(options), modifier.options, param)
        options = dict(choice)
        name, param = options.pop("name", modifier.bases[0]), f"{param}.base"
    else:
        name = choice
    if not isinstance(name, str) or name not in modifier.bases:
        raise InvalidParameter(
            f"{modifier.name}: base is {name!r}, known are {', '.join(modifier.bases)}", param=f"{param}.base"
        )
    base = entry(name, offline=offline)
    if not base.bases:
        unknown = _split(base, options)[1]
        if unknown:
            raise _unknown(modifier, sorted(unknown), (*modifier.options, *base.options), param, base=name)
    return create(name, options, offline=offline, param=param)


def _split(found: Entry, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that the policy itself takes, and the others."""
    known = {item.name for item in found.options}
    return (
        {name: value for name, value in options.items() if name in known},
        {name: value for name, value in options.items() if name not in known},
    )


def _unknown(
    found: Entry, given: list[str], known: tuple[Described, ...], param: str, base: str | None = None
) -> InvalidParameter:
    label = f"{found.name} over {base}" if base else found.name
    return InvalidParameter(
        f"{label} has no option {given[0]!r}, known are: {'; '.join(str(item) for item in known)}",
        param=f"{param}.{given[0]}",
    )
