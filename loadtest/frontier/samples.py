"""Prompts of the frontier with known answers, in the tokens of any model, and where their first turn ends.

Made by the task generators of the bundled model's corpus, from seeds that it is never trained on. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from engine.mimir.corpus import plain_text, python_source
from engine.mimir.corpus.base import THINK, Chat
from engine.mimir.tasks import SIZED, contains_answer, make_chat
from engine.text.chat_template import ChatTemplate
from engine.text.rendered import RenderedText
from engine.text.tokenizer import Tokenizer
from engine.types import ChatPrompt

FIRST_SEED = 2_000_000
MAX_TEMPLATE_CHARS = 1 << 20
# what may stand between a context and a question about it
SEPARATORS = ("\n\n", "\nQuestion: ", "\nAccording to the text: ", "\nNow answer: ")

Mode = Literal["aware", "agnostic", "multi-turn"]


@dataclass(frozen=True)
class TaskSpec:
    """
    maker    name of the generator in `engine.mimir.tasks`; "" for running text
    size     tokens of a prompt, at most
    modes    aware: compressed at the end of the prompt; agnostic: at the end of the context, before the question;
             multi-turn: at the end of the first question of several, and the last one is answered
    """

    name: str
    maker: str
    size: int
    modes: tuple[Mode, ...]
    max_new_tokens: int = 48


TASKS = (
    TaskSpec("needle", "needle_single", 1024, ("aware", "agnostic")),
    TaskSpec("multi-key", "multi_key", 512, ("aware", "agnostic"), 96),
    TaskSpec("aggregation", "most_frequent", 512, ("aware", "agnostic"), 24),
    TaskSpec("variables", "variables", 512, ("aware", "agnostic"), 24),
    TaskSpec("qa", "facts", 512, ("aware", "agnostic")),
    TaskSpec("conversation", "needle_talk", 512, ("aware", "multi-turn")),
    TaskSpec("reasoning", "thinking", 256, ("aware",), 96),
    TaskSpec("perplexity", "", 512, ("agnostic",), 1),
)


@dataclass(frozen=True)
class Sample:
    """first_turn: tokens before the point at which a policy that does not know the question compresses."""

    token_ids: list[int]
    first_turn: int
    answer: str = ""

    def score(self, output: str) -> float:
        """Share of the answer's lines that the output has."""
        lines = self.answer.split("\n")
        return sum(contains_answer(output, line) for line in lines) / len(lines)


class Writer:
    """A model's tokenizer and chat template; without a template, texts follow each other."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        files = self.tokenizer.files
        self._template = None
        if files.chat_template is not None:
            self._template = ChatTemplate(files.chat_template, files.named_tokens, self.tokenizer.control_tokens)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_rendered(RenderedText(text))

    def render(self, chat: Chat, num_turns: int | None = None) -> str:
        """The prompt before the last turn, or after so many turns."""
        turns = chat.turns[:-1] if num_turns is None else chat.turns[:num_turns]
        if self._template is None:
            return "\n".join(turn.text for turn in turns) + "\n"
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        text = self._template.render(ChatPrompt(messages=messages), MAX_TEMPLATE_CHARS).plain()
        is_thinking = num_turns is None and chat.turns[-1].text.startswith(THINK)
        return text + THINK if is_thinking and not text.endswith(THINK) else text

    def sample(self, task: TaskSpec, mode: Mode, seed: int) -> Sample:
        """The same arguments give the same sample."""
        chat, text, ids = self._fitting(task, seed)
        if mode == "aware":
            return Sample(ids, len(ids), chat.answer)
        end = self._end_of_context(chat, text) if mode == "agnostic" else self._end_of_first_question(chat, text)
        return Sample(ids, max(1, common_prefix(ids, self.encode(text[:end]))), chat.answer)

    def running_text(self, task: TaskSpec, seed: int) -> Sample:
        """Held-out text of `size` tokens, half of it before the point."""
        rng = np.random.default_rng((FIRST_SEED, seed))
        sources = plain_text.held_out_part(python_source.source_files() if seed % 2 else python_source.prose())
        long_enough = [text for text in sources if len(text) > 8 * task.size]
        text = long_enough[int(rng.integers(len(long_enough)))]
        start = text.find("\n", int(rng.integers(len(text) - 7 * task.size))) + 1
        ids = self.tokenizer.encode(text[start : start + 7 * task.size])[: task.size]
        return Sample(ids, len(ids) // 2)

    def _fitting(self, task: TaskSpec, seed: int) -> tuple[Chat, str, list[int]]:
        size = task.size
        for _ in range(12):
            chat = make_chat(task.maker, FIRST_SEED + seed, size)
            text = self.render(chat)
            ids = self.encode(text)
            if task.maker not in SIZED or len(ids) <= task.size:
                break
            size = int(size * min(0.97, task.size / len(ids)))
        return chat, text, ids

    def _end_of_context(self, chat: Chat, text: str) -> int:
        asked = chat.turns[-2].text.strip()
        start = text.rfind(asked)
        return start + question_start(asked, has_context=len(chat.turns) == 2)

    def _end_of_first_question(self, chat: Chat, text: str) -> int:
        num_turns = 1 + next(i for i, turn in enumerate(chat.turns) if turn.role == "user")
        return len(common_text(text, self.render(chat, num_turns)))


def question_start(text: str, has_context: bool) -> int:
    """Where the question begins in a user's message that may have its context before it: 0 when it has not."""
    found = max(text.rfind(separator) for separator in SEPARATORS)
    if found >= 0:
        return found
    return max(0, text.rfind(". ") + 1) if has_context else 0


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def common_text(first: str, second: str) -> str:
    return first[: common_prefix([ord(c) for c in first], [ord(c) for c in second])]


def make_samples(writer: Writer, task: TaskSpec, mode: Mode, count: int) -> list[Sample]:
    if not task.maker:
        return [writer.running_text(task, seed) for seed in range(count)]
    return [writer.sample(task, mode, seed) for seed in range(count)]
