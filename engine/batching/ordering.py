"""In which order a batch runs: requests that share a prefix together, decode-heavy groups first.

Pure functions of token ids and lengths. Source: BatchLLM (arXiv:2412.03594), group scheduling by decode ratio.
Differs: groups below one common prefix stay neighbours, because our prefix cache shares at every level.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from engine.batching import prefix_tree


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a batch, as far as its order depends on it."""

    blocks: prefix_tree.Keys  # `block_keys` of its prompt; empty: unknown, it shares nothing
    num_prompt_tokens: int
    expected_output: int  # tokens
    domain: str = ""  # requests of different domains never share: cache salts


@dataclass(frozen=True, slots=True)
class Group:
    """Requests to run together. `prefix_tokens` of each of their prompts are equal; 0: it is one request alone."""

    prefix_tokens: int
    members: tuple[int, ...]  # places in the batch


def block_keys(token_ids: Sequence[int], block_size: int) -> prefix_tree.Keys:
    """One 64-bit number per whole cache block; equal numbers mean equal tokens, but for one chance in 2^64."""
    tokens = array("q", token_ids)
    keys = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        digest = hashlib.blake2b(tokens[start : start + block_size].tobytes(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little"))
    return tuple(keys)


def plan(items: Sequence[Item], block_size: int) -> list[Group]:
    """Every item exactly once, in groups, in the order to run them."""
    families: list[list[Group]] = []  # groups that have a beginning in common
    domains: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        domains.setdefault(item.domain, []).append(place)
    for places in domains.values():
        root = prefix_tree.build([items[place].blocks for place in places])
        families += [[Group(0, (places[index],))] for index in root.ends]
        for top in root.children:
            families.append(_groups(top, places, block_size))
    ordered = [
        sorted((_inside_out(group, items) for group in family), key=lambda group: -decode_ratio(group, items))
        for family in families
    ]
    ordered.sort(key=lambda family: -_ratio_of(family, items))
    return [group for family in ordered for group in family]


def decode_ratio(group: Group, items: Sequence[Item]) -> float:
    """Expected output tokens per prompt token, the shared prefix counted once."""
    return _ratio_of([group], items)


def num_computed_tokens(groups: Sequence[Group], items: Sequence[Item]) -> int:
    """Prompt tokens that are computed when every group's prefix is computed once and nothing else is shared."""
    return sum(_prompt_tokens(group, items) for group in groups)


def _groups(top: prefix_tree.Node, places: Sequence[int], block_size: int) -> list[Group]:
    groups = []
    for prefix in prefix_tree.flatten(top):
        members = tuple(sorted(places[index] for index in prefix.members))
        if prefix.length and len(members) > 1:
            groups.append(Group(prefix.length * block_size, members))
        else:
            groups += [Group(0, (member,)) for member in members]
    return groups


def _inside_out(group: Group, items: Sequence[Item]) -> Group:
    """Decode-heavy members first: the group's last ones are then short, and the next group can start."""

    def ratio(place: int) -> float:
        return items[place].expected_output / max(items[place].num_prompt_tokens - group.prefix_tokens, 1)

    return Group(group.prefix_tokens, tuple(sorted(group.members, key=lambda place: (-ratio(place), place))))


def _ratio_of(groups: Sequence[Group], items: Sequence[Item]) -> float:
    output = sum(items[place].expected_output for group in groups for place in group.members)
    return output / max(sum(_prompt_tokens(group, items) for group in groups), 1)


def _prompt_tokens(group: Group, items: Sequence[Item]) -> int:
    tails = sum(items[place].num_prompt_tokens - group.prefix_tokens for place in group.members)
    return group.prefix_tokens + tails
