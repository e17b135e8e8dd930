"""Text <-> token ids over one vocabulary, and the exact bytes of every id. Knows no templates, streams or requests.

Text that users wrote never yields control tokens: a second copy of the tokenizer, with their parsing switched off,
encodes it (CVE-2026-44222). Only text that the server's own chat template wrote is parsed in full.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers

from engine.errors import ConfigError, InvalidParameter
from engine.text.infill import find_infill
from engine.text.rendered import RenderedText
from engine.text.token_bytes import piece_decoder
from engine.text.tokenizer_files import TokenizerFiles, read

_MARK = "☺"  # stands alone: no vocabulary joins it with what follows


class Tokenizer:
    """One vocabulary. All methods are safe to call from several threads, and encoding releases the interpreter lock."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Raises ConfigError when the definition cannot be used."""
        self.files = files
        added = {token["content"]: token for token in files.definition["added_tokens"]}
        named = {text for text in (*files.named_tokens.values(), *files.extra_tokens) if text in added}
        special = {text for text, token in added.items() if token["special"]} | named
        self.control_tokens = frozenset(special | _template_tokens(added, files.chat_template or ""))
        self._trusting = _build(files.definition)
        self._guarded = _build(_with_special(files.definition, self.control_tokens))
        self._guarded.encode_special_tokens = True
        for text, token in added.items():
            if self._trusting.token_to_id(text) != token["id"]:
                raise ConfigError(
                    f"the tokenizer files disagree: token {text!r} is listed with id {token['id']}, the vocabulary "
                    f"gives {self._trusting.token_to_id(text)}; is the download complete?"
                )
        self._added_ids = frozenset(token["id"] for token in added.values())
        self._control_ids = {added[text]["id"]: text for text in self.control_tokens}
        self._normalises_controls = any(added[text]["normalized"] for text in self.control_tokens)
        # hidden from users by skip_special_tokens
        self.special_ids = frozenset(added[text]["id"] for text in special)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_ids = self._eos_ids(files)
        vocabulary: dict[str, int] = self._trusting.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.infill = find_infill(vocabulary)  # None: the model cannot fill in the middle
        self._pieces = piece_decoder(files.definition.get("decoder"))
        self._bytes: dict[int, bytes] = {}
        self._whole_texts: dict[int, str | None] = {}

    @classmethod
    def from_folder(cls, folder: Path | str, chat_template: Path | str | None = None) -> Tokenizer:
        """Reads a checkpoint folder. Raises ConfigError that names the file at fault."""
        return cls(read(Path(folder), Path(chat_template) if chat_template else None))

    @property
    def joins_words(self) -> bool:
        """Whether pieces are words with a space before them, as in word-piece vocabularies."""
        return self._pieces.joins_words

    def is_added(self, token_id: int) -> bool:
        return token_id in self._added_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of text that a user wrote. Control tokens in it become ordinary text, markup tokens keep their ids.

        add_special_tokens   surround with what the vocabulary asks for, usually a beginning-of-text token
        Raises InvalidParameter for text that is not valid Unicode (lone surrogates).
        """
        ids = self._encode(self._guarded, text, add_special_tokens)
        return self._with_explicit_ends(ids) if add_special_tokens else ids

    def encode_inner(self, text: str) -> list[int]:
        """`encode` for text in the middle of a sequence: without the space that some vocabularies put before a text."""
        ids = self.encode(text, add_special_tokens=False)
        if not self._pieces.leading_spaces:
            return ids
        mark = self.encode(_MARK, add_special_tokens=False)
        marked = self.encode(_MARK + text, add_special_tokens=False)
        return marked[len(mark) :] if marked[: len(mark)] == mark else ids

    def encode_cut(
        self,
        text: str,
        second: str | None = None,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        max_second_tokens: int | None = None,
        side: Literal["left", "right"] = "right",
    ) -> tuple[list[int], int]:
        """Ids of one text, or of a pair in one sequence, cut before the special tokens are added.

        max_tokens          of all, special ones included; of a pair the second text gives way
        max_second_tokens   of the second text alone
        side                where tokens are dropped
        Returns the ids and how many of them belong to the first of a pair where the vocabulary tells the two apart,
        else 0. Raises InvalidParameter as `encode`.
        """
        first = _encode_batch(self._guarded.encode_batch_fast, text, False)
        last = first if second is None else _encode_batch(self._guarded.encode_batch_fast, second, False)
        if second is not None and max_second_tokens is not None:
            last.truncate(min(max_second_tokens, len(last)), direction=side)
        pair = None if second is None else last
        ids, num_first = self._finish(first, pair, add_special_tokens)
        excess = 0 if max_tokens is None else len(ids) - max_tokens
        if excess > 0:
            last.truncate(max(len(last) - excess, 0), direction=side)
            ids, num_first = self._finish(first, pair, add_special_tokens)
        return ids, num_first

    def _finish(self, first: Any, second: Any, add_special_tokens: bool) -> tuple[list[int], int]:
        """Adds the special tokens to encodings without them."""
        whole = self._guarded.post_process(first, second, add_special_tokens)
        ids: list[int] = list(whole.ids)
        num_first = whole.type_ids.index(1) if second is not None and 1 in whole.type_ids else 0
        ended = self._with_explicit_ends(ids) if add_special_tokens else ids
        return ended, num_first if len(ended) == len(ids) else 0

    def encode_rendered(self, rendered: RenderedText) -> list[int]:
        """Ids of a rendered chat template: control tokens of the template are parsed, those of users are not.

        Usually the text is encoded as a whole, exactly as `transformers` would. Where it holds protected characters or
        look-alikes that normalise to a control token, the text between two of the template's control tokens is encoded
        as user text, on its own; sentencepiece vocabularies then may begin such a stretch with one more space piece.
        """
        if rendered.nonce is None and not self._normalises_controls:
            return self._encode(self._trusting, rendered.text, False)
        text = rendered.text
        encoding = _encode_batch(self._trusting.encode_batch, text, False)
        controls = [
            (token_id, start, end)
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id in self._control_ids
        ]
        genuine = [mark for mark in controls if text[mark[1] : mark[2]].strip() == self._control_ids[mark[0]].strip()]
        if rendered.nonce is None and len(genuine) == len(controls):
            return list(encoding.ids)
        ids: list[int] = []
        position = 0
        for token_id, start, end in genuine:
            ids += self._encode(self._guarded, rendered.restore(text[position:start]), False)
            ids.append(token_id)
            position = end
        return ids + self._encode(self._guarded, rendered.restore(text[position:]), False)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of a whole sequence. Bytes that are not UTF-8 become replacement characters."""
        if skip_special_tokens:
            token_ids = [token_id for token_id in token_ids if token_id not in self.special_ids]
        data = b"".join(map(self.token_bytes, token_ids))
        spaces = self._pieces.leading_spaces
        head = data[:spaces]
        return (data[len(head) - len(head.lstrip(b" ")) :]).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds in the middle of a text; empty for ids outside the vocabulary."""
        data = self._bytes.get(token_id)
        if data is None:
            piece = self._trusting.id_to_token(token_id)
            if piece is None:
                data = b""
            else:
                to_bytes = self._pieces.added_to_bytes if token_id in self._added_ids else self._pieces.to_bytes
                data = to_bytes(piece)
            self._bytes[token_id] = data
        return data

    def whole_text(self, token_id: int) -> str | None:
        """The text of a token whose bytes are whole characters; None for one that begins or continues a character."""
        if token_id not in self._whole_texts:
            data = self.token_bytes(token_id)
            text = data.decode("utf-8", errors="replace")
            self._whole_texts[token_id] = text if text.encode() == data else None
        return self._whole_texts[token_id]

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, for display: parts of characters show as replacement characters."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = _encode_batch(tokenizer.encode_batch_fast, text, add_special_tokens).ids
        return ids

    def _with_explicit_ends(self, ids: list[int]) -> list[int]:
        """Applies add_bos_token and add_eos_token of tokenizer_config.json over what tokenizer.json does."""
        bos, eos = self.bos_token_id, self._named_id("eos_token")
        if self.files.add_bos is not None and bos is not None:
            ids = ids[1:] if ids[:1] == [bos] else ids
            ids = [bos, *ids] if self.files.add_bos else ids
        if self.files.add_eos is not None and eos is not None:
            ids = ids[:-1] if ids[-1:] == [eos] else ids
            ids = [*ids, eos] if self.files.add_eos else ids
        return ids

    def _named_id(self, name: str) -> int | None:
        text = self.files.named_tokens.get(name)
        token_id: int | None = None if text is None else self._trusting.token_to_id(text)
        return token_id

    def _eos_ids(self, files: TokenizerFiles) -> tuple[int, ...]:
        own = self._named_id("eos_token")
        return tuple(dict.fromkeys((*files.eos_token_ids, *(() if own is None else (own,)))))


def _build(definition: dict[str, object]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"tokenizer.json cannot be used: {error}") from None
    # a file saved during training may cut or pad every text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode_batch(encode: Callable[..., Any], text: str, add_special_tokens: bool) -> Any:
    """One text through a batch call: those release the interpreter lock, `encode` holds it, for seconds at times."""
    try:
        return encode([text], add_special_tokens=add_special_tokens)[0]
    except (UnicodeEncodeError, TypeError):
        raise InvalidParameter("the text is not valid Unicode: it contains lone surrogates") from None


def _with_special(definition: dict[str, object], texts: frozenset[str]) -> dict[str, object]:
    """The same vocabulary with exactly `texts` flagged special, which is what `encode_special_tokens` switches off."""
    added: Sequence[dict[str, object]] = definition["added_tokens"]  # type: ignore[assignment]
    flagged = [{**token, "special": token["content"] in texts} for token in added]
    return {**definition, "added_tokens": flagged}


def _template_tokens(added: Iterable[str], template: str) -> set[str]:
    """Added tokens that mark turns although the vocabulary does not flag them special (Gemma, DeepSeek).

    Those are the ones that the chat template writes, except markup elements with an end tag, such as <think> and
    <tool_call>, which are part of what models and people write, and except white space.
    """
    texts = set(added)

    def is_element(text: str) -> bool:
        match = re.fullmatch(r"</?([\w-]+)>", text)
        return match is not None and {f"<{match[1]}>", f"</{match[1]}>"} <= texts

    return {text for text in texts if text in template and text.strip() and not is_element(text)}
