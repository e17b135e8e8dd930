"""`python -m loadtest.micro [NAMES]`: a table of all kernels, or of those named; `--json FILE` for machines.

Quick by default (under a minute on two cores); --seconds gives every kernel more rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from loadtest.micro import attention, matrices, rows, sampling
from loadtest.micro.bench import Bench, Limits, Result, measure, measure_limits
from loadtest.micro.setup import Setup, cpu_setup, cuda_setup

KERNELS: dict[str, Callable[[Setup], list[Bench]]] = {
    "linear": matrices.linear,
    "bf16_linear": matrices.bf16_linear,
    "decode": attention.decode,
    "prefill": attention.prefill,
    "rms_norm": rows.rms_norm,
    "rope": rows.rope,
    "kv_write": rows.kv_write,
    "act_and_mul": rows.act_and_mul,
    "sampling": sampling.sampling,
    "embedding": rows.embedding,
    "lora": matrices.lora,
    "attention_scores": attention.attention_scores,
    "top_slots": rows.top_slots,
    "move_slots": rows.move_slots,
    "packed_blocks": attention.packed_blocks,
    "decoder_step": matrices.decoder_step,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    setup = cuda_setup() if arguments.device == "cuda" else cpu_setup()
    limits = measure_limits(setup.device)
    print(
        f"{setup.device}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f}: "
        f"{limits.gb_per_s:.1f} GB/s, {limits.gflops:.0f} GFLOP/s"
    )
    print(f"{'kernel':<24}{'case':<48}{'us':>10}{'of bound':>10} {'bound':<11}{'x library':>9}  library")
    results = []
    for name in arguments.names or KERNELS:
        for bench in KERNELS[name](setup):
            results.append(measure(bench, limits, arguments.seconds, setup.device))
            print(line(results[-1]), flush=True)
        gc.collect()  # a kernel's weights go before the next one's come
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(_document(limits, results), indent=2) + "\n")
    return 0


def line(result: Result) -> str:
    speedup = "" if result.speedup is None else f"{result.speedup:.2f}"
    return (
        f"{result.kernel:<24}{result.case:<48}{result.us:>10.1f}{result.share_of_bound:>10.2f} "
        f"{result.bound_by:<11}{speedup:>9}  {result.best_library or ''}"
    )


def _document(limits: Limits, results: Sequence[Result]) -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "limits": asdict(limits),
        "kernels": [result.to_json() for result in results],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtest.micro", description="Kernels against their bounds.")
    parser.add_argument("names", nargs="*", choices=[*KERNELS, []], metavar="NAME", help=", ".join(KERNELS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each kernel and size (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
