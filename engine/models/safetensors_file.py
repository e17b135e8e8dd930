"""Headers of safetensors files: which tensors a checkpoint holds, where, and whether the files are whole. Torch-free.

Format: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the data.
Source: github.com/huggingface/safetensors, README, "Format". Every rule there is checked before a byte of data is read.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.models.fields import read_json

MAX_HEADER_BYTES = 100 * 1024 * 1024
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor."""

    path: Path
    dtype: str  # key of ITEM_BYTES
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the start of the file
    num_bytes: int


def read_checkpoint(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder by name, from one file or from the shards that the index lists.

    Raises ConfigError when there is no checkpoint, a shard is missing or damaged, or index and shards disagree.
    """
    if (folder / _INDEX).is_file():
        return _read_shards(folder)
    if (folder / _SINGLE).is_file():
        return read_header(folder / _SINGLE)
    found = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {found[0]} is a pickle, which is never loaded: convert it to safetensors" if found else ""
    raise ConfigError(f"model folder {folder.name!r} has neither {_SINGLE} nor {_INDEX}{hint}")


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(folder, _INDEX).section("weight_map").raw
    entries: dict[str, TensorEntry] = {}
    for shard in sorted({str(value) for value in weight_map.values()}):
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ConfigError(f"{_INDEX}: {shard[:80]!r} is not the name of a safetensors file in the same folder")
        if not (folder / shard).is_file():
            raise ConfigError(f"shard {shard} is missing, {_INDEX} lists it")
        header = read_header(folder / shard)
        entries |= {name: entry for name, entry in header.items() if weight_map.get(name) == shard}
    absent = sorted(weight_map.keys() - entries.keys())
    if absent:
        raise ConfigError(f"{_INDEX} lists {len(absent)} tensors that their shards lack, first {absent[0]!r}")
    return entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. Raises ConfigError when the header breaks a rule of the format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= MAX_HEADER_BYTES or 8 + length > size:
            raise ConfigError(f"{path.name}: header of {length} bytes in a file of {size}, limit {MAX_HEADER_BYTES}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path.name}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ConfigError(f"{path.name}: the header is not an object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_tiling(path, entries, 8 + length, size)
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    def wrong(what: str) -> ConfigError:
        return ConfigError(f"{path.name}: tensor {name[:120]!r} has {what}")

    if not isinstance(value, dict):
        raise wrong("no description")
    dtype, shape, offsets = value.get("dtype"), _counts(value.get("shape")), _counts(value.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise wrong(f"the unknown dtype {str(dtype)[:20]!r}")
    if shape is None:
        raise wrong("a malformed shape")
    if offsets is None or len(offsets) != 2:
        raise wrong("malformed data_offsets")
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise wrong(f"{offsets[1] - offsets[0]} bytes, its shape {list(shape)} needs {num_bytes}")
    return TensorEntry(path, dtype, shape, data_start + offsets[0], num_bytes)


def _counts(values: Any) -> tuple[int, ...] | None:
    """A list of non-negative integers, or None when it is something else."""
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        return None
    return tuple(values)


def _check_tiling(path: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    """The tensors must cover the data exactly: no overlap, no hole, nothing beyond the end."""
    position = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.num_bytes)):
        if entry.offset != position:
            raise ConfigError(f"{path.name}: tensors overlap or leave a hole at byte {position}")
        position += entry.num_bytes
    if position != size:
        raise ConfigError(f"{path.name} has {size} bytes, its header describes {position}; was the download complete?")
