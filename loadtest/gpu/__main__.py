"""Runs the parts of `make gpu`, each in a process of its own with a time limit, and writes one JSON file as it goes.

    python -m loadtest.gpu --only decode prefill
    python -m loadtest.gpu --device cpu --tiny          every line of it on a CPU, with sizes that measure nothing

Stays under nine minutes on one H200. Needs CUDA torch, Triton and pytest; random weights are made on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.gpu.parts import PARTS, Part, chosen

SLACK_S = 15.0  # beyond a part's own limit, for what it does between two looks at the clock


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every part ran to its end without an error; a missed target is no error."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.part is not None:
        return run_part(arguments)
    try:
        parts = chosen(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    if (device := device_name(arguments.device)) is None:
        print("make gpu: torch finds no CUDA device", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"environment": environment(device), "settings": _settings(arguments), "parts": {}}
    started = time.perf_counter()
    limits: dict[str, float] = {}
    for part in parts:
        seconds = min(part.seconds * arguments.scale, arguments.total - (time.perf_counter() - started))
        if seconds < 5:
            results["parts"][part.name] = {"status": "left out", "cases": [], "seconds": 0.0}
            continue
        print(f"{part.name}, at most {seconds:.0f} s", flush=True)
        found = run_child(part, arguments, device, seconds, limits)
        limits = found.pop("limits", None) or limits
        results["parts"][part.name] = found
        _write(arguments.out, results)
    results["seconds"] = time.perf_counter() - started
    _write(arguments.out, results)
    print_table(results)
    return int(any(not _is_good(found) for found in results["parts"].values()))


def run_child(
    part: Part, arguments: argparse.Namespace, device: str, seconds: float, limits: dict[str, float]
) -> dict[str, Any]:
    """The part's cases, limits, status and seconds; whatever it had written when it was ended counts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, "-m", "loadtest.gpu", "--part", part.name, "--device", device, "--out", str(file)]
        command += ["--seconds", str(seconds), "--limits", json.dumps(limits)] + ["--tiny"] * arguments.tiny
        started = time.perf_counter()
        try:
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # nothing is downloaded, so nothing may wait for a network
            code = subprocess.run(command, timeout=seconds + SLACK_S, check=False, env=offline).returncode
            status = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"ended after {seconds + SLACK_S:.0f} s"
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"cases": []}
    return {"status": status, "seconds": round(time.perf_counter() - started, 1), **found}


def run_part(arguments: argparse.Namespace) -> int:
    """One part, in this process."""
    import torch

    from loadtest.gpu.record import Run

    part = next(part for part in PARTS if part.name == arguments.part)
    torch.manual_seed(0)
    run = Run(
        device=torch.device(arguments.device),
        tiny=arguments.tiny,
        seconds=arguments.seconds,
        file=arguments.out,
        limits=json.loads(arguments.limits),
    )
    run.save()
    part.load()(run)
    run.save()
    return 0


def device_name(asked: str) -> str | None:
    """The device to use; None where none of that kind is found."""
    import torch

    if asked == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def environment(device: str) -> dict[str, str]:
    import torch
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def print_table(results: dict[str, Any]) -> None:
    """Every target beside what was measured, last: the end of the output is what is read first."""
    print(f"\n{'part':<13}{'case':<46}{'target':<34}{'measured':>10}")
    for name, found in results["parts"].items():
        if found["status"] != "done":
            print(f"{name:<13}{found['status']}")
        for case in found["cases"]:
            if "target" in case:
                target = case["target"]
                text = f"{target['measure']} {'>=' if target['at_least'] else '<='} {target['bound']:g}"
                verdict = "hit" if case["hit"] else "MISS"
                print(f"{name:<13}{case['case']:<46}{text:<34}{case[target['measure']]:>10.3f} {verdict}")
            elif "error" in case or "skipped" in case:
                print(f"{name:<13}{case['case']:<46}{(case.get('error') or case.get('skipped'))[:120]}")


def _is_good(found: dict[str, Any]) -> bool:
    return found["status"] in ("done", "left out") and not any("error" in case for case in found["cases"])


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"only": arguments.only, "tiny": arguments.tiny, "device": arguments.device, "scale": arguments.scale}


def _write(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtest.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("loadtest/results/gpu.json"))
    parser.add_argument("--only", nargs="+", metavar="PART", help=", ".join(part.name for part in PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--total", type=float, default=525.0, help="seconds of all parts together")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the time limit of each part")
    for name in ("--part", "--limits"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
