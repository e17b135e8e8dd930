"""Checks the whole control plane against its promises. For tests after every step, and for an idle engine now and then.

Takes time with everything that exists, so never part of a step. The letters are those of the README in this folder.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

from engine.scheduling.plan import StepPlan
from engine.scheduling.request import Request, Status
from engine.scheduling.scheduler import Scheduler


class InvariantViolation(AssertionError):
    """The control plane contradicts itself: a bug of ours."""


def check_invariants(scheduler: Scheduler, plan: StepPlan | None = None) -> None:
    """Raises InvariantViolation that lists everything wrong with the scheduler, and with the plan it just made."""
    problems = violations(scheduler)
    if plan is not None:
        problems += plan_violations(scheduler, plan)
    if problems:
        raise InvariantViolation("; ".join(problems))


def violations(scheduler: Scheduler) -> list[str]:
    """What is wrong between two calls of the scheduler's methods: empty when all is well."""
    cache = scheduler.cache
    problems = cache.pool.violations() + scheduler.rows.violations()
    if cache.prefix_cache is not None:
        problems += cache.prefix_cache.violations()
    running = scheduler.roster.running
    holders = [*running, *scheduler.left_in_flight]
    tables, parts = _references(scheduler, holders)
    for num_parts, part_pool in cache.compaction.part_pools.items():
        tables.update(part_pool.broken_blocks)
        if part_pool.handed_out() != parts[num_parts]:
            problems.append(f"{sorted(part_pool.handed_out())} are handed out, {sorted(parts[num_parts])} in tables")
    for block_id in range(cache.pool.num_blocks):
        num_references = cache.pool.num_references(block_id)
        if num_references != tables[block_id]:
            problems.append(f"block {block_id} has {num_references} references and is in {tables[block_id]} tables")
    for request in running:
        problems += _running_violations(scheduler, request)
    problems += _population_violations(scheduler)
    problems += _adapter_violations(scheduler)
    promised = sum(cache.num_promised_to(request) for request in holders)
    if promised != cache.num_promised:
        problems.append(f"{cache.num_promised} blocks are promised, {promised} to those that hold blocks")
    return problems


def plan_violations(scheduler: Scheduler, plan: StepPlan) -> list[str]:
    """What is wrong with a plan that `schedule` just returned: budgets, and who writes where."""
    cache, limits = scheduler.cache, scheduler.limits
    problems = []
    if plan.num_tokens > limits.max_num_batched_tokens:
        problems.append(f"the plan has {plan.num_tokens} tokens, the budget is {limits.max_num_batched_tokens}")
    if not plan.chunks and scheduler.roster.families:
        problems.append("there is work and the plan is empty")
    written: Counter[int] = Counter(destination for _, destination in plan.block_copies)
    for chunk in plan.chunks:
        request = scheduler.rows[chunk.row]
        block_ids = request.tables[0].block_ids
        if len(request.tables) > 1:
            continue
        slot = chunk.start - request.num_dropped
        first, last = slot // cache.block_size, (slot + chunk.num_tokens - 1) // cache.block_size
        if chunk.num_tokens < 1 or last >= len(block_ids):
            problems.append(
                f"row {chunk.row} runs {chunk.num_tokens} tokens from {chunk.start} in {len(block_ids)} blocks"
            )
            continue
        written.update(block_ids[first : last + 1])
        problems += [
            f"row {chunk.row} writes block {block_id}, which others may read"
            for block_id in block_ids[first : last + 1]
            if cache.pool.num_references(block_id) != 1 or cache.pool.is_published(block_id)
        ]
    rows = [chunk.row for chunk in plan.chunks]
    if len(set(rows)) != len(rows) or len(rows) > limits.max_num_seqs:
        problems.append(f"the rows {rows} are too many or not unique")
    if not {new.row for new in plan.new_rows} <= set(rows):
        problems.append("a new row has no chunk")
    if not {row for row, _, _ in plan.table_edits} <= set(rows):
        problems.append("a table is edited of a row that has no chunk")
    copied = {destination for _, destination in plan.block_copies}
    problems += [
        f"block {block_id} is written by {count} rows"
        for block_id, count in written.items()
        if count > 1 + (block_id in copied)
    ]
    return problems


def _running_violations(scheduler: Scheduler, request: Request) -> list[str]:
    """One running request: its counters, its table, its share in the prefix cache."""
    cache, name = scheduler.cache, f"{request.request_id}/{request.choice}"
    problems = []
    if request.status is not Status.RUNNING or request.row is None or scheduler.rows[request.row] is not request:
        problems.append(f"{name} runs without a row: {request.status} {request.row}")
    if not 0 <= request.num_computed_tokens < request.num_tokens:
        problems.append(f"{name} has computed {request.num_computed_tokens} of {request.num_tokens} tokens")
    plan, num_computed = request.cache_plan, request.num_computed_tokens
    for group, table in enumerate(request.tables):
        num_slots = num_computed if plan is None else plan.slots_at(num_computed, group)
        if table.num_slots != num_slots:
            problems.append(f"{name} has {table.num_slots} slots for {num_computed} tokens, its plan says {num_slots}")
        if len(table.block_ids) < cache.blocks_for(num_slots) or len(set(table.block_ids)) != len(table.block_ids):
            problems.append(f"{name} has table {table.block_ids} for {table.num_slots} slots")
    num_packed = 0 if plan is None or not plan.places else plan.packed_blocks_at(num_computed, cache.block_size)
    if len(request.packed) != num_packed:
        problems.append(f"{name} has {len(request.packed)} packed blocks, its plan says {num_packed}")
    if len(request.side) < cache.compaction.side_blocks(plan, request.tables[0].num_slots):
        problems.append(f"{name} has {len(request.side)} blocks of side data for {request.tables[0].num_slots} slots")
    if request.num_packed != (0 if plan is None else plan.packed_slots_at(num_computed)):
        problems.append(f"{name} has {request.num_packed} packed tokens, its plan says otherwise")
    owner = request.family.request
    if request.chain is not None:
        namespace = request.chain.namespace
        labels = (namespace.tenant, namespace.cache_salt, namespace.adapter)
        if labels != (owner.tenant, owner.cache_salt, owner.adapter):
            problems.append(f"{name} shares blocks with other tenants, salts or adapters")
    if owner.pooling is not None and request.num_output_tokens:
        problems.append(f"{name} pools and has {request.num_output_tokens} outputs")
    elif owner.pooling is None and request.num_output_tokens >= request.family.max_tokens:
        problems.append(f"{name} has {request.num_output_tokens} outputs and goes on")
    if request.num_published_blocks * cache.block_size > request.num_computed_tokens:
        problems.append(f"{name} has published blocks that are not computed")
    return problems


def _references(scheduler: Scheduler, holders: list[Request]) -> tuple[Counter[int], defaultdict[int, set[int]]]:
    """How many tables, also those to come, have each block; and the parts in tables, by parts per block."""
    blocks: Counter[int] = Counter()
    parts: defaultdict[int, set[int]] = defaultdict(set)
    for request in holders:
        plan = request.cache_plan
        num_groups = 1 if plan is None else plan.num_groups
        blocks.update(request.packed)
        blocks.update(request.side)
        for ids in [*[table.block_ids for table in request.tables if len(request.tables) == 1], *request.reserved]:
            if num_groups == 1 or ids is request.tables[0].block_ids:
                blocks.update(ids)
            else:
                parts[num_groups].update(ids)
        if len(request.tables) > 1:
            parts[num_groups].update(part for table in request.tables for part in table.block_ids)
    return blocks, parts


def _adapter_violations(scheduler: Scheduler) -> list[str]:
    """Every choice that is not over, or that a step still uses, is counted for its adapter."""
    choices = [*scheduler.roster.requests(), *scheduler.left_in_flight]
    users = Counter(request.family.request.adapter for request in choices)
    del users[""]
    counted = scheduler.adapters.users()
    return [] if users == counted else [f"adapters have users {dict(users)}, {counted} counted"]


def _population_violations(scheduler: Scheduler) -> list[str]:
    """Everybody is in the place that their status says, and the order of the running is right."""
    roster = scheduler.roster
    requests, running = roster.requests(), roster.running
    statuses = Counter(request.status for request in requests)
    found = {
        Status.RUNNING: len(running),
        Status.WAITING: len(roster.queue),
        Status.PARKED: roster.num_parked,
        Status.FINISHED: 0,
    }
    problems = [
        f"{statuses[status]} requests are {status.value}, {count} counted"
        for status, count in found.items()
        if statuses[status] != count
    ]
    if any(first.order >= second.order for first, second in pairwise(running)):
        problems.append("the running requests are out of order")
    problems += [
        f"{request.request_id}/{request.choice} is {request.status.value} and holds blocks or a row"
        for request in requests
        if request.status is not Status.RUNNING and (request.tables[0].block_ids or request.row is not None)
    ]
    problems += [
        f"{request.request_id}/{request.choice} is parked though the prompt is computed"
        for request in requests
        if request.status is Status.PARKED and any(other.has_emitted for other in request.family.choices.values())
    ]
    return problems
