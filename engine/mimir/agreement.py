"""How often the drafter guesses the target's token: `python -m engine.mimir.agreement [--json FILE]`.

The target answers held-out chats greedily; along its own text the drafter's greedy choice is compared token by token.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from engine.mimir import model_path
from engine.mimir.evaluate import MAX_NEW_TOKENS, SHORT_TASKS, SHORT_TOKENS, Evaluator
from engine.mimir.export import load
from engine.mimir.tasks import make_task

DRAFT_LENGTH = 4  # tokens guessed at once, for the accepted length


@torch.inference_mode()
def agreement(target_folder: Path, draft_folder: Path, num_samples: int) -> dict[str, object]:
    """Share of equal greedy tokens by task and over all, and the mean number accepted of `DRAFT_LENGTH` guesses."""
    evaluator, draft = Evaluator(target_folder), load(draft_folder)
    matches: dict[str, list[Tensor]] = {}
    for name in SHORT_TASKS:
        tasks = [make_task(name, seed, SHORT_TOKENS, evaluator.tokenizer) for seed in range(num_samples)]
        outputs = evaluator.complete([task.prompt for task in tasks], MAX_NEW_TOKENS)
        for task, output in zip(tasks, outputs, strict=True):
            prompt = evaluator.tokenizer.encode(task.prompt).ids
            answer = evaluator.tokenizer.encode(output).ids
            if answer:
                logits = draft.logits(draft(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1])
                matches.setdefault(name, []).append(logits.argmax(-1) == torch.tensor(answer))
    rows = [row for found in matches.values() for row in found]
    return {
        "agreement": round(torch.cat(rows).float().mean().item(), 3),
        "accepted_of_4": round(sum(map(_accepted, rows)) / len(rows), 2),
        "by_task": {name: round(torch.cat(found).float().mean().item(), 3) for name, found in matches.items()},
    }


def _accepted(match: Tensor) -> float:
    """Mean length of the matching run, at most `DRAFT_LENGTH`, over all positions of one answer."""
    run, total = 0, 0
    for hit in reversed(match.tolist()):
        run = min(run + 1, DRAFT_LENGTH) if hit else 0
        total += run
    return total / len(match)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=model_path())
    parser.add_argument("--draft", type=Path, default=model_path("mimir-draft"))
    parser.add_argument("--samples", type=int, default=20, help="chats per task")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    result = agreement(args.target, args.draft, args.samples)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
