"""Fill in the middle: a beginning and an end as the prompt that makes a code model write what belongs between them.

The forms are those of CodeLlama (arXiv:2308.12950), StarCoder (2305.06161), DeepSeek-Coder (2401.14196) and
Qwen2.5-Coder (2409.12186). Which of them a model knows shows in its vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class InfillMarks:
    """The texts of the tokens around the parts, in the order in which all these models take them."""

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...]  # each ends the middle, besides the end-of-sequence token; not every model has all


FORMS = (
    # Qwen2.5-Coder and CodeGemma; the end marks keep a model from going on with the next file of a repository
    InfillMarks(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder 1 and 2, Granite Code
    InfillMarks("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>", "<fim_pad>", "<file_sep>")),
    InfillMarks("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<|endoftext|>", "<fim-pad>")),  # SantaCoder
    InfillMarks("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),  # CodeLlama
    InfillMarks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ()),  # DeepSeek-Coder
)


@dataclass(frozen=True)
class Infill:
    """One vocabulary's form."""

    prefix_id: int
    suffix_id: int
    middle_id: int
    end_ids: tuple[int, ...]

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """Token ids of the prompt; the parts are ids without a beginning-of-text token."""
        return [self.prefix_id, *prefix, self.suffix_id, *suffix, self.middle_id]


def find_infill(ids: Mapping[str, int]) -> Infill | None:
    """The form that a vocabulary (token text -> id) has all three marks of."""
    for form in FORMS:
        marks = [ids.get(text) for text in (form.prefix, form.suffix, form.middle)]
        if None not in marks:
            prefix, suffix, middle = (mark for mark in marks if mark is not None)
            return Infill(prefix, suffix, middle, tuple(ids[text] for text in form.ends if text in ids))
    return None
