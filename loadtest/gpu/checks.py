"""Whether the kernels compute on this device what they should, and what the device can do at best."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import torch

from loadtest.gpu.record import Run

WORKERS = 12


def run_checks(run: Run) -> None:
    """The kernel tests, which take the GPU for Triton where there is one, bf16 included."""
    tests = ["tests/kernels/test_merge_attention.py"] if run.tiny else ["tests/kernels"]
    # the gpu-marked tests too; without our settings and fixtures, which want packages that such a machine may not have
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "--noconftest"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", *tests, "-k", "triton", "-m", "not slow"]
    if importlib.util.find_spec("xdist") is not None and not run.tiny:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    environment = dict(os.environ)
    if run.device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    limit = run.seconds_left
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environment)
    except subprocess.TimeoutExpired as error:
        run.record("kernel tests", error=f"not done after {limit:.0f} s", tail=str(error.stdout or "")[-3000:])
        return
    tail = (result.stdout[-3000:] + result.stderr[-1000:]).strip()
    summary = (result.stdout.strip().splitlines() or [""])[-1]
    if result.returncode:
        print(tail)
        run.record("kernel tests", error=f"exit code {result.returncode}: {summary}", tail=tail)
    else:
        run.record("kernel tests", summary=summary, tail=tail)


def measure_limits(run: Run) -> None:
    """Copy bandwidth (bytes read plus written), read bandwidth, and the rate of a bf16 matrix product."""
    elements, size = run.size(1 << 31, 1 << 16), run.size(8192, 64)
    source = torch.randn(elements, dtype=torch.bfloat16, device=run.device)
    target = torch.empty_like(source)
    copy_ms = min(run.ms(lambda: target.copy_(source)) for _ in range(2))
    as_int = source.view(torch.int64)
    read_ms = run.ms(lambda: as_int.max())
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=run.device) for _ in range(2))
    product_ms = run.ms(lambda: a @ b)
    run.limits = {
        "copy_gb_per_s": 2 * source.nbytes / 1e6 / copy_ms,
        "read_gb_per_s": source.nbytes / 1e6 / read_ms,
        "matmul_tflops": 2 * size**3 / 1e9 / product_ms,
    }
    run.record("limits", None, **run.limits)
