"""Headers of safetensors files, whole and damaged in every way the format allows."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import ConfigError
from engine.models import safetensors_file
from engine.models.safetensors_file import read_checkpoint, read_header


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_header_of_the_official_writer_is_understood(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.zeros((), dtype=torch.int64),
        "d": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert {name: e.shape for name, e in entries.items()} == {"a": (3, 5), "b": (7,), "c": (), "d": (0, 4)}
    for name, e in entries.items():
        assert content[e.offset : e.offset + e.num_bytes] == tensors[name].view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"[]", b"", "not an object"),
        (b'{"a": 1, "a": 1}', b"", "a name occurs twice"),
        (b"[" * 10**5, b"", "not valid JSON"),
        ({"a": 3}, b"", "'a' has no description"),
        ({"a": entry(0, 4, [1], "F99")}, bytes(4), "unknown dtype 'F99'"),
        ({"a": entry(0, 4, [-1])}, bytes(4), "malformed shape"),
        ({"a": entry(0, 4, [1.0])}, bytes(4), "malformed shape"),
        ({"a": {**entry(0, 4, [1]), "data_offsets": [0]}}, bytes(4), "malformed data_offsets"),
        ({"a": entry(0, 8, [1])}, bytes(8), r"8 bytes, its shape \[1\] needs 4"),
        ({"a": entry(8, 4, [1])}, bytes(8), "-4 bytes"),
        ({"a": entry(0, 4, [2**40, 2**40])}, bytes(4), "needs 4835703278458516698824704"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), "overlap or leave a hole at byte"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), "overlap or leave a hole at byte"),
        ({"a": entry(0, 8, [2])}, bytes(4), "was the download complete"),
        ({"a": entry(0, 4, [1])}, bytes(9), "its header describes"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_header(write(tmp_path / "model.safetensors", header, data))


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 0), struct.pack("<Q", 2**63), struct.pack("<Q", 9)])
def test_a_header_that_cannot_be_there_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"header of -?[0-9]+ bytes in a file of"):
        read_checkpoint(tmp_path)


def test_a_header_above_the_limit_is_refused_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 50)
    path = write(tmp_path / "model.safetensors", {"a": entry(0, 4, [1])}, bytes(4))
    with pytest.raises(ConfigError, match="limit 50"):
        read_header(path)


@given(data=st.binary(max_size=64), cut=st.integers(0, 200))
def test_any_bytes_give_entries_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    write(path, {"a": entry(0, 4, [1]), "b": entry(4, 8, [2], "F16")}, bytes(8))
    content = path.read_bytes()
    path.write_bytes(content[:cut] + data + content[cut + len(data) :])
    try:
        entries = read_header(path)
    except ConfigError:
        return
    assert all(e.offset + e.num_bytes <= path.stat().st_size for e in entries.values())


def shards(folder: Path, weight_map: Any) -> None:
    for name in ("one", "two"):
        save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_together(tmp_path: Path) -> None:
    shards(tmp_path, {"one": "one.safetensors", "two": "two.safetensors"})
    assert {name: e.path.name for name, e in read_checkpoint(tmp_path).items()} == {
        "one": "one.safetensors",
        "two": "two.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"one": "three.safetensors"}, "shard three.safetensors is missing"),
        ({"one": "two.safetensors"}, "lists 1 tensors that their shards lack, first 'one'"),
        ({"one": "../one.safetensors"}, "is not the name of a safetensors file in the same folder"),
        ({"one": "/etc/passwd"}, "is not the name of a safetensors file in the same folder"),
        ({"one": "one.bin"}, "is not the name of a safetensors file in the same folder"),
        ([], "weight_map must be an object"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    shards(tmp_path, weight_map)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(tmp_path)


def test_pickles_are_named_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin is a pickle, which is never loaded"):
        read_checkpoint(tmp_path)
