"""When memory runs short, whole caches shrink before anybody is thrown out. Integers only.

Who may shrink has said so: such a request gives up the promise that its answer does not depend on the load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.scheduling.cache_manager import CacheManager
from engine.scheduling.compression import ResolvedPolicy
from engine.scheduling.request import Request
from engine.types import EngineRequest

# A policy for a request that has computed so many prompt tokens, whose cache shrinks after so many tokens in all.
MakePolicy = Callable[[int, int], ResolvedPolicy | None]


class Pressure:
    """
    make         the policy under pressure; None where it would release nothing
    is_default   whether requests that say nothing may shrink
    """

    def __init__(self, make: MakePolicy, *, is_default: bool = False) -> None:
        self._make = make
        self._is_default = is_default
        self.num_shrunk = 0

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
        num_free = cache.pool.num_available - cache.num_promised - num_wanted
        num_coming = 0
        for request in reversed(running):
            policy = self._policy_for(request)
            if policy is None:
                continue
            num_held = len(request.tables[0].block_ids)
            num_kept = cache.compaction.blocks_left(policy.plan, request.num_computed_tokens + 1)
            if num_free + num_coming >= len(running) + num_kept:
                return
            if num_kept <= num_free and num_kept < num_held:
                request.policy = policy
                self.num_shrunk += 1
                num_free -= num_kept
                num_coming += num_held

    def _policy_for(self, request: Request) -> ResolvedPolicy | None:
        """What would shrink the request's cache in this step, if it may shrink and has not yet."""
        if not request.family.may_shrink or request.policy is not None or request.num_remaining_tokens != 1:
            return None
        return self._make(request.num_prompt_tokens, request.num_computed_tokens + 1)
