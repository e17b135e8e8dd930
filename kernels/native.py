"""Builds the C++ kernels (`kernels/**/*.cpp`) into one shared library at first use and loads it.

The library lies in a private cache folder under a name made of the sources, flags, instruction set and compiler, so
it is built once per machine kind; processes that start together build it once. No torch headers: functions take raw
pointers. Threads are the library's own (csrc/team.h); torch's pool serves torch's operations.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent
NUM_BUILD_JOBS = 2
COMPILE_TIMEOUT_S = 300

# No -ffast-math: infinities and NaN carry meaning. No contraction: two paths that must agree bit by bit say where they
# fuse a multiplication and an addition (simd.h: fma).
FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]

# Explicit flags and not -march=native: a cache folder may be shared by machines of one level.
ISA_FLAGS = {
    "x86-64-v4": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"],
    "x86-64-v3": ["-mavx2", "-mfma", "-mf16c"],
    "generic": [],
}

# Argument types of native functions, and the code by which they know an element type.
PTR = ctypes.c_void_p
INT = ctypes.c_int64
FLOAT = ctypes.c_float
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_DIGEST_BYTES = hashlib.sha256().digest_size


class NativeBuildError(RuntimeError):
    """The native library cannot be built or loaded; the message says why and what to do."""


def library() -> ctypes.CDLL | None:
    """The loaded native library, built if need be; None (after one warning) where that fails."""
    loaded, _ = _load_once()
    return loaded


def require() -> ctypes.CDLL:
    """The loaded native library. Raises NativeBuildError instead of returning None."""
    loaded, reason = _load_once()
    if loaded is None:
        raise NativeBuildError(reason)
    return loaded


@functools.cache
def function(name: str, *argtypes: Any, restype: Any = None) -> Any:
    """The native function `name` with its types declared; by default it returns nothing. Raises NativeBuildError."""
    found = getattr(require(), name)
    found.argtypes = argtypes
    found.restype = restype
    return found


def num_threads() -> int:
    """Threads that a native kernel should use: torch's setting."""
    return torch.get_num_threads()


def reset() -> None:
    """Forget the loaded library, so that the next call of `library` looks again (tests)."""
    _load_once.cache_clear()
    function.cache_clear()


def cache_dir() -> Path:
    """Folder of built libraries: `$KVASIR_CACHE_DIR`, else `$XDG_CACHE_HOME/kvasir`, else `~/.cache/kvasir`."""
    if own := os.environ.get("KVASIR_CACHE_DIR"):
        return Path(own) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvasir" / "kernels"


def isa_level(cpu_info: str | None = None) -> str:
    """Widest known instruction set of this CPU, from the flags in /proc/cpuinfo; `$KVASIR_CPU_ISA` overrides it."""
    if forced := os.environ.get("KVASIR_CPU_ISA"):
        if forced not in ISA_FLAGS:
            raise NativeBuildError(f"KVASIR_CPU_ISA is {forced!r}; known levels: {', '.join(ISA_FLAGS)}")
        return forced
    if cpu_info is None:
        if platform.machine() not in ("x86_64", "AMD64"):
            return "generic"
        path = Path("/proc/cpuinfo")
        cpu_info = path.read_text() if path.exists() else ""
    line = next((line for line in cpu_info.splitlines() if line.startswith("flags")), "")
    present = set(line.partition(":")[2].split())
    # The compiler's names are the kernel's with "-m" before them.
    return next(level for level, flags in ISA_FLAGS.items() if {flag[2:] for flag in flags} <= present)


def compiler() -> str | None:
    """Path of the C++ compiler: `$CXX`, else g++, else c++; None where there is none."""
    names = (os.environ.get("CXX"), "g++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def build(folder: Path | None = None, isa: str | None = None, source_dir: Path = SOURCE_DIR) -> Path:
    """Path of an intact library for these sources, compiled now unless `folder` (default: `cache_dir()`) has it.

    Without a compiler any library of the same sources and instruction set will do, so an image may carry one built
    elsewhere. Raises NativeBuildError.
    """
    folder = folder or cache_dir()
    isa = isa or isa_level()
    stem = f"kvasir-{platform.machine()}-{isa}-{_source_digest(source_dir, isa)}"
    cxx = compiler()
    if cxx is None:
        for path in sorted(folder.glob(f"{stem}-*.so")):
            if _is_intact(path):
                return path
        raise NativeBuildError("no C++ compiler found (looked for $CXX, g++, c++); install g++")
    _prepare_folder(folder)
    path = folder / f"{stem}-{_compiler_digest(cxx)}.so"
    if _is_intact(path):
        return path
    with _locked(folder / "build.lock"):
        if not _is_intact(path):  # another process may have built it while we waited
            _compile(cxx, isa, source_dir, path)
    return path


@functools.cache
def _load_once() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    try:
        path = build()
        try:
            return ctypes.CDLL(str(path)), ""
        except OSError as error:
            raise NativeBuildError(f"cannot load the built library: {error}; delete it to build it again") from error
    except NativeBuildError as error:
        logger.warning("native CPU kernels are off, the slower torch ones run instead: %s", error)
        return None, str(error)


def _sources(source_dir: Path) -> list[Path]:
    return sorted(source_dir.rglob("*.cpp"))


def _source_digest(source_dir: Path, isa: str) -> str:
    digest = hashlib.sha256(" ".join([*FLAGS, *ISA_FLAGS[isa]]).encode())
    for path in [*_sources(source_dir), *sorted(source_dir.rglob("*.h"))]:
        digest.update(f"\0{path.relative_to(source_dir)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _compiler_digest(cxx: str) -> str:
    try:
        version = subprocess.run([cxx, "--version"], capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(f"{cxx} --version failed: {error}; set CXX to a working C++ compiler") from error
    return hashlib.sha256(version).hexdigest()[:8]


def _prepare_folder(folder: Path) -> None:
    """Create the cache folder for its owner only, and refuse one into which others can put code."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise NativeBuildError(f"cannot create {folder}: {error}; set KVASIR_CACHE_DIR to a writable folder") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise NativeBuildError(f"{folder} belongs to or can be written by another user; set KVASIR_CACHE_DIR")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NativeBuildError(f"cannot open {path}: {error}; set KVASIR_CACHE_DIR to a writable folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(cxx: str, isa: str, source_dir: Path, target: Path) -> None:
    """Compile every source to an object, link, sign with a digest, and move the result into place at once."""
    start = time.perf_counter()
    sources = sorted(_sources(source_dir), key=lambda path: -path.stat().st_size)  # the longest first, for balance
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        objects = [str(Path(scratch) / f"{index}.o") for index in range(len(sources))]
        include = f"-I{source_dir / 'csrc'}"
        commands = [
            [cxx, *FLAGS, *ISA_FLAGS[isa], include, "-c", str(source), "-o", out]
            for source, out in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(NUM_BUILD_JOBS) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch) / "linked.so"
        _run([cxx, "-shared", "-fopenmp", *objects, "-o", str(linked)])
        content = linked.read_bytes()
        # The digest behind the ELF image tells a truncated or damaged file before it is mapped (which could be fatal).
        linked.write_bytes(content + hashlib.sha256(content).digest())
        linked.replace(target)
    logger.info("built the native CPU kernels (%s) in %.1f s: %s", isa, time.perf_counter() - start, target.name)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(f"{command[0]} could not run: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise NativeBuildError(f"{Path(command[0]).name} failed: {first.strip()}")


def _is_intact(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]
