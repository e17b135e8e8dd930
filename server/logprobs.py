"""The three shapes in which log-probabilities leave the server: chat, completions, and prompt_logprobs."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.types import LogprobEntry

LOWEST = -9999.0  # JSON has no minus infinity


def for_chat(entries: Sequence[LogprobEntry], num_top: int, *, as_ids: bool) -> dict[str, Any]:
    """`logprobs` of a chat choice: exactly `num_top` alternatives per token."""
    return {"content": [_chat_entry(entry, num_top, as_ids) for entry in entries], "refusal": None}


def for_prompt(entries: Sequence[LogprobEntry | None] | None, num_top: int) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs`: token id -> logprob, rank and text; null for the first token."""
    return None if entries is None else [None if entry is None else _ranked(entry, num_top) for entry in entries]


@dataclass(frozen=True)
class FirstToken:
    """The first token of a prompt: it has no probability. A start token that is not part of the text has no width."""

    token_id: int
    token: str
    width: int  # characters of the text


class CompletionLogprobs:
    """`logprobs` of a text completion, in pieces: `text_offset` goes on where the piece before ended."""

    def __init__(self, *, num_top: int, as_ids: bool) -> None:
        self._num_top = num_top
        self._as_ids = as_ids
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # tokens may be parts of a character

    def take(self, entries: Sequence[LogprobEntry | None], first: FirstToken | None = None) -> dict[str, Any]:
        """`first` stands in for an entry of None, which the first token of a prompt has."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            known = entry or first
            if known is None:
                raise ValueError("only the first token of a prompt may lack its log-probability")
            tokens.append(_name(known.token_id, known.token, self._as_ids))
            token_logprobs.append(None if entry is None else _finite(entry.logprob))
            tops.append(None if entry is None else self._top(entry))
            offsets.append(self._offset)
            self._offset += known.width if isinstance(known, FirstToken) else len(self._decoder.decode(known.data))
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, entry: LogprobEntry) -> dict[str, float]:
        """The best tokens, and the chosen one when it is not among them."""
        top = {
            _name(token_id, token, self._as_ids): _finite(lp) for token_id, token, _, lp in entry.top[: self._num_top]
        }
        top.setdefault(_name(entry.token_id, entry.token, self._as_ids), _finite(entry.logprob))
        return top


def _chat_entry(entry: LogprobEntry, num_top: int, as_ids: bool) -> dict[str, Any]:
    return {
        **_chat_token(entry.token_id, entry.token, entry.data, entry.logprob, as_ids),
        "top_logprobs": [_chat_token(*alternative, as_ids) for alternative in entry.top[:num_top]],
    }


def _chat_token(token_id: int, token: str, data: bytes, logprob: float, as_ids: bool) -> dict[str, Any]:
    return {"token": _name(token_id, token, as_ids), "logprob": _finite(logprob), "bytes": list(data)}


def _ranked(entry: LogprobEntry, num_top: int) -> dict[str, Any]:
    ranked = {
        str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": token}
        for rank, (token_id, token, _, logprob) in enumerate(entry.top[:num_top], start=1)
    }
    own = {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.token}
    return {str(entry.token_id): own, **ranked}


def _name(token_id: int, token: str, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else token


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
