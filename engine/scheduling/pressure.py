"""When memory runs short, caches shrink before anybody is thrown out: first all by one rung, then by the next.

Integers only. Who may shrink has said so: such a request gives up the promise that its answer does not depend on the
load. A rung that a request has taken stays with it: preempted and computed again, it shrinks at the same tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine import types
from engine.scheduling.cache_manager import CacheManager
from engine.scheduling.compression import ResolvedPolicy
from engine.scheduling.request import Request
from engine.types import EngineRequest

# How a request's cache is kept now, and so many computed tokens -> how it is kept when it shrinks there. None: this
# rung would release nothing of it.
Rung = Callable[[ResolvedPolicy | None, int], ResolvedPolicy | None]


@dataclass
class _Room:
    """num_free blocks can be had in this step, num_coming more after it."""

    num_free: int
    num_coming: int = 0


class Pressure:
    """
    rungs        in the order in which they are taken
    is_default   whether requests that say nothing may shrink
    """

    def __init__(self, rungs: Sequence[Rung], *, is_default: bool = False) -> None:
        self._rungs = rungs
        self._is_default = is_default
        self.taken: Counter[str] = Counter()  # by policy

    def allows(self, request: EngineRequest) -> bool:
        """Whether a request with a whole cache may shrink."""
        choice = request.kv_policy or {}
        return bool(choice.get("may_shrink", self._is_default))

    def relieve(self, cache: CacheManager, running: Sequence[Request]) -> None:
        """Lets caches shrink at the end of the coming step, the least urgent first, until enough is to come free.

        running   the most urgent first
        Every running request will want a block soon; with fewer than that to be had, somebody would be preempted. And
        survivors may need new blocks before the old ones come free, so it begins while there is still room for some.
        """
        num_wanted = sum(cache.num_lacking(request, 1) for request in running)  # in this very step
        room = _Room(cache.pool.num_available - cache.num_promised - num_wanted)
        is_done: set[Request] = set()  # shrinks in this step, or has no room for it yet: no rung is left out
        for rung in self._rungs:
            for request in reversed(running):
                # what it computes next is its newest token, and it has allowed it
                if request in is_done or not request.family.may_shrink or request.num_remaining_tokens != 1:
                    continue
                policy = rung(request.policy, request.num_computed_tokens + 1)
                if policy is None:
                    continue
                num_new, num_freed = cache.compaction.exchange(request, policy.plan, request.num_computed_tokens + 1)
                if room.num_free + room.num_coming >= len(running) + num_new:
                    return
                if num_new >= num_freed:
                    continue
                is_done.add(request)
                if num_new <= room.num_free:
                    self._take(request, policy)
                    room.num_free -= num_new
                    room.num_coming += num_freed

    def _take(self, request: Request, policy: ResolvedPolicy) -> None:
        name = policy.plan.policy
        request.policy = policy
        request.rungs.append(types.Rung(policy=name, at_token=request.num_computed_tokens + 1))
        self.taken[name] += 1
