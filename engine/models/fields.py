"""Typed reading of a model folder's JSON files. A wrong value is a ConfigError that names file, key and value.

Model folders come from strangers: every size has a bound, so that a hostile file fails at once instead of making us
allocate. Knows no tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

MAX_JSON_BYTES = 64 * 1024 * 1024  # index files of the largest checkpoints have some megabytes
_REQUIRED: Any = object()


def read_json(folder: Path, name: str) -> Fields:
    """The object in `folder/name`. Raises ConfigError when it is absent, too large or no JSON object."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ConfigError(f"{name} has {size} bytes, the limit is {MAX_JSON_BYTES}")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name} of model folder {folder.name!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} of model folder {folder.name!r} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{name} must hold a JSON object, it holds a {type(raw).__name__}")
    return Fields(raw, name)


class Fields:
    """A JSON object with typed access. A key that is absent or null gives the default; without one it is an error."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def error(self, name: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name} must be {expected}, it is {str(self.raw.get(name))[:80]!r}")

    def integer(self, name: str, default: int = _REQUIRED, *, low: int = 1, high: int = 2**24) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float = _REQUIRED, *, low: float = 0.0, high: float = 1e12) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: str = _REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of small non-negative integers, or one alone; absent is empty."""
        value = self._get(name, [])
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and 0 <= v < 2**31 for v in values):
            raise self.error(name, "an integer or a list of integers")
        return tuple(int(v) for v in values)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers; absent is empty."""
        values = self._get(name, [])
        if not isinstance(values, list) or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise self.error(name, "a list of numbers")
        return tuple(float(v) for v in values)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; absent is empty."""
        values = self._get(name, [])
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self.error(name, "a list of strings")
        return tuple(values)

    def section(self, name: str) -> Fields:
        """A nested object; absent is empty."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self.where}: {name} is missing")
        return default
