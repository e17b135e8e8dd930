"""`make gpu`: checks every kernel on the GPU, measures kernels and engine against their limits, writes JSON.

Stays under nine minutes on one H200. Needs CUDA torch, Triton and pytest; the engine part uses random weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHECK_TIMEOUT_S = 240
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 128001,
    "bos_token_id": 128000,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("loadtest/results/gpu.json"))
    parser.add_argument("--skip-checks", action="store_true", help="measure only")
    parser.add_argument("--skip-engine", action="store_true", help="kernels only")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"environment": environment(), "command": " ".join(sys.argv)}
    steps: list[tuple[str, Callable[[], Any]]] = [("limits", measure_limits), ("kernels", measure_kernels)]
    if not arguments.skip_checks:
        steps.insert(0, ("checks", run_checks))
    if not arguments.skip_engine:
        steps.append(("engine", measure_engine))
    for name, step in steps:
        started = time.perf_counter()
        results[name] = step()
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        # written after every step: a run that is cut short still leaves what it has
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "checks"}, indent=1))
    failed = results.get("checks", {}).get("exit_code", 0)
    return int(failed)


def environment() -> dict[str, str]:
    import torch
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def run_checks() -> dict[str, Any]:
    """The kernel tests, which take the GPU for Triton where there is one, bf16 included."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels", "-k", "triton", "-m", "not slow"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    return {"exit_code": result.returncode, "tail": result.stdout[-3000:] + result.stderr[-1000:]}


def measure_limits() -> dict[str, float]:
    """Copy bandwidth (bytes read plus written) and bf16 matrix product rate of this device."""
    import torch

    source = torch.randn(1 << 29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {
        "copy_gb_per_s": 2 * source.numel() * 2 / 1e6 / _ms(lambda: target.copy_(source)),
        "matmul_tflops": 2 * 8192**3 / 1e9 / _ms(lambda: a @ b),
    }


def measure_kernels() -> list[dict[str, Any]]:
    rows = [decode_attention(batch, context) for batch, context in ((256, 1024), (64, 8192), (16, 32768), (4, 131072))]
    rows += [prefill_attention(length) for length in (2048, 8192)]
    rows += small_kernels()
    return rows


def decode_attention(batch: int, context: int) -> dict[str, Any]:
    """One new token per row; the floor is reading all keys and values once."""
    from loadtest.micro.attention import decode_bench
    from loadtest.micro.setup import cuda_setup

    bench = decode_bench(cuda_setup(), batch, context)
    ms = _ms(bench.run)
    return {
        "kernel": "decode_attention",
        "batch": batch,
        "context": context,
        "ms": ms,
        "gb_per_s": bench.num_bytes / 1e6 / ms,
    }


def prefill_attention(length: int) -> dict[str, Any]:
    """One whole prompt against torch's scaled_dot_product_attention."""
    from loadtest.micro.attention import prefill_bench
    from loadtest.micro.setup import cuda_setup

    bench = prefill_bench(cuda_setup(), length)
    own, peer = _ms(bench.run), _ms(bench.library["sdpa"])
    return {
        "kernel": "prefill_attention",
        "length": length,
        "ms": own,
        "tflops": bench.num_flops / 1e9 / own,
        "sdpa_ms": peer,
        "ratio_to_sdpa": peer / own,
    }


def small_kernels() -> list[dict[str, Any]]:
    """Memory-bound operations of the 8B shape: bytes per second."""
    from loadtest.micro import rows, sampling
    from loadtest.micro.setup import cuda_setup

    setup = cuda_setup()
    found = []
    for make in (rows.rms_norm, rows.act_and_mul, sampling.greedy):
        for bench in make(setup):
            ms = _ms(bench.run)
            found.append({"kernel": bench.kernel, "ms": ms, "gb_per_s": bench.num_bytes / 1e6 / ms})
    return found


def measure_engine() -> list[dict[str, Any]]:
    """Decode speed of a random-weight Llama-3.1-8B shape through the whole core, by batch size."""
    import tempfile

    from engine.config_load import load
    from engine.launch import build_core

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
        options = {
            "model": folder,
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_model_len": 4096,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "kv_cache_memory_mib": 40960,
        }
        core, info = build_core(load(options))
        return [
            {"batch": batch, "weight_bytes": info.weight_bytes, **_decode_speed(core, batch)}
            for batch in (1, 16, 64, 256)
        ]


def _decode_speed(core: Any, batch: int, prompt_tokens: int = 128, output_tokens: int = 65) -> dict[str, float]:
    """Tokens per second of pure decode steps, and the share of step time spent outside the model."""
    import torch

    from engine.types import EngineRequest, SamplingParams

    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    for i in range(batch):
        prompt = [1000 + (i * 7919 + j) % 100_000 for j in range(prompt_tokens)]
        core.add(EngineRequest(request_id=f"b{batch}-{i}", prompt_token_ids=prompt, sampling=sampling))
    core.stats()
    while core.has_work:
        core.step()
    torch.cuda.synchronize()
    stats = core.stats()
    decodes = [step for step in stats.step_seconds if step[0] == "decode" and step[3] == batch][5:]
    seconds = sum(step[1] for step in decodes)
    outside = sum(stats.scheduler_seconds) + sum(stats.sampler_seconds)
    total = sum(step[1] for step in stats.step_seconds)
    return {
        "decode_tokens_per_s": sum(step[2] for step in decodes) / seconds if decodes else 0.0,
        "step_ms": seconds / len(decodes) * 1000 if decodes else 0.0,
        "share_outside_model": outside / total,
    }


def _ms(run: Callable[[], Any] | Sequence[Callable[[], Any]]) -> float:
    """Median milliseconds of one call; of several that could take turns, the first."""
    from triton.testing import do_bench

    return float(do_bench(run if callable(run) else run[0], return_mode="median"))


if __name__ == "__main__":
    sys.exit(main())
