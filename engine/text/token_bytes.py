"""The exact bytes behind a vocabulary entry, read off the `decoder` section of a tokenizer.json.

Covers byte-level, sentencepiece (with byte fallback) and word-piece vocabularies. Knows no ids and no streams.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class PieceDecoder:
    """How vocabulary strings become bytes.

    to_bytes        vocabulary string -> bytes, as they stand in the middle of a text
    added_to_bytes  the same for added tokens, which byte-level vocabularies hold as plain text
    leading_spaces  spaces that the encoder puts before a text and a full decode takes away again
    joins_words     pieces are words that a space separates (word-piece): the bytes begin with that space
    """

    to_bytes: Callable[[str], bytes]
    added_to_bytes: Callable[[str], bytes]
    leading_spaces: int
    joins_words: bool


def piece_decoder(decoder: dict[str, Any] | None) -> PieceDecoder:
    """Builds the mapping from the JSON of a decoder. Raises ConfigError for a kind that cannot be decoded piecewise."""
    if decoder is None:
        return PieceDecoder(_joined_word, _joined_word, leading_spaces=1, joins_words=True)
    steps = _flatten(decoder)
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return PieceDecoder(_byte_level, str.encode, leading_spaces=0, joins_words=False)
    if "WordPiece" in kinds:
        return _word_piece(next(step["prefix"] for step in steps if step["type"] == "WordPiece"))
    return _sentencepiece(steps)


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flatten(part)]
    return [decoder]


def _byte_alphabet() -> dict[str, int]:
    """Printable stand-ins of the 256 byte values in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    alphabet = {chr(value): value for value in printable}
    alphabet.update({chr(256 + index): value for index, value in enumerate(others)})
    return alphabet


BYTE_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[char] for char in piece])
    except KeyError:  # not written in the alphabet: the entry is plain text
        return piece.encode()


def _joined_word(piece: str) -> bytes:
    return b" " + piece.encode()


def _word_piece(prefix: str) -> PieceDecoder:
    def to_bytes(piece: str) -> bytes:
        return piece[len(prefix) :].encode() if piece.startswith(prefix) else _joined_word(piece)

    return PieceDecoder(to_bytes, to_bytes, leading_spaces=1, joins_words=True)


def _sentencepiece(steps: list[dict[str, Any]]) -> PieceDecoder:
    replacements: list[tuple[str, str]] = []
    has_byte_fallback = False
    leading_spaces = 0
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always") != "never":
                leading_spaces = 1
        elif kind == "ByteFallback":
            has_byte_fallback = True
        elif kind == "Strip" and step["content"] == " " and step["stop"] == 0:
            leading_spaces = step["start"]
        elif kind != "Fuse":
            raise ConfigError(
                f"the tokenizer's decoder step {kind!r} is not supported; supported are byte-level, sentencepiece "
                "(Metaspace, Replace, ByteFallback, Fuse, Strip) and WordPiece decoders"
            )

    def to_bytes(piece: str) -> bytes:
        if has_byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return PieceDecoder(to_bytes, to_bytes, leading_spaces=leading_spaces, joins_words=False)
