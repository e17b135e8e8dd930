"""What a part of `make gpu` sees: the device, how much time is left, and where its measurements go."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CPU_CALLS = 3


@dataclass(frozen=True)
class Target:
    """What a measurement must reach; of the issue's list, so it stands beside the value whether reached or not."""

    measure: str  # key of the case's values
    bound: float
    at_least: bool = True

    def is_hit(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass
class Run:
    """One part while it runs. `tiny` sizes exercise every line on a CPU and measure nothing of interest."""

    device: torch.device
    tiny: bool
    seconds: float  # that the part may take
    file: Path | None = None  # rewritten after every case: a part that is ended keeps what it has
    limits: dict[str, float] = field(default_factory=dict)  # of the part "limits": copy_gb_per_s, matmul_tflops
    cases: list[dict[str, Any]] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.perf_counter() - self._started)

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.tiny else real

    def record(self, name: str, target: Target | None = None, **values: Any) -> None:
        """Adds a case, with its target judged; values that are None are left out."""
        entry: dict[str, Any] = {"case": name, **{key: value for key, value in values.items() if value is not None}}
        if target is not None:
            entry["target"] = {"measure": target.measure, "bound": target.bound, "at_least": target.at_least}
            entry["hit"] = target.is_hit(values[target.measure])
        self.cases.append(entry)
        print(f"  {line_of(entry)}", flush=True)
        self.save()

    def save(self) -> None:
        if self.file is not None:
            self.file.write_text(json.dumps({"limits": self.limits, "cases": self.cases}) + "\n")

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Around one case: its failure is recorded, and the next case runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.record(name, error=f"{type(error).__name__}: {error}"[:2000])
            if isinstance(error, torch.AcceleratorError):  # whatever follows would fail alike
                raise
            self.release()

    def has_time(self, name: str, seconds: float = 5.0) -> bool:
        """Whether a case of so many seconds may begin; records that it was left out if not."""
        if self.seconds_left >= seconds or self.tiny:
            return True
        self.record(name, skipped=f"{self.seconds_left:.0f} s left of {self.seconds:.0f}")
        return False

    def ms(self, run: Callable[[], object], *, in_graph: bool = False) -> float:
        """Median milliseconds of one call; `in_graph` replays it, so that gaps between launches do not count."""
        if self.device.type == "cpu":
            return _cpu_ms(run)
        from triton.testing import do_bench, do_bench_cudagraph

        if in_graph:
            with torch.cuda.stream(torch.cuda.Stream()):
                return float(do_bench_cudagraph(run, rep=40, return_mode="median"))
        return float(do_bench(run, warmup=10, rep=60, return_mode="median"))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Gives freed memory back to the device, before the next large thing is made."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def share_of_copy(self, num_bytes: float, ms: float) -> float:
        """Bandwidth reached over that of a copy."""
        return num_bytes / 1e6 / ms / self.limits["copy_gb_per_s"]


def line_of(case: dict[str, Any]) -> str:
    """One case for people."""
    values = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in case.items()
        if name not in ("case", "target", "hit", "tail") and not isinstance(value, (list, dict))
    ]
    return f"{case['case']}: {', '.join(values)}"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in float64; NaN when one has a NaN."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)


def _cpu_ms(run: Callable[[], object]) -> float:
    times = []
    for _ in range(CPU_CALLS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1000 * sorted(times)[len(times) // 2]
