"""Rules that turn a draft and the target's distributions into tokens without changing what the target would say.

`walk` is the default and takes any draft. The others accept more where a drafter draws its tokens at random, and need
the distributions that it drew from. All are exact: `tests/speculation/test_verifiers.py` enumerates them.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.speculation.tree import DraftTree, Kind
from engine.speculation.verifiers.block import block
from engine.speculation.verifiers.bound import alpha_star
from engine.speculation.verifiers.common import Chance, KeyedChance, Rows, Verdict
from engine.speculation.verifiers.k_sequential import k_sequential
from engine.speculation.verifiers.multi_draft import multi_draft
from engine.speculation.verifiers.multi_round import multi_round
from engine.speculation.verifiers.rejection import rejection
from engine.speculation.verifiers.rrs import rrs
from engine.speculation.verifiers.walk import sample_once, walk

__all__ = ["MOST_ACCEPTING", "VERIFIERS", "Chance", "KeyedChance", "Rows", "Verdict", "alpha_star", "verify", "walk"]

Verifier = Callable[[DraftTree, Rows, Chance], Verdict]

VERIFIERS: dict[str, tuple[Verifier, frozenset[Kind]]] = {
    "walk": (sample_once, frozenset({"delta", "swor", "iid"})),
    "rejection": (rejection, frozenset({"swor", "iid"})),
    "block": (block, frozenset({"swor", "iid"})),
    "rrs": (rrs, frozenset({"swor"})),
    "multi_round": (multi_round, frozenset({"iid"})),
    "k_sequential": (k_sequential, frozenset({"iid"})),
    "multi_draft": (multi_draft, frozenset({"iid"})),
}
"""Name -> the rule and the kinds of drafts that it takes. `rejection` and `block` take chains only."""

MOST_ACCEPTING: dict[Kind, str] = {"delta": "walk", "swor": "rrs", "iid": "multi_draft"}
"""What accepts most of a draft that branches; of a sampled chain that is `block`."""


def verify(name: str, tree: DraftTree, p: Rows, chance: Chance) -> Verdict:
    """Judge a draft by the named rule, or by `walk` where the draft is not of a kind (or shape) that the rule takes.

    That is what keeps a request exact whatever its drafters bring: host drafters, cut trees, merged trees.
    """
    rule, kinds = VERIFIERS[name]
    is_chain_rule = name in ("rejection", "block")
    if tree.kind not in kinds or (is_chain_rule and not tree.is_chain) or not len(tree):
        rule = sample_once
    return rule(tree, p, chance)
