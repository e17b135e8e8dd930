"""The same requests through our core and through the continuous batching of `transformers`, in one run."""

from __future__ import annotations

import time
from typing import Any

import torch

from loadtest.gpu.engine import ways_of
from loadtest.gpu.models import LLAMA_8B, build_core, build_model, requests, shape_of
from loadtest.gpu.record import Run, Target

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 256, 128, 64
TARGET = Target("ratio_to_transformers", 2.0)


def measure_transformers(run: Run) -> None:
    """256 requests of 128 tokens and 64 answers at once: seconds from the first to the last token of all."""
    count, prompt, output = run.size(REQUESTS, 4), run.size(PROMPT_TOKENS, 16), run.size(OUTPUT_TOKENS, 4)
    shape = shape_of(run, LLAMA_8B)
    ours = _ours(run, shape, count, prompt, output)
    run.record("Kvasir", tokens_per_s=count * output / ours)
    with run.case("transformers"):
        theirs, options = _theirs(run, shape, count, prompt, output)
        run.record(
            "transformers", TARGET, tokens_per_s=count * output / theirs, ratio_to_transformers=theirs / ours, **options
        )


def _ours(run: Run, shape: dict[str, Any], count: int, prompt: int, output: int) -> float:
    length = prompt + output + 16
    model = build_model(run, shape, max(length, run.size(4096, 512)))
    options = ways_of(run)[-1][1]
    core = build_core(run, model, max_model_len=length, rows=count, pool_tokens=count * length, **options)
    seconds = []
    for name in ("warm", "timed"):
        for request in requests(name, count, prompt, output, model.vocab_size):
            core.add(request)
        run.synchronize()
        started = time.perf_counter()
        while core.has_work:
            core.advance()
        run.synchronize()
        seconds.append(time.perf_counter() - started)
    del core, model
    run.release()
    return seconds[-1]


def _theirs(run: Run, shape: dict[str, Any], count: int, prompt: int, output: int) -> tuple[float, dict[str, Any]]:
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    settings = {key: value for key, value in shape.items() if key not in ("architectures", "torch_dtype")}
    config = AutoConfig.for_model(**settings)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    with torch.device(run.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    generation = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [list(one.prompt_token_ids) for one in requests("t", count, prompt, output, shape["vocab_size"])]
    # by default it takes what memory is free, which on a CPU is more than it can fill in a test's time
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=64) if run.tiny else None
    seconds = 0.0
    for _ in range(2):  # the first round warms up
        run.synchronize()
        started = time.perf_counter()
        found = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching)
        run.synchronize()
        seconds = time.perf_counter() - started
    lengths = {len(one.generated_tokens) for one in found.values()}
    if len(found) != count or lengths != {output}:
        raise RuntimeError(f"{len(found)} of {count} requests were answered, with {sorted(lengths)} tokens each")
    return seconds, {"attention": str(model.config._attn_implementation)}
