"""Scores a model by task and context length: `python -m engine.mimir.evaluate [--model DIR] [--json FILE]`.

Greedy decoding with `transformers`, so that the figures do not depend on Kvasir's own engine. Seeds are held out: the
training stream draws seeds from 2^32 on, this one counts from zero or from `--first-seed`.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.mimir import model_path
from engine.mimir.corpus import plain_text, python_source
from engine.mimir.tasks import FIRST_TRAINING_SEED, Task, contains_answer, make_task
from engine.mimir.tokenizer import PAD, TURN_END, token_id

LENGTHS = (256, 512, 1024, 2048)
LOOKUP_TASKS = ("needle_single", "needle", "needle_first", "key_value", "multi_key", "facts", "variables")
SHORT_TASKS = (
    "chat",
    "memory",
    "copy",
    "arithmetic",
    "small_arithmetic",
    "total",
    "largest",
    "positions",
    "count_word",
    "most_frequent",
    "json_object",
    "json_list",
    "tool_use",
    "instruction",
    "thinking",
    "code",
    "facts_talk",
)
SHORT_TOKENS = 128
MAX_NEW_TOKENS = 80
PERPLEXITY_PASSAGES = 40


@dataclass(frozen=True)
class Score:
    """One cell: `answered` is the share of outputs that contain the answer, `exact` that equal the whole reply."""

    task: str
    context_tokens: int
    num_samples: int
    answered: float
    exact: float
    ended: float  # share that closed their turn within MAX_NEW_TOKENS


class Evaluator:
    """A model and tokenizer with batched greedy generation."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.pad, self.end = (token_id(self.tokenizer, text) for text in (PAD, TURN_END))

    @torch.inference_mode()
    def complete(self, prompts: list[str], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """Greedy continuations, with the end token kept where one was written."""
        encoded = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        longest = max(map(len, encoded))
        ids = torch.full((len(encoded), longest), self.pad)
        for row, one in zip(ids, encoded, strict=True):
            row[longest - len(one) :] = torch.tensor(one)
        out = self.model.generate(
            ids,
            attention_mask=ids.ne(self.pad).long(),
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end,
            pad_token_id=self.pad,
        )
        return [self._text(row[longest:]) for row in out]

    def _text(self, ids: Tensor) -> str:
        kept = [token for token in ids.tolist() if token != self.pad]
        return self.tokenizer.decode(kept, skip_special_tokens=False)

    def score(self, name: str, context_tokens: int, num_samples: int, first_seed: int = 0) -> Score:
        """One task at one context length, over `num_samples` seeds from `first_seed` on.

        Raises ValueError for seeds that training draws.
        """
        seeds = held_out_seeds(first_seed, num_samples)
        tasks = [make_task(name, seed, context_tokens, self.tokenizer) for seed in seeds]
        outputs: list[str] = []
        batch_size = max(4, 16_384 // context_tokens)
        for start in range(0, len(tasks), batch_size):
            outputs += self.complete([task.prompt for task in tasks[start : start + batch_size]])
        return summarise(name, context_tokens, tasks, outputs)

    @torch.inference_mode()
    def perplexity(self, texts: tuple[str, ...], seed: int = 0) -> float:
        """Per-token perplexity over passages of at most 256 tokens of held-out text."""
        rng = np.random.default_rng(seed)
        loss, count = 0.0, 0
        for _ in range(PERPLEXITY_PASSAGES):
            ids = torch.tensor([self.tokenizer.encode(plain_text.passage(rng, texts)).ids[:256]])
            if ids.shape[1] > 1:
                logits = self.model(ids).logits[0, :-1]
                loss += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                count += ids.shape[1] - 1
        return round(math.exp(loss / count), 2)


def held_out_seeds(first_seed: int, num_samples: int) -> range:
    """The seeds asked for; raises ValueError when training draws some of them."""
    if first_seed + num_samples > FIRST_TRAINING_SEED:
        raise ValueError(f"seeds {first_seed} to {first_seed + num_samples - 1} are trained on; end below 2^32")
    return range(first_seed, first_seed + num_samples)


def summarise(name: str, context_tokens: int, tasks: list[Task], outputs: list[str]) -> Score:
    """Compare outputs with the tasks they answer."""
    texts = [output.removesuffix(TURN_END) for output in outputs]
    expected = [
        task.reply.removeprefix("<think>\n") if task.prompt.endswith("<think>\n") else task.reply for task in tasks
    ]
    answered = [contains_answer(text, task.answer) for text, task in zip(texts, tasks, strict=True)]
    exact = [text == reply for text, reply in zip(texts, expected, strict=True)]
    ended = [output.endswith(TURN_END) for output in outputs]
    shares = (round(float(np.mean(values)), 3) for values in (answered, exact, ended))
    return Score(name, context_tokens, len(tasks), *shares)


def json_validity(evaluator: Evaluator, num_samples: int, first_seed: int) -> float:
    """Share of JSON replies that parse."""
    seeds = held_out_seeds(first_seed, num_samples)
    tasks = [make_task("json_object", seed, SHORT_TOKENS, evaluator.tokenizer) for seed in seeds]
    outputs = evaluator.complete([task.prompt for task in tasks])
    return round(float(np.mean([_parses(output.removesuffix(TURN_END)) for output in outputs])), 3)


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def all_scores(evaluator: Evaluator, num_samples: int, lengths: tuple[int, ...], first_seed: int) -> list[Score]:
    """Every short task, then every lookup task at every length (half the samples from 2,048 tokens on)."""
    scores = [evaluator.score(name, SHORT_TOKENS, num_samples, first_seed) for name in SHORT_TASKS]
    for length in lengths:
        count = num_samples if length < 2048 else max(1, num_samples // 2)
        scores += [evaluator.score(name, length, count, first_seed) for name in LOOKUP_TASKS]
    return scores


def markdown(scores: list[Score]) -> str:
    """The `answered` shares as a table: one row per task, one column per context length."""
    lengths = sorted({score.context_tokens for score in scores})
    cells = {(score.task, score.context_tokens): f"{score.answered:.3f}" for score in scores}
    lines = ["| task | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    lines += [
        f"| {task} | " + " | ".join(cells.get((task, length), "") for length in lengths) + " |"
        for task in dict.fromkeys(score.task for score in scores)
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--samples", type=int, default=40, help="prompts per task and length (half at 2,048 tokens)")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="of the prompts; the model card has those from 1,000,000 on"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    started = time.perf_counter()
    evaluator = Evaluator(args.model)
    scores = all_scores(evaluator, args.samples, tuple(args.lengths), args.first_seed)
    result = {
        "scores": [asdict(score) for score in scores],
        "json_valid": json_validity(evaluator, args.samples, args.first_seed),
        "perplexity": {
            "python_code": evaluator.perplexity(plain_text.held_out_part(python_source.source_files())),
            "prose": evaluator.perplexity(plain_text.held_out_part(python_source.prose())),
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(markdown(scores))
    print({name: value for name, value in result.items() if name != "scores"})
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
