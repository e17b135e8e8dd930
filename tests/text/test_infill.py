"""Fill-in-the-middle prompts over vocabularies of every kind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tokenizers import AddedToken

from engine.config import Limits
from engine.errors import PromptTooLong, UnsupportedParameter
from engine.faults import Faults
from engine.prompts import PromptEncoder
from engine.text.infill import FORMS, InfillMarks, find_infill
from engine.text.tokenizer import Tokenizer
from tests.text import vocabularies


def tokenizer_with(folder: Path, form: InfillMarks, kind: str = "byte_level", *, is_special: bool = True) -> Tokenizer:
    built = getattr(vocabularies, kind)()
    texts = (form.prefix, form.suffix, form.middle, *form.ends)
    built.add_tokens([AddedToken(text, special=is_special, normalized=False) for text in texts])
    return Tokenizer.from_folder(vocabularies.save(folder, built, bos_token="<s>"))


def infill(tokenizer: Tokenizer, prefix: str | list[int], suffix: str, max_tokens: int = 100) -> list[int]:
    async def run() -> list[int]:
        encoder = PromptEncoder(tokenizer, Limits(), Faults({}))
        try:
            ids, _ = await encoder.infill(
                prefix, suffix, max_tokens=max_tokens, add_special_tokens=True, param="prompt"
            )
            return ids
        finally:
            await encoder.close()

    return asyncio.run(run())


@pytest.mark.parametrize("form", FORMS, ids=[form.prefix for form in FORMS])
@pytest.mark.parametrize("is_special", [True, False])
def test_each_form_is_found_and_puts_the_parts_between_its_marks(
    tmp_path: Path, form: InfillMarks, is_special: bool
) -> None:
    tokenizer = tokenizer_with(tmp_path, form, is_special=is_special)
    assert tokenizer.infill is not None
    ids = infill(tokenizer, "def add(a, b):", "return a + b")
    assert tokenizer.decode(ids) == f"<s>{form.prefix}def add(a, b):{form.suffix}return a + b{form.middle}"
    assert ids[0] == tokenizer.bos_token_id
    assert len(tokenizer.infill.end_ids) == len(form.ends)


def test_marks_in_what_users_write_are_text_where_they_are_control_tokens(tmp_path: Path) -> None:
    form = FORMS[1]
    tokenizer = tokenizer_with(tmp_path, form)
    assert tokenizer.infill is not None
    ids = infill(tokenizer, f"a{form.middle}b", form.suffix)
    assert ids.count(tokenizer.infill.middle_id) == 1
    assert ids.count(tokenizer.infill.suffix_id) == 1


def test_a_sentencepiece_suffix_gets_no_space_of_its_own(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, FORMS[3], "sentencepiece")
    assert tokenizer.infill is not None
    ids = infill(tokenizer, "hello", "world")
    cut = ids.index(tokenizer.infill.suffix_id)
    assert b"".join(map(tokenizer.token_bytes, ids[cut + 1 : -1])) == b"world"
    assert tokenizer.token_bytes(ids[cut - 1]) == b" hello", "the beginning is text as at any beginning"


def test_a_prefix_of_token_ids_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, FORMS[0])
    assert tokenizer.infill is not None
    prefix = tokenizer.encode("one two", add_special_tokens=False)
    assert infill(tokenizer, prefix, "three")[: len(prefix) + 1] == [tokenizer.infill.prefix_id, *prefix]


def test_a_vocabulary_with_a_mark_missing_is_refused(tmp_path: Path) -> None:
    assert find_infill({"<fim_prefix>": 1, "<fim_suffix>": 2}) is None
    with pytest.raises(UnsupportedParameter) as caught:
        infill(vocabularies.load(tmp_path, "byte_level"), "a", "b")
    assert caught.value.param == "suffix"


def test_a_suffix_that_cannot_fit_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    with pytest.raises(PromptTooLong) as caught:
        infill(tokenizer_with(tmp_path, FORMS[0]), "a", "b" * 10_000, max_tokens=10)
    assert caught.value.param == "suffix"
