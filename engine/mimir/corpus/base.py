"""The form every task takes: a conversation whose last turn is the answer, and its ChatML text.

`segments` writes exactly what the chat template writes (a test compares them), split into scored and unscored text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

START, END = "<|im_start|>", "<|im_end|>"
THINK = "<think>\n"
_PIECE = re.compile(r"\d|[^\W\d_]+|[^\w\s]|_|\n")
TOKENS_PER_PIECE = 1.12  # measured on the generated text; names fall into several tokens


@dataclass(frozen=True)
class Turn:
    """One message: role "system", "user", "assistant" or "tool"."""

    role: str
    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with an assistant turn; `answer` is the part of that turn that must be right."""

    turns: tuple[Turn, ...]
    answer: str

    def prompt(self) -> str:
        """ChatML up to the last assistant turn, ready for generation (thinking opened where the turn thinks)."""
        text = "".join(_render(turn) for turn in self.turns[:-1]) + f"{START}assistant\n"
        return text + THINK if self.turns[-1].text.startswith(THINK) else text

    def segments(self) -> list[tuple[str, bool]]:
        """The whole conversation as (text, scored): assistant turns up to their end token are scored."""
        parts: list[tuple[str, bool]] = []
        for turn in self.turns:
            if turn.role != "assistant":
                parts.append((_render(turn), False))
                continue
            opened = THINK if turn.text.startswith(THINK) else ""
            parts.append((f"{START}assistant\n{opened}", False))
            parts.append((turn.text.removeprefix(opened) + END, True))
            parts.append(("\n", False))
        return parts


Maker = Callable[[Random, int], Chat]


def _render(turn: Turn) -> str:
    if turn.role == "tool":
        return f"{START}user\n<tool_response>\n{turn.text}\n</tool_response>{END}\n"
    return f"{START}{turn.role}\n{turn.text}{END}\n"


def ask(question: str, reply: str, answer: str | None = None, system: str | None = None) -> Chat:
    """A single exchange; `answer` defaults to the whole reply."""
    head = (Turn("system", system),) if system else ()
    return Chat((*head, Turn("user", question), Turn("assistant", reply)), reply if answer is None else answer)


def dialogue(*texts: str, answer: str | None = None, system: str | None = None) -> Chat:
    """Alternating user and assistant texts, user first, assistant last."""
    turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    head = (Turn("system", system),) if system else ()
    return Chat((*head, *turns), texts[-1] if answer is None else answer)


def estimate_tokens(text: str) -> int:
    """About how many tokens `text` has, without a tokenizer."""
    return int(len(_PIECE.findall(text)) * TOKENS_PER_PIECE)


def pick(rng: Random, *options: str) -> str:
    return options[int(rng.random() * len(options))]


def sentence(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
