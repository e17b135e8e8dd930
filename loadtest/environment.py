"""Where a measurement was made: versions, hardware, command and commit, so that a file of results explains itself."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from engine.version import __version__

PACKAGES = ("torch", "transformers", "httpx", "numpy")
SECRETS = ("--api-key",)


def environment() -> dict[str, Any]:
    """Of the machine that measures, which is also the server's when that was started for the measurement."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kvasir": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES if _is_installed(name)},
        "commit": _commit(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": list(os.getloadavg()),
        "command": command(sys.argv),
    }


def command(argv: list[str]) -> str:
    """As it was typed, without keys and without the folder of the program."""
    words, hidden = [Path(argv[0]).name], False
    for word in argv[1:]:
        name, separator, _ = word.partition("=")
        words.append("..." if hidden else f"{name}=..." if separator and name in SECRETS else word)
        hidden = word in SECRETS
    return shlex.join(words)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str | None:
    """Of the checkout that this file is in; None when it was installed from a package, or without git."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
