"""The text of a rendered chat template, with stand-ins for the characters by which users could forge control tokens."""

from __future__ import annotations

import re

import msgspec

CODE_POINT_DIGITS = 7  # 0x10FFFF has seven decimal digits


class RenderedText(msgspec.Struct, frozen=True):
    """`text` is what the template wrote. Where `nonce` is set, `nonce` plus seven digits stands for one character.

    The nonce is drawn anew for each text, so that nobody can write it into a message.
    """

    text: str
    nonce: str | None = None

    def restore(self, part: str) -> str:
        """`part` of the text with every stand-in replaced by its character."""
        if self.nonce is None:
            return part
        stand_in = re.compile(f"{self.nonce}([0-9]{{{CODE_POINT_DIGITS}}})")
        return stand_in.sub(lambda match: chr(int(match[1])), part)

    def plain(self) -> str:
        """The text for display."""
        return self.restore(self.text)


def stand_in(nonce: str, char: str) -> str:
    """The digits that stand for `char`."""
    return f"{nonce}{ord(char):0{CODE_POINT_DIGITS}d}"
