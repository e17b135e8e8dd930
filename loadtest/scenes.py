"""Workloads with the structure of real ones: chats that grow, shared prompts, documents, tools, code, long thoughts.

A scene makes one conversation from a generator of its own, so that the n-th conversation of a seed never depends on
those before it. Lengths follow the server's context; tokens are estimated from characters.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from engine.mimir.corpus.structured import TOOLS
from engine.mimir.corpus.structured import schema as tool_schema
from engine.mimir.tasks import make_chat
from loadtest import texts
from loadtest.client import Answer, Request
from loadtest.structured_output import schema as list_schema
from loadtest.workloads import Conversation, single

CHARS_PER_TOKEN = 3.0  # unless measured at the server
NUM_DOCUMENTS, SHOWN_DOCUMENTS = 40, 5
NUM_INSTRUCTIONS = 4
NUM_COUNTED = 50
MAX_QUESTION_TOKENS = 50  # longer ones quote from a corpus that takes seconds to collect

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one conversation. `prompt_tokens` is the longest prompt, with all turns before it."""

    prompt_tokens: int
    output_tokens: int
    chars_per_token: float = CHARS_PER_TOKEN
    seed: int = 0  # what conversations share is drawn from it

    def chars(self, share: float) -> int:
        """Characters of this share of the longest prompt."""
        return max(1, int(self.prompt_tokens * share * self.chars_per_token))

    def shared(self, name: str) -> Random:
        return Random(f"{name}/{self.seed}")


Maker = Callable[[Random, Sizes], Conversation]


@dataclass(frozen=True)
class Scene:
    """A kind of conversation. Its prompt takes a share of the context, up to a length that is usual for its kind."""

    maker: Maker
    about: str
    prompt_share: float
    longest_prompt: int
    output_tokens: int

    def sizes(
        self,
        context: int,
        *,
        prompt_tokens: int | None = None,
        output_tokens: int | None = None,
        chars_per_token: float = CHARS_PER_TOKEN,
        seed: int = 0,
    ) -> Sizes:
        """Raises ValueError when prompt and answer together do not fit the context."""
        output = output_tokens or min(self.output_tokens, context // 4)
        prompt = prompt_tokens or min(self.longest_prompt, int(self.prompt_share * context))
        if prompt + output > context:
            raise ValueError(
                f"a prompt of {prompt} and an answer of {output} tokens exceed the context of {context}; "
                "choose smaller --prompt-tokens or --output-tokens"
            )
        return Sizes(prompt_tokens=prompt, output_tokens=output, chars_per_token=chars_per_token, seed=seed)


def conversations(name: str, sizes: Sizes) -> Iterator[Conversation]:
    """Endless. Raises KeyError for an unknown name."""
    maker = SCENES[name].maker
    return (maker(Random(f"{name}/{sizes.seed}/{index}"), sizes) for index in itertools.count())


def mean_turns(found: Iterator[Conversation]) -> float:
    """Of the first conversations."""
    return statistics.mean(conversation.num_turns for conversation in itertools.islice(found, NUM_COUNTED))


def num_chars(request: Request) -> int:
    """Of everything that becomes prompt tokens, but for the marks of a chat template."""
    if request.messages is None:
        return len(request.prompt or "")
    tools = json.dumps(request.fields["tools"]) if "tools" in request.fields else ""
    return sum(len(message["content"]) for message in request.messages) + len(tools)


def chat(generator: Random, sizes: Sizes) -> Conversation:
    """Two to six turns: questions, some with a pasted text; the history is what the server really answered."""
    most = max(1, sizes.prompt_tokens // (2 * sizes.output_tokens))
    num_turns = min(most, generator.randint(2, 6))
    own_tokens = max(8, sizes.prompt_tokens // num_turns - sizes.output_tokens)

    def turns() -> Generator[Request, Answer, None]:
        messages = [_system(generator, "You are a helpful assistant.")]
        while True:
            text = _question(generator)
            if generator.random() < 0.3:
                text += "\n\n" + texts.sentences(generator, int(own_tokens * sizes.chars_per_token * 0.7))
            messages.append({"role": "user", "content": text})
            answer = yield Request(messages=list(messages), max_tokens=sizes.output_tokens)
            messages.append({"role": "assistant", "content": answer.text})

    return Conversation(turns(), num_turns, think_s=0.0)


def shared_system(generator: Random, sizes: Sizes) -> Conversation:
    """One long system prompt for everybody and a short question each."""
    rules = texts.sentences(sizes.shared("rules"), sizes.chars(0.9))
    return _ask(_question(generator), sizes, system=f"You are a helpful assistant. Follow these rules.\n{rules}")


def rag(generator: Random, sizes: Sizes) -> Conversation:
    """Some documents out of a pool, a few of which are in great demand, and a question behind them."""
    pool = sizes.shared("documents")
    length = sizes.chars(0.9 / SHOWN_DOCUMENTS)
    seeds = [pool.getrandbits(62) for _ in range(NUM_DOCUMENTS)]
    weights = [1 / (rank + 1) for rank in range(NUM_DOCUMENTS)]
    shown = dict.fromkeys(generator.choices(range(NUM_DOCUMENTS), weights, k=4 * SHOWN_DOCUMENTS))
    documents = [
        f"Document {number}\n{texts.sentences(Random(seeds[number]), length)}"
        for number in list(shown)[:SHOWN_DOCUMENTS]
    ]
    question = f"\n\nAccording to the documents: {texts.sentences(generator, 20)} Is that right?"
    return _ask("\n\n".join(documents) + question, sizes, system="Answer from the documents.")


def agent(generator: Random, sizes: Sizes) -> Conversation:
    """Tools, and four to eight steps in which a result comes back for every call that the server really made."""
    num_steps = min(generator.randint(4, 8), max(1, sizes.prompt_tokens // (2 * sizes.output_tokens)))
    result_chars = int(sizes.chars_per_token * max(8, 0.6 * sizes.prompt_tokens / num_steps - sizes.output_tokens))
    tools = [tool_schema(name) for name in sorted(TOOLS)]

    def turns() -> Generator[Request, Answer, None]:
        task = f"{_question(generator)} Use the tools, step by step."
        messages = [_system(generator, "You are an agent with tools."), {"role": "user", "content": task}]
        while True:
            answer = yield Request(messages=list(messages), max_tokens=sizes.output_tokens, fields={"tools": tools})
            messages += _observed(answer, lambda: texts.sentences(generator, result_chars))

    return Conversation(turns(), num_steps)


def _observed(answer: Answer, result: Callable[[], str]) -> list[Message]:
    """What an agent's host appends: the answer, and a result for each call or, without one, a user's remark."""
    calls = [call for call in answer.tool_calls if call["id"] and _is_object(call["function"]["arguments"])]
    if not calls:
        remark = f"That was no call. What is known so far: {result()} Go on."
        return [{"role": "assistant", "content": answer.text}, {"role": "user", "content": remark}]
    said = {"role": "assistant", "content": answer.text, "tool_calls": calls}
    return [said, *({"role": "tool", "tool_call_id": call["id"], "content": result()} for call in calls)]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def code(generator: Random, sizes: Sizes) -> Conversation:
    """Completion of a Python source."""
    return single(Request(prompt=texts.code(generator, sizes.chars(1.0)), max_tokens=sizes.output_tokens))


def edit(generator: Random, sizes: Sizes) -> Conversation:
    """A source, and the beginning of the same source with one name changed: most of what follows is a copy."""
    source = texts.code(generator, sizes.chars(0.75))
    again = texts.edited(source, generator)
    prompt = f"# before\n{source}\n\n# after\n{again[: sizes.chars(0.2)]}"
    return single(Request(prompt=prompt, max_tokens=sizes.output_tokens))


def summary(generator: Random, sizes: Sizes) -> Conversation:
    text = texts.prose(generator, sizes.chars(0.95))
    return _ask(f"Summarise this text in a few sentences.\n\n{text}", sizes)


def reasoning(generator: Random, sizes: Sizes) -> Conversation:
    """A short question with a long answer."""
    chat = make_chat("thinking", generator.getrandbits(62), MAX_QUESTION_TOKENS)
    return _ask(f"{chat.turns[-2].text}\nThink step by step, in detail, before you answer.", sizes)


def json_list(generator: Random, sizes: Sizes) -> Conversation:
    """An array of objects after a schema of its own, which does not end before the answer's last token."""
    schema = list_schema(generator.randrange(1000))
    fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "list", "schema": schema}}}
    return _ask(f"Write a list of things as JSON. {_question(generator)}", sizes, fields=fields)


def batch(generator: Random, sizes: Sizes) -> Conversation:
    """Lines of an offline batch: a few long instructions, texts of very different lengths."""
    instruction = texts.sentences(Random(f"{generator.randrange(NUM_INSTRUCTIONS)}/{sizes.seed}"), sizes.chars(0.3))
    length = min(0.65, generator.lognormvariate(-2.0, 0.8))
    return _ask(texts.sentences(generator, sizes.chars(length)), sizes, system=instruction)


def _ask(
    question: str, sizes: Sizes, *, system: str | None = None, fields: dict[str, Any] | None = None
) -> Conversation:
    head = [] if system is None else [{"role": "system", "content": system}]
    messages = [*head, {"role": "user", "content": question}]
    return single(Request(messages=messages, max_tokens=sizes.output_tokens, fields=fields or {}))


def _system(generator: Random, text: str) -> Message:
    """With a number of its own: conversations share a prefix cache's blocks only where their scene says so."""
    return {"role": "system", "content": f"[{generator.randrange(10**6):06}] {text}"}


def _question(generator: Random) -> str:
    chat = make_chat("chat", generator.getrandbits(62), 100)
    return next(turn.text for turn in chat.turns if turn.role == "user")


SCENES: dict[str, Scene] = {
    "chat": Scene(chat, "two to six turns that grow by the server's answers", 0.5, 4000, 64),
    "shared-system": Scene(shared_system, "one long system prompt for all", 0.35, 2000, 64),
    "rag": Scene(rag, "documents out of a pool, and a question", 0.6, 16000, 64),
    "agent": Scene(agent, "four to eight steps with tools and their results", 0.6, 12000, 48),
    "code": Scene(code, "completion of a Python source", 0.25, 2000, 96),
    "edit": Scene(edit, "a source written again with one name changed", 0.25, 2000, 128),
    "summary": Scene(summary, "a long text, a short answer", 0.5, 8000, 96),
    "reasoning": Scene(reasoning, "a short question, a long answer", 0.1, 400, 1024),
    "json": Scene(json_list, "arrays of objects after JSON schemas", 0.1, 200, 128),
    "batch": Scene(batch, "an offline batch: all at once, very different lengths", 0.3, 1500, 64),
}
