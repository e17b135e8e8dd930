"""Weights for the decoder, one at a time: from safetensors files, or random ones for benchmarks.

A weight is read straight into the one tensor that is handed out (stacked from its checkpoint tensors, never mapped or
concatenated), the taker packs it and lets go: besides what the model keeps, at most one weight is in memory.
Source: no code from a checkpoint is ever run; pickles are refused (see safetensors_file).
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.models.config import DecoderConfig
from engine.models.layout import Layout, Stack, checkpoint_layout, is_redundant
from engine.models.safetensors_file import TensorEntry, read_checkpoint

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READ_BYTES = 64 * 1024 * 1024  # between two calls of `progress`
_MIN_OWN_BYTES = 1024 * 1024
_NAMES_IN_ERROR = 5


class WeightSource(Protocol):
    """What the decoder is built from."""

    dtype: torch.dtype  # of the embedding, and so of the checkpoint

    def has(self, name: str) -> bool:
        """Whether the layout has a weight of that name (biases are optional)."""

    def take(self, name: str) -> Tensor:
        """A fresh CPU tensor that the caller owns; each name once."""


class CheckpointWeights:
    """Weights of a model folder. All names and shapes are checked before the first byte is read."""

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        *,
        without: frozenset[str] = frozenset(),
    ) -> None:
        """dtype: cast to it while reading; None keeps what is stored. without: tensors that another part reads.

        Raises ConfigError for a wrong checkpoint.
        """
        self._layout = checkpoint_layout(config)
        entries = _with_prefix(read_checkpoint(folder))
        self._entries = {name: entry for name, entry in entries.items() if name not in without}
        _check(self._layout, self._entries, config)
        self._cast = dtype
        self._progress = progress
        self._total = sum(self._entries[name].num_bytes for s in self._layout.values() for name, _ in s.parts)
        self._done = 0
        self.stored_dtype = _DTYPES[self._entry("embedding").dtype]
        self.dtype = dtype or (torch.float32 if self.stored_dtype == torch.float64 else self.stored_dtype)

    def has(self, name: str) -> bool:
        return name in self._layout

    def take(self, name: str) -> Tensor:
        stack = self._layout[name]
        stored = {_DTYPES[self._entries[part].dtype] for part, _ in stack.parts}
        target = self._cast or (self.dtype if len(stored) > 1 or torch.float64 in stored else next(iter(stored)))
        weight = _own_memory(stack.shape, target)
        row = 0
        for part, shape in stack.parts:
            entry = self._entries[part]
            rows = weight[row : row + shape[0]]
            row += shape[0]
            if _DTYPES[entry.dtype] == target:
                self._read(entry, rows)
            else:
                raw = torch.empty(shape, dtype=_DTYPES[entry.dtype])
                self._read(entry, raw)
                rows.copy_(raw)
        return weight

    def _entry(self, name: str) -> TensorEntry:
        return self._entries[self._layout[name].parts[0][0]]

    def _read(self, entry: TensorEntry, out: Tensor) -> None:
        """Fill the contiguous `out` with the stored bytes."""
        for count in _read_parts(entry, out):
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


def _own_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; a large one outside of the heap, where letting go of it would only leave a hole."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes < _MIN_OWN_BYTES:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a page fault for every 4 KiB would take longer than the copy
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def read_tensor(entry: TensorEntry) -> Tensor:
    """One small tensor in the type it is stored in. Raises ConfigError for a type that no weight has."""
    if entry.dtype not in _DTYPES:
        raise ConfigError(f"{entry.path.name} has a tensor of dtype {entry.dtype}; known are {', '.join(_DTYPES)}")
    out = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
    for _ in _read_parts(entry, out):
        pass
    return out


def _read_parts(entry: TensorEntry, out: Tensor) -> Iterator[int]:
    """Fills the contiguous `out` with the stored bytes; yields how many each read brought."""
    buffer = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with entry.path.open("rb", buffering=0) as file:
        os.lseek(file.fileno(), entry.offset, os.SEEK_SET)
        at = 0
        while at < entry.num_bytes:
            count = file.readinto(buffer[at : at + _READ_BYTES])
            if not count:
                raise ConfigError(f"{entry.path.name} ended early while it was read; was it replaced meanwhile?")
            at += count
            yield count


def _with_prefix(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Checkpoints saved from the bare decoder lack the prefix that the decoder has inside of a language model."""
    if "embed_tokens.weight" not in entries:
        return entries
    return {f"model.{name}": entry for name, entry in entries.items()}


class DummyWeights:
    """Random weights of the right shapes, the same for the same seed in any order of taking."""

    def __init__(
        self, config: DecoderConfig, dtype: torch.dtype, seed: int = 0, progress: Progress | None = None
    ) -> None:
        self._layout = checkpoint_layout(config)
        self._norm_value = 1.0 - config.norm_offset
        self._seed = seed
        self._progress = progress
        self._total = sum(_num_elements(stack) for stack in self._layout.values()) * dtype.itemsize
        self._done = 0
        self.dtype = dtype

    def has(self, name: str) -> bool:
        return name in self._layout

    def take(self, name: str) -> Tensor:
        """Norms are one, biases zero, matrices uniform with variance 1 / columns: activations keep their size."""
        shape = self._layout[name].shape
        if len(shape) == 1:
            weight = torch.full(shape, 0.0 if name.endswith("_bias") else self._norm_value, dtype=self.dtype)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
            bound = (3.0 / shape[1]) ** 0.5
            weight = torch.empty(shape, dtype=self.dtype).uniform_(-bound, bound, generator=generator)
        self._done += weight.nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)
        return weight


def num_parameters(config: DecoderConfig) -> int:
    """Parameters of the model; a tied head counts once."""
    return sum(_num_elements(stack) for stack in checkpoint_layout(config).values())


def _num_elements(stack: Stack) -> int:
    return torch.Size(stack.shape).numel()


def _check(layout: Layout, entries: Mapping[str, TensorEntry], config: DecoderConfig) -> None:
    wanted = {name: shape for stack in layout.values() for name, shape in stack.parts}
    problems = [
        _listed("missing", [name for name in wanted if name not in entries]),
        _listed("unexpected", [name for name in entries if name not in wanted and not is_redundant(name, config)]),
        _listed(
            "of another shape",
            [
                f"{name} {list(entries[name].shape)} instead of {list(shape)}"
                for name, shape in wanted.items()
                if name in entries and entries[name].shape != shape
            ],
        ),
        _listed(
            f"of a dtype other than {', '.join(_DTYPES)}",
            [f"{n} {entries[n].dtype}" for n in wanted if n in entries and entries[n].dtype not in _DTYPES],
        ),
    ]
    if any(problems):
        raise ConfigError(
            f"the checkpoint does not fit config.json ({config.architecture}): {'; '.join(filter(None, problems))}"
        )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMES_IN_ERROR} more" if len(names) > _NAMES_IN_ERROR else ""
    return f"{len(names)} {what}: {', '.join(names[:_NAMES_IN_ERROR])}{more}"
