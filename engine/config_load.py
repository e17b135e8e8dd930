"""Builds a Config from a TOML file, KVASIR_* variables and command-line flags; the later source wins."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import Config, sections
from engine.errors import ConfigError

TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off"})
TYPE_WORDS = {int: "a whole number", float: "a number", str: "text"}
VARIABLE_PREFIX = "KVASIR_"
# read elsewhere: by the terminal client and by the build of the kernels
OTHER_VARIABLES = frozenset({"KVASIR_URL", "KVASIR_API_KEY", "KVASIR_CACHE_DIR", "KVASIR_CPU_ISA", "KVASIR_COMMIT"})
SECTION_TITLES = {
    "model": "model",
    "cache": "KV cache",
    "scheduler": "scheduler",
    "runtime": "runtime",
    "lora": "low-rank adapters",
    "speculation": "speculative decoding",
    "server": "HTTP server",
    "limits": "limits on requests",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per option, grouped by section. Flags that are not given leave no trace in the namespace."""
    for section, section_type in sections().items():
        group = parser.add_argument_group(SECTION_TITLES[section])
        hints = typing.get_type_hints(section_type)
        for field in dataclasses.fields(section_type):
            _add_flag(group, field, hints[field.name])


def load(
    flags: Mapping[str, Any] | None = None, *, file: str | Path | None = None, environ: Mapping[str, str] | None = None
) -> Config:
    """Merges the sources. Raises ConfigError that names the option, the value and what is accepted."""
    flags, environ = flags or {}, environ or {}
    tables = _read_toml(file) if file is not None else {}
    unknown = set(tables) - set(sections())
    if unknown:
        raise ConfigError(f"unknown table [{sorted(unknown)[0]}] in the configuration; known: {', '.join(sections())}")
    built: dict[str, Any] = {}
    for section, section_type in sections().items():
        table = tables.get(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"[{section}] in the configuration must be a table")
        built[section] = _build_section(section, section_type, table, flags, environ)
    return Config(**built)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """KVASIR_* variables that set nothing: most likely misspelled. Not an error: orchestrators set some unasked."""
    options = {_variable(field) for section in sections().values() for field in dataclasses.fields(section)}
    return sorted(
        name for name in environ if name.startswith(VARIABLE_PREFIX) and name not in options | OTHER_VARIABLES
    )


def describe(config: Config) -> dict[str, Any]:
    """All options as one flat mapping, secrets replaced: for the start-up log."""
    flat: dict[str, Any] = {}
    for section in sections():
        part = getattr(config, section)
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            flat[f"{section}.{field.name}"] = "(hidden)" if field.metadata.get("secret") and value else value
    return flat


def _build_section(
    section: str, section_type: type, table: dict[str, Any], flags: Mapping[str, Any], environ: Mapping[str, str]
) -> Any:
    hints = typing.get_type_hints(section_type)
    fields = dataclasses.fields(section_type)
    names = {field.name for field in fields}
    unknown = sorted(name for name in table if name.replace("-", "_") not in names)
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} in [{section}]; known: {', '.join(sorted(names))}")
    table = {name.replace("-", "_"): value for name, value in table.items()}
    values: dict[str, Any] = {}
    for field in fields:
        variable = _variable(field)
        if field.name in table:
            values[field.name] = _convert(table[field.name], hints[field.name], f"{section}.{field.name}")
        if variable in environ:
            values[field.name] = _convert(environ[variable], hints[field.name], variable)
        if field.name in flags:
            flag = "--" + field.name.replace("_", "-")
            values[field.name] = _convert(flags[field.name], hints[field.name], flag)
        if field.name in values:
            _check(field, values[field.name])
    return section_type(**values)


def _variable(field: dataclasses.Field[Any]) -> str:
    return VARIABLE_PREFIX + field.name.upper()


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    choices, low, high = (field.metadata.get(key) for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise ConfigError(f"{field.name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    if value is None:
        return
    if low is not None and not value >= low:  # also catches NaN
        raise ConfigError(f"{field.name} is {value}; it must be at least {low}")
    if high is not None and not value <= high:
        raise ConfigError(f"{field.name} is {value}; it must be at most {high}")


def _read_toml(file: str | Path) -> dict[str, Any]:
    try:
        with Path(file).open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {str(file)!r}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file {str(file)!r} is not TOML: {error}") from None


def _convert(value: Any, hint: Any, name: str) -> Any:
    """A value from TOML, a variable or a flag in the type of its field."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None or value == "":
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(part.strip() for item in items for part in str(item).split(",") if part.strip())
    if hint is bool:
        word = str(value).lower()
        if word in TRUE_WORDS or word in FALSE_WORDS:
            return word in TRUE_WORDS
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    if isinstance(value, bool | list | dict):
        raise ConfigError(f"{name} is {value!r}; it must be {TYPE_WORDS[hint]}")
    try:
        return hint(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}; it must be {TYPE_WORDS[hint]}") from None


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    default = field.default_factory() if callable(field.default_factory) else field.default
    text = field.metadata["help"].replace("%", "%%")
    if not field.metadata.get("secret") and default not in (None, (), ""):
        text += f" (default: {default})"
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "metavar": "VALUE"}
    if field.metadata.get("choices"):
        kwargs["metavar"] = "{" + ",".join(choice or "none" for choice in field.metadata["choices"]) + "}"
    if typing.get_origin(hint) is tuple:
        kwargs |= {"action": "append", "help": text + "; several: repeat it or separate them with commas"}
    group.add_argument(flag, **kwargs)
