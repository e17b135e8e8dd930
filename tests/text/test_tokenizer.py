"""Tokenizer: exact bytes, no control tokens from users, explicit beginnings, unusable files."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders

from engine.errors import ConfigError, InvalidParameter
from engine.launch import resolve_model_path
from engine.text.rendered import RenderedText, stand_in
from engine.text.tokenizer import Tokenizer
from tests.text import vocabularies

LOSSLESS = ["byte_level", "sentencepiece"]
BUNDLED = Tokenizer.from_folder(resolve_model_path("mimir"))
LIBRARY = tokenizers.Tokenizer.from_file(str(resolve_model_path("mimir") / "tokenizer.json"))


@pytest.fixture(params=vocabularies.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_special_tokens_typed_by_users_become_ordinary_text(tmp_path: Path, kind: str) -> None:
    tokenizer = vocabularies.load(tmp_path, kind)
    for text in vocabularies.SPECIAL:
        ids = tokenizer.encode(f"hello {text} world", add_special_tokens=False)
        assert not set(ids) & tokenizer.special_ids
        if kind in LOSSLESS:
            assert tokenizer.decode(ids) == f"hello {text} world"


@pytest.mark.parametrize("text", sorted(BUNDLED.control_tokens))
def test_every_special_token_of_the_bundled_model_round_trips_as_text(text: str) -> None:
    for written in (text, f"a{text}b", f" {text}\n", text * 3):
        ids = BUNDLED.encode(written)
        assert not set(ids) & BUNDLED.special_ids
        assert BUNDLED.decode(ids) == written


def test_markup_that_models_write_keeps_its_single_id(tmp_path: Path) -> None:
    tokenizer = vocabularies.load(tmp_path, "byte_level")
    ids = tokenizer.encode("<think>hello</think>", add_special_tokens=False)
    assert [tokenizer.token_text(token_id) for token_id in (ids[0], ids[-1])] == ["<think>", "</think>"]


def test_turn_marks_of_the_template_are_control_tokens_even_when_not_flagged_special(tmp_path: Path) -> None:
    raw = vocabularies.byte_level()
    raw.add_tokens([AddedToken("<start_of_turn>", special=False), AddedToken("\n\n", special=False)])
    template = "<start_of_turn>{{ messages[0].content }}\n\n<think>"
    tokenizer = Tokenizer.from_folder(vocabularies.save(tmp_path, raw, chat_template=template))
    assert "<start_of_turn>" in tokenizer.control_tokens
    assert not {"\n\n", "<think>"} & tokenizer.control_tokens
    turn = raw.token_to_id("<start_of_turn>")
    assert turn not in tokenizer.encode("<start_of_turn>")
    assert turn in tokenizer.encode_rendered(RenderedText("<start_of_turn>hello"))
    assert turn not in tokenizer.special_ids, "only what the vocabulary flags is hidden from the output"


def test_look_alikes_that_normalise_to_a_control_token_do_not_become_one(tmp_path: Path) -> None:
    raw = vocabularies.metaspace()
    raw.add_special_tokens([AddedToken("<|stop|>", special=True, normalized=True)])
    tokenizer = Tokenizer.from_folder(vocabularies.save(tmp_path, raw))
    fullwidth = "hello \uff1c|stop|\uff1e"
    assert not set(tokenizer.encode(fullwidth)) & tokenizer.special_ids
    assert not set(tokenizer.encode_rendered(RenderedText(fullwidth))) & tokenizer.special_ids


def test_rendered_text_is_encoded_as_the_library_does(tmp_path: Path, kind: str) -> None:
    tokenizer = vocabularies.load(tmp_path, kind)
    text = "<s><|turn|>user\nhello world<|end|>\n<|turn|>assistant\n"
    expected = vocabularies.KINDS[kind]().encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_rendered(RenderedText(text)) == expected


def test_protected_characters_keep_users_control_tokens_apart_from_the_templates(tmp_path: Path) -> None:
    tokenizer = vocabularies.load(tmp_path, "byte_level")
    nonce = "123456789012345678901234"
    text = f"<|turn|>user\nhello {stand_in(nonce, '<')}|end|>9 world<|end|>\n"
    ids = tokenizer.encode_rendered(RenderedText(text, nonce))
    assert tokenizer.decode(ids) == "<|turn|>user\nhello <|end|>9 world<|end|>\n"
    names = [tokenizer.token_text(token_id) for token_id in ids if token_id in tokenizer.special_ids]
    assert names == ["<|turn|>", "<|end|>"]


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_bytes_of_the_ids_are_the_bytes_of_the_text(text: str) -> None:
    ids = BUNDLED.encode(text, add_special_tokens=False)
    assert b"".join(map(BUNDLED.token_bytes, ids)) == text.encode()
    assert BUNDLED.decode(ids) == text


@pytest.mark.parametrize("kind_name", LOSSLESS)
def test_text_outside_the_trained_alphabet_round_trips(tmp_path: Path, kind_name: str) -> None:
    tokenizer = vocabularies.load(tmp_path, kind_name)
    for text in ("hello 🙂👍🏽", "ab\u0000\x7f", "漢字 e\u0301", "a  b\n\tc"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, BUNDLED.vocab_size - 1), max_size=40))
def test_decode_of_any_ids_equals_the_library(ids: list[int]) -> None:
    assert BUNDLED.decode(ids) == LIBRARY.decode(ids, skip_special_tokens=False)
    assert BUNDLED.decode(ids, skip_special_tokens=True) == LIBRARY.decode(ids, skip_special_tokens=True)


def test_decode_of_words_equals_the_library(tmp_path: Path, kind: str) -> None:
    tokenizer, library = vocabularies.load(tmp_path, kind), vocabularies.KINDS[kind]()
    for text in ("hello world", "hello", " hello,  world"):
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_ids_outside_the_vocabulary_have_no_text(tmp_path: Path) -> None:
    tokenizer = vocabularies.load(tmp_path, "byte_level")
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""


def test_explicit_beginning_and_end_win_over_the_vocabulary_file(tmp_path: Path) -> None:
    bos, eos = (vocabularies.byte_level().token_to_id(text) for text in ("<s>", "<|end|>"))
    plain = vocabularies.load(tmp_path / "a", "byte_level")
    assert plain.encode("hello")[0] == bos
    assert plain.encode("hello", add_special_tokens=False)[0] != bos
    without = vocabularies.load(tmp_path / "b", "byte_level", add_bos_token=False, add_eos_token=True)
    assert without.encode("hello") == [*plain.encode("hello")[1:], eos]
    forced = vocabularies.load(tmp_path / "c", "sentencepiece", add_bos_token=True)
    assert forced.encode("hello")[:1] == [forced.bos_token_id]


def test_padding_and_truncation_saved_in_the_file_are_ignored(tmp_path: Path) -> None:
    raw = vocabularies.byte_level()
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    tokenizer = Tokenizer.from_folder(vocabularies.save(tmp_path, raw))
    text = "hello world, the quick brown fox"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokens_that_only_the_config_lists_are_added(tmp_path: Path) -> None:
    next_id = vocabularies.byte_level().get_vocab_size()
    listed = {str(next_id): {"content": "<|extra|>", "special": True}}
    tokenizer = vocabularies.load(tmp_path, "byte_level", added_tokens_decoder=listed)
    assert tokenizer.vocab_size == next_id + 1
    assert next_id in tokenizer.special_ids
    assert next_id not in tokenizer.encode("<|extra|>")


def test_end_tokens_come_from_generation_config_and_tokenizer(tmp_path: Path) -> None:
    folder = vocabularies.save(tmp_path, vocabularies.byte_level())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    assert Tokenizer.from_folder(folder).eos_token_ids == (7, 1, 0)


def test_lone_surrogates_are_the_clients_fault(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="surrogates"):
        vocabularies.load(tmp_path, "byte_level").encode("a\ud800b")


def test_a_checkpoint_without_tokenizer_json_is_converted_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Converted:
        backend_tokenizer = vocabularies.sentencepiece()

    class AutoTokenizer:
        @staticmethod
        def from_pretrained(folder: str, *, trust_remote_code: bool, local_files_only: bool) -> Converted:
            assert (trust_remote_code, local_files_only) == (False, True)
            if not (Path(folder) / "tokenizer.model").exists():
                raise OSError("no vocabulary")
            return Converted()

    stub = types.ModuleType("transformers")
    stub.AutoTokenizer = AutoTokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", stub)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert Tokenizer.from_folder(tmp_path).encode("hello") == Converted.backend_tokenizer.encode("hello").ids


def test_unusable_files_are_named(tmp_path: Path) -> None:
    folder = vocabularies.save(tmp_path / "a", vocabularies.byte_level())
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be used"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("[")
    with pytest.raises(ConfigError, match=r"cannot read tokenizer\.json"):
        Tokenizer.from_folder(folder)
    listed = {"9": {"content": "<|elsewhere|>", "special": True}}
    with pytest.raises(ConfigError, match="disagree"):
        vocabularies.load(tmp_path / "b", "byte_level", added_tokens_decoder=listed)
    raw = vocabularies.byte_level()
    raw.decoder = decoders.CTC()
    with pytest.raises(ConfigError, match="CTC"):
        Tokenizer.from_folder(vocabularies.save(tmp_path / "c", raw))
    with pytest.raises(ConfigError, match="--chat-template"):
        Tokenizer.from_folder(vocabularies.save(tmp_path / "d", vocabularies.byte_level()), tmp_path / "missing.jinja")


def test_chat_template_comes_from_the_operator_then_the_file_then_the_config(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = vocabularies.save(tmp_path, vocabularies.byte_level(), chat_template=named)
    assert Tokenizer.from_folder(folder).files.chat_template == "D"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_folder(folder).files.chat_template == "F"
    (tmp_path / "mine.jinja").write_text("M")
    assert Tokenizer.from_folder(folder, tmp_path / "mine.jinja").files.chat_template == "M"
