"""How much any lossless rule could accept of k independent drafts: the yardstick of the verifiers that use q."""

from __future__ import annotations

import numpy as np

from engine.speculation.verifiers.common import Law


def alpha_star(p: Law, q: Law, k: int) -> float:
    """The best possible acceptance at one node: min over sets H of p(H) + 1 - q(H)^k.

    p, q [V]. The smallest is reached by the tokens with the lowest p / q, so one sort finds it.
    """
    order = np.argsort(np.divide(p, q, out=np.full_like(p, np.inf), where=q > 0.0), kind="stable")
    p_of, q_of = np.concatenate(([0.0], np.cumsum(p[order]))), np.concatenate(([0.0], np.cumsum(q[order])))
    return float((p_of + 1.0 - q_of**k).min())
