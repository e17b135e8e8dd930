"""How the state machines are run: a profile for every test run, a longer one behind the `slow` mark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

T = TypeVar("T")

# Rules pick an element by position: an integer modulo the number of candidates. It shrinks well, and costs a fraction
# of drawing from a list that is different at every step.
picks = st.integers(0, 1 << 16)


def pick(index: int, candidates: Sequence[T]) -> T:
    return candidates[index % len(candidates)]


def case_of(machine: type[RuleBasedStateMachine], max_examples: int, num_steps: int) -> type:
    """A unittest case that runs the machine so many times, so many operations each."""
    case = type(machine.__name__, (machine.TestCase,), {})
    case.settings = settings(
        max_examples=max_examples,
        stateful_step_count=num_steps,
        deadline=None,  # the machine that tests run on is shared
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    return case
