"""Independent chains like SpecTr's, for the importance-weighted verifier.

Source: Khisti et al. 2024, arXiv:2410.18234.
"""

from __future__ import annotations

from typing import ClassVar

from engine.speculation.base import drafters
from engine.speculation.spectr import SpecTr


@drafters.register("multi_draft")
class MultiDraft(SpecTr):
    """Independent chains; one of them is chosen by importance and then verified."""

    name = "multi_draft"
    verifier: ClassVar[str] = "multi_draft"
