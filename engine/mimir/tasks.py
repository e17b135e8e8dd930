"""Tasks by name, for training, evaluation and the quality benchmarks of cache policies. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from engine.mimir.corpus import everyday, people, python_tasks, reasoning, retrieval, structured
from engine.mimir.corpus.base import Chat, Maker

MAKERS: dict[str, Maker] = {
    "needle": retrieval.needle,
    "needle_single": retrieval.needle_single,
    "needle_talk": retrieval.needle_talk,
    "needle_first": retrieval.needle_first,
    "key_value": retrieval.key_value,
    "key_value_talk": retrieval.key_value_talk,
    "facts_talk": people.facts_talk,
    "code": python_tasks.code,
    "multi_key": retrieval.multi_key,
    "table": retrieval.table,
    "facts": people.facts,
    "memory": people.memory,
    "chat": everyday.chat,
    "context_chat": everyday.context_first,
    "count_word": reasoning.count_word,
    "most_frequent": reasoning.most_frequent,
    "total": reasoning.total,
    "largest": reasoning.largest,
    "positions": reasoning.positions,
    "variables": reasoning.variables,
    "copy": reasoning.copy,
    "arithmetic": reasoning.arithmetic,
    "small_arithmetic": reasoning.small_arithmetic,
    "thinking": reasoning.thinking,
    "tool_use": structured.tool_use,
    "json_object": structured.json_object,
    "json_list": structured.json_list,
    "instruction": structured.instruction,
}
FIRST_TRAINING_SEED = 1 << 32  # smaller ones are for evaluation and tests
# Tasks whose context grows with the wanted size; the others are short whatever is asked for.
SIZED = frozenset(
    {
        "needle",
        "needle_single",
        "needle_talk",
        "needle_first",
        "key_value",
        "key_value_talk",
        "multi_key",
        "table",
        "facts",
        "facts_talk",
        "variables",
    }
)


class Encoder(Protocol):
    """The part of a tokenizer that `make_task` needs; both `tokenizers.Tokenizer` and `transformers`' have it."""

    def encode(self, text: str) -> Sequence[int] | object: ...


@dataclass(frozen=True)
class Task:
    """A ChatML prompt ready for generation; `answer` must occur in the output, `reply` is the whole expected turn."""

    name: str
    prompt: str
    answer: str
    reply: str


def make_chat(name: str, seed: int, size: int) -> Chat:
    """The conversation of task `name` for a seed, about `size` tokens long where the task has a context."""
    return MAKERS[name](Random(f"{name}/{seed}"), size)


def make_task(name: str, seed: int, context_tokens: int, tokenizer: Encoder) -> Task:
    """A task whose prompt has about `context_tokens` tokens and never more (for tasks in `SIZED`).

    The same arguments give the same task. Raises KeyError for an unknown name.
    """
    size = context_tokens
    for _ in range(12):
        chat = make_chat(name, seed, size)
        num_tokens = count_tokens(tokenizer, chat.prompt())
        if name not in SIZED or num_tokens <= context_tokens:
            break
        size = int(size * min(0.97, context_tokens / num_tokens))
    return Task(name, chat.prompt(), chat.answer, chat.turns[-1].text)


def count_tokens(tokenizer: Encoder, text: str) -> int:
    encoded = tokenizer.encode(text)
    return len(getattr(encoded, "ids", encoded))  # type: ignore[arg-type]


def contains_answer(output: str, answer: str) -> bool:
    """True when `answer` stands in `output` and is not part of a longer word or number."""
    return re.search(rf"(?<![\w-]){re.escape(answer)}(?![\w-])", output) is not None
