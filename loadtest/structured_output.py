"""What constraints cost: the same batch without them, with 32 different schemas, and with forced tokens jumped over.

    python -m loadtest.structured_output --model mimir --rows 32

In one process, without HTTP. Every output has the same number of tokens: the schemas describe arrays that do not end
before. The time counts while all rows are taken, so that rows which are ready sooner make room for others. The three
ways alternate, and the figures are medians over the rounds; ratios are taken within a round. --compact allows no
whitespace, which leaves a grammar the fewest choices.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAVES = 3  # requests per row
WAYS = ("unconstrained", "constrained", "jump-ahead")
WORDS = ("name", "city", "price", "count", "status", "title", "size", "color", "address", "email", "phone", "note")


def schema(number: int) -> dict[str, Any]:
    """One of any number of different schemas: a long array of objects with 3 to 5 fields of various kinds."""
    generator = random.Random(number)
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 20 + number},
        {"type": "integer", "minimum": 0, "maximum": 100 + number},
        {"type": "boolean"},
        {"enum": [f"{word}_{number}" for word in generator.sample(WORDS, 4)]},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
    ]
    properties = {word: generator.choice(kinds) for word in generator.sample(WORDS, generator.randint(3, 5))}
    item = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 1000}


def requests(tokenizer: Any, num_requests: int, num_tokens: int, grammars: Sequence[str] | None) -> list[Any]:
    from engine.types import CompiledConstraint, EngineRequest, SamplingParams

    prompt = tokenizer.encode("Write a list of things as JSON, please.")
    return [
        EngineRequest(
            request_id=f"request-{i}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.8, seed=i, ignore_eos=True),
            constraint=None if grammars is None else CompiledConstraint(grammars[i % len(grammars)]),
        )
        for i in range(num_requests)
    ]


def tokens_per_second(core: Any, batch: Sequence[Any], num_rows: int) -> tuple[float, int]:
    """Output tokens a second from the first output to the last that leaves all rows taken; and the steps to the end."""
    for request in batch:
        core.add(request)
    began_at = ended_at = 0.0
    num_tokens = num_counted = num_steps = 0
    num_open = len(batch)
    while core.has_work:
        outputs = core.step()
        num_steps += 1
        num_open -= sum(output.finish_reason is not None for output in outputs)
        num_tokens += sum(len(output.token_ids) for output in outputs) if began_at else 0
        if num_open >= num_rows:
            ended_at, num_counted = time.perf_counter(), num_tokens
        if outputs and not began_at:
            began_at = ended_at
    return num_counted / (ended_at - began_at), num_steps


def measure(
    model: str, num_rows: int, num_tokens: int, num_rounds: int, threads: int | None, *, is_compact: bool = False
) -> dict[str, Any]:
    from engine.config_load import load
    from engine.constraints.grammar import compile_constraint
    from engine.constraints.limits import ConstraintLimits
    from engine.constraints.vocabulary import Vocabulary
    from engine.launch import build_core, resolve_model_path
    from engine.text.tokenizer import Tokenizer
    from engine.types import Constraint

    tokenizer = Tokenizer.from_folder(resolve_model_path(model))
    cores = {}
    for way in WAYS[1:]:
        options = {"model": model, "max_num_seqs": num_rows, "threads": threads, "kv_cache_memory_mib": 512}
        config = load({**options, "jump_ahead": way == "jump-ahead"})
        cores[way], info = build_core(config)
    cores["unconstrained"] = cores["constrained"]
    vocabulary = Vocabulary(tokenizer.files.definition, info.eos_token_ids)
    limits = ConstraintLimits.of(config.limits)
    grammars = [
        compile_constraint(
            Constraint("json_schema", json.dumps(schema(i)), whitespace="" if is_compact else None), vocabulary, limits
        )
        for i in range(num_rows)
    ]
    batches = {
        way: requests(tokenizer, WAVES * num_rows, num_tokens, None if way == "unconstrained" else grammars)
        for way in WAYS
    }
    for way in WAYS:
        tokens_per_second(cores[way], batches[way], num_rows)
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    num_steps = {}
    for _ in range(num_rounds):
        for way in WAYS:
            speed, num_steps[way] = tokens_per_second(cores[way], batches[way], num_rows)
            speeds[way].append(speed)
    base = speeds["unconstrained"]
    return {
        way: {
            "tokens_per_s": statistics.median(speeds[way]),
            "share": statistics.median(speed / plain for speed, plain in zip(speeds[way], base, strict=True)),
            "steps": num_steps[way],
        }
        for way in WAYS
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtest.structured_output", description=__doc__)
    parser.add_argument("--model", default="mimir")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of each output")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--compact", action="store_true", help="no whitespace between the tokens of JSON")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    figures = measure(
        arguments.model,
        arguments.rows,
        arguments.tokens,
        arguments.rounds,
        arguments.threads,
        is_compact=arguments.compact,
    )
    print(f"{'':16}{'tokens/s':>10}{'share':>8}{'steps':>8}")
    for way, figure in figures.items():
        print(f"{way:16}{figure['tokens_per_s']:10.0f}{figure['share']:8.2f}{figure['steps']:8}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
