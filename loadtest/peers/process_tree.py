"""A server and the processes that it starts: their memory at its highest, and their end. Linux only (/proc)."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

import psutil

from loadtest.own_server import stop

KILL_TIMEOUT_S, KILL_POLL_S = 10.0, 0.01


def members(pid: int) -> list[psutil.Process]:
    """The process and all that it started, directly or not, that still run; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [member for member in (process, *process.children(recursive=True)) if _runs(member)]
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    """False also for one that has ended and waits for its parent to notice."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def peak_rss_bytes(pid: int) -> int:
    """Sum of each living member's highest resident memory so far.

    Pages that several processes share count once for each; what members used that have ended does not count.
    """
    return sum(_high_water_mark(process.pid) for process in members(pid))


def _high_water_mark(pid: int) -> int:
    # a process that ends between listing and reading has no status, a kernel thread or zombie no such line
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def cpu_s(pid: int) -> float:
    """User and system time of this one process so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the first process, which gets time to end its own; whoever is left is killed, by process id."""
    tree = members(process.pid)
    stop(process)
    left = [member for member in tree if _runs(member)]
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while any(_runs(member) for member in left) and time.monotonic() < deadline:
        time.sleep(KILL_POLL_S)
