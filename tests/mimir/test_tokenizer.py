"""The bundled tokenizer: round trips, single digits, one vocabulary in both libraries."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.mimir import MODELS, model_path
from engine.mimir.tokenizer import CONTROL_TOKENS, MARKUP_TOKENS, VOCAB_SIZE


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_path() / "tokenizer.json"))


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(data=st.binary())
def test_any_bytes_survive_as_latin_text(tokenizer: Tokenizer, data: bytes) -> None:
    text = data.decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False).encode("latin-1") == data


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    single = [token for token in tokenizer.get_vocab() if len(token) == 1]
    assert len(single) >= 256


def test_digits_are_split_singly(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("20461").tokens == ["2", "0", "4", "6", "1"]


def test_special_tokens_are_single_and_come_first(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text).ids for text in (*CONTROL_TOKENS, *MARKUP_TOKENS)]
    assert ids == [[index] for index in range(len(ids))]


def test_control_tokens_vanish_and_markup_stays_in_decoded_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|><tool_call>x</tool_call><|im_end|>").ids
    assert tokenizer.decode(ids) == "<tool_call>x</tool_call>"


def test_both_models_share_one_vocabulary() -> None:
    files = [(model_path(name) / "tokenizer.json").read_bytes() for name in MODELS]
    assert files[0] == files[1]
    assert Tokenizer.from_str(files[0].decode()).get_vocab_size() == VOCAB_SIZE


def test_unknown_bundled_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no bundled model 'odin'"):
        model_path("odin")
