"""Hooks of policies on the write path: what they see of keys and values as these are made, and in which form they stay.

They stand beside `engine.compression.base.Policy`; a policy has those that it needs. Shape letters as there, and n
groups of BS tokens (the block size), W numbers of side data. A cache of unrotated keys is not among them: who needs
such keys notes them or what it makes of them, and what it rebuilds it rotates by the positions that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from engine.compression.base import CacheShape, Policy
from engine.errors import ConfigError
from engine.scheduling.compression import CachePlan, PackedClass, Realisation
from kernels.packed_blocks import FORMATS, packed_places


@dataclass(frozen=True)
class SideSpec:
    """What a policy notes of each slot of each layer and kv head: so many numbers of that type.

    They are kept in blocks of the pool, count as the request's, follow their tokens when those move and go with them.
    """

    width: int
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class WriteView:
    """New tokens of one request in one layer, as their keys and values go to the cache.

    positions   [T] int64, logical
    queries     [T, H, D], rotated
    unrotated   [T, H_kv, D]: the keys before their rotation, after norms
    keys, values  [T, H_kv, D], as the cache holds them
    Queries and unrotated keys are None where the tokens come from the prefix cache, unless `needs_unrotated`.
    """

    layer: int
    positions: Tensor
    num_prompt_tokens: int
    queries: Tensor | None
    unrotated: Tensor | None
    keys: Tensor
    values: Tensor


class WritingPolicy(Policy, Protocol):
    """One that notes something of every token. With `needs_unrotated` (False where it is missing) prompts are computed
    whole, and never taken from the prefix cache.
    """

    @property
    def side(self) -> SideSpec: ...

    def on_kv(self, view: WriteView) -> Tensor:
        """[T, H_kv, W]: a token's must not depend on the tokens beside it, nor on whether queries are there."""


class Codec(Protocol):
    """A format of a policy's own, for groups of BS tokens of one kv head."""

    def group_bytes(self, shape: CacheShape) -> tuple[int, int]:
        """That the keys and the values of a group take."""

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[n, L, H_kv, BS, D] float32 each -> [n, L, H_kv, bytes] uint8 each. Each group by itself."""

    def decode(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[n, H_kv, bytes] uint8 each -> [n, H_kv, BS, D] float32 each."""


class ClassPolicy(Policy, Protocol):
    """One whose plan has classes: `keep` says with `Keep.cls` how tokens are packed, and `codecs` (where it is there)
    are its own formats by name, beside those of `kernels.packed_blocks`.
    """

    codecs: Mapping[str, Codec]


@dataclass(frozen=True)
class PromptView:
    """A part of a prompt, whose keys and values a policy supplies.

    token_ids  [n] int64 of the prompt from its start to the end of the part
    start      of the part: n - start = T tokens are asked for
    probe      the first so many layers of the model itself over all of token_ids: of each layer the unrotated keys and
               the values, [n, H_kv, D] each
    """

    token_ids: Tensor
    start: int
    probe: Callable[[int], list[tuple[Tensor, Tensor]]]


class ProvidingPolicy(Policy, Protocol):
    """One whose plan has `num_provided`: fewer than the prompt's tokens, the last of which the model must compute."""

    def provide(self, view: PromptView) -> Sequence[tuple[Tensor, Tensor]]:
        """Of each layer, unrotated keys and values [T, H_kv, D]. They must not depend on how the prompt is divided."""


class FilteringPolicy(Policy, Protocol):
    """One whose plan has `num_filtered`: a first pass over some layers shortens the prompt to so many tokens."""

    def layer_of(self, num_layers: int) -> int:
        """Whose logits of the prompt's last query choose."""

    def choose(self, logits: Tensor) -> Tensor | None:
        """[n] float32, summed over heads -> places of the tokens that stay, ascending; None: all."""


def class_plan(
    policy: Any,
    num_prompt_tokens: int,
    shape: CacheShape,
    *,
    num_unpacked: int,
    shares: Mapping[str, float],
    period: int = 0,
    num_queries: int = 0,
) -> CachePlan:
    """A plan that packs whole groups at the prompt's end, and again after each `period` tokens.

    A prompt with no more than `num_unpacked` tokens is packed once there are a period more.

    num_unpacked  tokens that stay as they are, at least; up to a block more do, so that groups are whole
    shares        format -> its share of what is packed, in the order of the classes 1, 2, ...; the last takes the rest
    period        rounded up to whole blocks
    Raises ConfigError where a format saves nothing.
    """
    size = shape.block_size
    num_unpacked = max(1, num_unpacked)
    num_groups = max(0, num_prompt_tokens - num_unpacked) // size
    period_groups = -(-period // size)
    first_point: int | None = num_prompt_tokens
    if not num_groups:
        num_groups = period_groups
        first_point = max(num_prompt_tokens, num_unpacked) + num_groups * size if period else None
    first, later = _divide(num_groups, list(shares.values())), _divide(period_groups, list(shares.values()))
    classes = tuple(
        PackedClass(name, _places(policy, name, shape), first[i] * size, later[i] * size)
        for i, name in enumerate(shares)
    )
    kept = num_prompt_tokens if first_point is None else first_point - num_groups * size
    return CachePlan(
        policy.name,
        Realisation.PACKED,
        first_point,
        period_groups * size,
        (kept,),
        num_queries=num_queries,
        places=max(each.places for each in classes),
        format="+".join(shares),
        classes=classes,
    )


def _divide(count: int, shares: list[float]) -> list[int]:
    """count as integers in these shares; the last one takes the rest."""
    firsts = [int(count * part + 0.5) for part in shares[:-1]]
    return [*firsts, count - sum(firsts)]


def _places(policy: Any, format: str, shape: CacheShape) -> int:
    codec = codecs_of(policy).get(format)
    if codec is None:
        if format not in FORMATS:
            raise ConfigError(f"{policy.name} has no codec {format!r}; known formats are {', '.join(FORMATS)}")
        places = packed_places(format, shape.head_dim, shape.head_dim_v, shape.block_size, shape.dtype)
    else:
        units = (shape.block_size * dim * shape.dtype.itemsize for dim in (shape.head_dim, shape.head_dim_v))
        places = min(unit // size for unit, size in zip(units, codec.group_bytes(shape), strict=True))
    if places < 1:
        raise ConfigError(f"{policy.name}: {format} takes more room than it saves; use another format")
    return places


def codecs_of(policy: Policy) -> Mapping[str, Codec]:
    return cast(Mapping[str, Codec], getattr(policy, "codecs", {}))


def side_of(policy: Policy) -> SideSpec | None:
    return cast(WritingPolicy, policy).side if hasattr(policy, "on_kv") else None


def with_writing(policy: Policy, plan: CachePlan, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
    """The plan as the policy's hooks on the write path need it."""
    side = side_of(policy)
    if side is None:
        return plan
    units = (shape.block_size * dim * shape.dtype.itemsize for dim in (shape.head_dim, shape.head_dim_v))
    side_tokens = sum(unit // side.num_bytes for unit in units)
    needs_unrotated = bool(getattr(policy, "needs_unrotated", False))
    num_queries = num_prompt_tokens if needs_unrotated else plan.num_queries
    return replace(plan, side_tokens=side_tokens, num_queries=num_queries, steps_singly=True)


def refusal(policy: Policy, plan: CachePlan, num_prompt_tokens: int, *, has_windows: bool, shows_hidden: bool) -> str:
    """Why the policy's hooks on the write path cannot be honoured; "" where they can."""
    is_writing, is_providing = hasattr(policy, "on_kv"), plan.num_provided > 0
    if (is_writing or is_providing) and not shows_hidden:
        return "looks at keys before their rotation, which a model that runs through transformers does not show"
    if is_writing and not plan.side_tokens:
        return "notes more of a token than a block holds"
    if is_writing and plan.realisation not in (Realisation.DENSE, Realisation.SLOTS, Realisation.BLOCKS):
        return f"notes something of each slot of one block table, and its plan ({plan.realisation.value}) leaves others"
    if is_providing and (plan.first_point is not None or policy.evidence is not None or is_writing):
        return "supplies the keys of the prompt, which nobody attended to, and wants to compress or note them, too"
    if is_providing and not plan.is_private:
        return "supplies keys that are not those of the tokens, and would share them: its plan must be private"
    if is_providing and plan.num_provided >= num_prompt_tokens:
        return "supplies the whole prompt; the last token must be computed"
    if plan.is_adaptive and (plan.period or plan.places or plan.first_point is None):
        return "finds out how many tokens stay, and packs or cuts again; it can do so at one point only"
    if plan.is_adaptive and plan.realisation not in (Realisation.SLOTS, Realisation.LAYERS, Realisation.HEADS):
        return f"finds out how many tokens stay, which its plan ({plan.realisation.value}) fixes"
    if plan.classes and has_windows:
        return "packs tokens, which the sliding windows of this model's layers cannot leave out"
    return ""
