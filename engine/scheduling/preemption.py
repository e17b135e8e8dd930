"""Who gives way when the pool is empty. A pure function of the running requests."""

from __future__ import annotations

from collections.abc import Iterable

from engine.scheduling.request import Request


def choose_victim(running: Iterable[Request], request: Request, protect_after: int) -> Request:
    """The running request that is thrown back to the queue so that `request` can grow; possibly `request` itself.

    Never one that is more urgent than `request`. Among the rest: those not yet preempted `protect_after` times first,
    then the least urgent, then the newest. When all are protected the same order decides, so the oldest of the most
    urgent is never a victim once it is protected: the pool can always hold it alone, and it finishes.
    """
    return max(
        (other for other in running if other.priority >= request.priority),
        key=lambda other: (other.num_preemptions < protect_after, other.order),
    )
