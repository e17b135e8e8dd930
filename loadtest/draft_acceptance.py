"""How many tokens a step the training-free drafters would gain, without running the engine: a table by kind of text.

    python -m loadtest.draft_acceptance --drafters ngram suffix --requests 40

Texts of Mimir's corpus are taken for what the target model says; one text after the other, so that drafters that learn
from outputs do. `tokens/step` is the acceptance length, 1 without a guess; `promised` is what the trees' values said
about it; `us/step` is processor time. The candidates that Token Recycling sees are Mimir's own, of accepted rows alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from engine.speculation.base import NO_TAPS, Drafter, RequestView, TapRows
from engine.speculation.catalogue import drafters
from engine.speculation.tree import DraftTree
from loadtest.texts import edited

MICROSECONDS = 1e6
MAX_TOKENS = 2048  # of a prompt and its output


@dataclass(frozen=True)
class Sample:
    """`topk_ids[i]` are the target's candidates for the token at index i + 1; [T, k], None without them."""

    token_ids: list[int]
    num_prompt_tokens: int
    topk_ids: np.ndarray | None = None


@dataclass
class Tally:
    requests: int = 0
    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    promised: float = 0.0  # sum of values
    seconds: float = 0.0

    def row(self) -> dict[str, float]:
        accepted = self.tokens - self.steps
        return {
            "tokens/step": self.tokens / self.steps,
            "promised": 1 + self.promised / self.steps,
            "nodes/step": self.drafted / self.steps,
            "accepted share": accepted / max(1, self.drafted),
            "us/step": self.seconds / self.steps * MICROSECONDS,
        }


def texts(kind: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """`count` pairs of prompt and output."""
    from engine.mimir.corpus.python_source import prose, source_files
    from engine.mimir.tasks import make_chat

    generator = Random(seed)
    tasks = {"chat": ("chat", "context_chat", "facts_talk"), "json": ("json_list", "json_object"), "copy": ("copy",)}
    for index in range(count):
        if kind in tasks:
            chat = make_chat(tasks[kind][index % len(tasks[kind])], generator.getrandbits(62), 400)
            prompt = chat.prompt()
            yield prompt, "".join(text for text, _ in chat.segments())[len(prompt) :]
        elif kind == "prose":
            paragraph = generator.choice([text for text in prose() if len(text) > 1500])
            yield paragraph[:900], paragraph[900:1500]
        else:
            source = generator.choice([text for text in source_files() if len(text) > 6000])
            start = source.index("\n", generator.randrange(len(source) - 5000))
            before, after = source[start : start + 3000], source[start + 3000 : start + 4200]
            yield (before, after) if kind == "code" else (before[:1500], edited(before[:1500], generator))


KINDS = ("chat", "code", "edit", "copy", "prose", "json")


def samples(kind: str, count: int, seed: int, topk: Callable[[list[int]], np.ndarray] | None) -> list[Sample]:
    from tokenizers import Tokenizer

    from engine.mimir import model_path

    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    found = []
    for prompt, output in texts(kind, count, seed):
        prompt_ids = tokenizer.encode(prompt).ids
        token_ids = (prompt_ids + tokenizer.encode(output).ids)[:MAX_TOKENS]
        if len(token_ids) > len(prompt_ids) + 1:
            found.append(Sample(token_ids, len(prompt_ids), topk(token_ids) if topk else None))
    return found


def mimir_topk(num_candidates: int = 8) -> Callable[[list[int]], np.ndarray]:
    """Mimir's best candidates behind every token of a text."""
    import torch
    from transformers import AutoModelForCausalLM

    from engine.mimir import model_path

    model: Any = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model.eval()

    def topk(token_ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits = model(torch.tensor([token_ids])).logits[0]
        ids: np.ndarray = logits.topk(num_candidates).indices.int().numpy()
        return ids

    return topk


def replay(drafter: Drafter, sample: Sample, key: str, max_nodes: int, tally: Tally) -> None:
    """Decode one text whose every token is known, as the walk would: at each node, on to the child that is right."""
    token_ids, done = sample.token_ids, sample.num_prompt_tokens
    drafter.admit(key, token_ids[:done], "")
    drafter.on_commit(key, DraftTree(), (), token_ids[done : done + 1], _taps(sample, done - 1, 1))
    done += 1
    tally.requests += 1
    while done < len(token_ids):
        view = RequestView(key, token_ids[:done], sample.num_prompt_tokens, max_depth=max(0, len(token_ids) - done - 1))
        started = time.thread_time()
        (tree,) = drafter.propose([view], [max_nodes])
        tally.seconds += time.thread_time() - started
        accepted = walk(tree, token_ids[done:])
        new_tokens = token_ids[done : done + len(accepted) + 1]
        seen = DraftTree.chain([tree.tokens[node] for node in accepted], source=drafter.name)
        taps = _taps(sample, done - 1, len(accepted) + 1)
        started = time.thread_time()
        drafter.on_commit(key, seen, range(len(accepted)), new_tokens, taps)
        tally.seconds += time.thread_time() - started
        tally.steps += 1
        tally.tokens += len(new_tokens)
        tally.drafted += len(tree)
        tally.promised += sum(tree.values)
        done += len(new_tokens)
    drafter.drop(key)


def _taps(sample: Sample, start: int, num_rows: int) -> TapRows:
    if sample.topk_ids is None:
        return NO_TAPS
    return TapRows(topk_ids=sample.topk_ids[start : start + num_rows])


def walk(tree: DraftTree, truth: Sequence[int]) -> list[int]:
    """Nodes of the path that the text takes; the last token of the text is never needed from a draft."""
    path: list[int] = []
    children = {
        (parent, token): node for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True))
    }
    for token in truth[:-1]:
        node = children.get((path[-1] if path else -1, token))
        if node is None:
            break
        path.append(node)
    return path


def measure(
    names: Sequence[str], kinds: Sequence[str], count: int, max_nodes: int, seed: int, **options: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """Rows of the table: kind -> drafter -> column -> number."""
    topk = mimir_topk() if any(drafters.create(name, **options).needs.topk for name in names) else None
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in kinds:
        found = samples(kind, count, seed, topk)
        results[kind] = {}
        for name in names:
            drafter, tally = drafters.create(name, **options), Tally()
            for index, sample in enumerate(found):
                replay(drafter, sample, str(index), max_nodes, tally)
            results[kind][name] = {**tally.row(), "state MiB": drafter.state_bytes / (1 << 20)}
    return results


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    options = {name: float(value) if "." in value else int(value) for name, value in arguments.option}
    names, kinds = arguments.drafters, arguments.kinds
    results = measure(names, kinds, arguments.requests, arguments.max_nodes, arguments.seed, **options)
    for kind, rows in results.items():
        columns = next(iter(rows.values()))
        print(f"{kind:<18}" + "".join(f"{column:>16}" for column in columns))
        for name, row in rows.items():
            print(f"  {name:<16}" + "".join(f"{value:>16.2f}" for value in row.values()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "results": results}, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Acceptance of the training-free drafters on known texts.")
    parser.add_argument(
        "--drafters",
        nargs="+",
        default=["ngram", "suffix", "lookahead", "aded", "token_recycling", "goose"],
        choices=drafters.names(),
        metavar="NAME",
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--requests", type=int, default=30, help="texts of each kind (default: %(default)s)")
    parser.add_argument("--max-nodes", type=int, default=16, help="of a draft (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--option", nargs=2, action="append", default=[], metavar=("NAME", "NUMBER"))
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
