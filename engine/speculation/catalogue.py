"""All drafters that come with the engine: importing this fills the registry, one import each."""

from __future__ import annotations

from engine.speculation import (
    aded,
    draft_model,
    dyspec,
    eagle,
    goose,
    lookahead,
    multi_draft,
    ngram,
    rsd,
    sequoia,
    spectr,
    suffix,
    token_recycling,
)
from engine.speculation.base import drafters

HOST_DRAFTERS = (aded, goose, lookahead, ngram, suffix, token_recycling)
MODEL_DRAFTERS = {
    drafter.name: drafter
    for drafter in (
        draft_model.DraftModel,
        dyspec.DySpec,
        multi_draft.MultiDraft,
        rsd.RsdBeam,
        rsd.RsdConstant,
        sequoia.Sequoia,
        spectr.SpecTr,
    )
}
"""Those that guess with a small language model, which has to be there."""
HEAD_DRAFTERS = {eagle.Eagle.name: eagle.Eagle}
"""Those that guess with a head that was trained for the target, which has to be there."""

__all__ = ["HEAD_DRAFTERS", "HOST_DRAFTERS", "MODEL_DRAFTERS", "drafters"]
