"""One benchmark, how it is timed, and what it is compared with. Knows no kernel.

A kernel cannot be faster than its fewest bytes at the machine's bandwidth, nor than its operations at the machine's
rate of multiply-adds; `Limits` measures both in the same process.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels import native

BUFFER_BYTES = 1 << 28  # far beyond any cache
FMA_COUNT = 2_000_000
FMA_CHAINS = 12  # of fma_peak.cpp
ROUNDS = 3
MAX_CALLS = 200  # of one round
PAUSE_S = 0.005  # threads of the library look for work for a while and would take the next one's cores

Run = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """A kernel at one size. A `Run` is one call; those of a list take turns, so that their data is in no cache."""

    kernel: str
    case: str
    run: Run | Sequence[Run]
    num_bytes: int  # fewest that must be read and written
    num_flops: int = 0
    library: Mapping[str, Run | Sequence[Run]] = field(default_factory=dict)  # the same result by library operations


@dataclass(frozen=True)
class Limits:
    """What the machine does at best, all threads together."""

    gb_per_s: float  # bytes read plus bytes written
    gflops: float

    def bound_s(self, bench: Bench) -> float:
        return max(bench.num_bytes / self.gb_per_s, bench.num_flops / self.gflops) / 1e9

    def bound_by(self, bench: Bench) -> str:
        return "memory" if bench.num_bytes / self.gb_per_s >= bench.num_flops / self.gflops else "arithmetic"


@dataclass(frozen=True)
class Result:
    """Times are medians in microseconds."""

    kernel: str
    case: str
    us: float
    bound_us: float
    bound_by: str
    best_library: str | None
    library_us: dict[str, float]

    @property
    def share_of_bound(self) -> float:
        """1 is the bound; more means that the data came out of a cache."""
        return self.bound_us / self.us

    @property
    def speedup(self) -> float | None:
        """How many times faster than the fastest library operation."""
        return None if self.best_library is None else self.library_us[self.best_library] / self.us

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share_of_bound": self.share_of_bound, "speedup": self.speedup}


def measure(bench: Bench, limits: Limits, seconds: float, device: torch.device) -> Result:
    """The kernel and all library operations in turn, several calls at a time, for about `seconds` in all."""
    runs = {"": bench.run, **bench.library}
    takes = {name: timed(run, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in takes}
    slice_s = seconds / (ROUNDS * len(takes))
    for _ in range(ROUNDS):
        for name, take in takes.items():
            time.sleep(PAUSE_S)
            take()  # builds, allocates and wakes threads
            times[name] += _calls(take, slice_s)
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    us = medians.pop("")
    return Result(
        kernel=bench.kernel,
        case=bench.case,
        us=us,
        bound_us=1e6 * limits.bound_s(bench),
        bound_by=limits.bound_by(bench),
        best_library=min(medians, key=medians.__getitem__) if medians else None,
        library_us=medians,
    )


def _calls(take: Callable[[], float], seconds: float) -> list[float]:
    deadline = time.perf_counter() + seconds
    times = [take()]
    while len(times) < MAX_CALLS and time.perf_counter() < deadline:
        times.append(take())
    return times


def timed(run: Run | Sequence[Run], device: torch.device) -> Callable[[], float]:
    """A function that makes the next call and gives its seconds, the device's work included."""
    calls = [run] if callable(run) else list(run)
    index = -1

    def take() -> float:
        nonlocal index
        index = (index + 1) % len(calls)
        call = calls[index]
        _synchronize(device)
        started = time.perf_counter()
        call()
        _synchronize(device)
        return time.perf_counter() - started

    return take


def measure_limits(device: torch.device, rounds: int = 5) -> Limits:
    """Best of `rounds`: what others do to the machine only lowers it."""
    source = torch.ones(BUFFER_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device)
    read = timed(lambda: source.sum(), device)
    arithmetic = _product_rate if device.type == "cuda" else _fma_rate
    copy(), read()
    gb_per_s = max(max(2 * BUFFER_BYTES / copy(), BUFFER_BYTES / read()) for _ in range(rounds)) / 1e9
    return Limits(gb_per_s=gb_per_s, gflops=max(arithmetic(device) for _ in range(rounds)) / 1e9)


def _fma_rate(device: torch.device) -> float:
    """Operations per second of multiply-adds in registers, on as many threads as kernels use."""
    run = _fma_function()
    lanes = ctypes.c_int64()
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads) as pool:  # the call lets go of the interpreter's lock
        started = time.perf_counter()
        list(pool.map(lambda _: run(FMA_COUNT, ctypes.byref(lanes)), range(num_threads)))
        seconds = time.perf_counter() - started
    return 2.0 * FMA_CHAINS * FMA_COUNT * lanes.value * num_threads / seconds


@functools.cache
def _fma_function() -> Any:
    """Built like the kernels, for the same instruction set. Raises kernels.native.NativeBuildError."""
    function = ctypes.CDLL(str(native.build(source_dir=Path(__file__).parent))).kvasir_fma_peak
    function.argtypes = (ctypes.c_int64, ctypes.c_void_p)
    function.restype = ctypes.c_float
    return function


def _product_rate(device: torch.device) -> float:
    """Operations per second of the library's bfloat16 product of large square matrices."""
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    take = timed(lambda: a @ b, device)
    take()
    return 2 * size**3 / take()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
