"""Options come from file, environment and flags; every mistake is one clear line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from engine.config import Config, sections
from engine.config_load import add_flags, describe, load, unknown_variables
from engine.errors import ConfigError


def parse(*flags: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(flags))


def test_option_names_are_unique_over_all_sections() -> None:
    names = [field.name for section in sections().values() for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))


def test_defaults_satisfy_their_own_bounds() -> None:
    for section in sections().values():
        for field in dataclasses.fields(section):
            default = getattr(section(), field.name)
            if default is not None and field.metadata["low"] is not None:
                assert default >= field.metadata["low"], field.name


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "kvasir.toml"
    file.write_text('[server]\nport = 1\nhost = "127.0.0.9"\nkeep_alive_s = 7\n')
    config = load(parse("--port", "3"), file=file, environ={"KVASIR_PORT": "2", "KVASIR_HOST": "127.0.0.8"})
    assert (config.server.port, config.server.host, config.server.keep_alive_s) == (3, "127.0.0.8", 7)


def test_nothing_given_is_the_default_config() -> None:
    assert load(parse()) == Config()


def test_lists_come_from_repeated_flags_commas_and_toml(tmp_path: Path) -> None:
    file = tmp_path / "kvasir.toml"
    file.write_text('[model]\nserved_model_name = ["a", "b"]\n')
    assert load(file=file).model.served_model_name == ("a", "b")
    assert load(parse("--served-model-name", "a,b", "--served-model-name", "c")).model.served_model_name == (
        "a",
        "b",
        "c",
    )


def test_a_misspelled_variable_is_found_and_those_of_others_are_not() -> None:
    environ = {"KVASIR_PORT": "1", "KVASIR_PRT": "1", "KVASIR_URL": "x", "KVASIR_CACHE_DIR": "x", "PORT": "1"}
    assert unknown_variables(environ) == ["KVASIR_PRT"]


def test_an_empty_variable_unsets_an_optional_value() -> None:
    assert load(environ={"KVASIR_MAX_MODEL_LEN": ""}).model.max_model_len is None


def test_secrets_are_hidden_in_the_description() -> None:
    config = load(environ={"KVASIR_API_KEYS": "k" * 32})
    assert "k" * 32 not in str(describe(config))
    assert config.server.api_keys == ("k" * 32,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1\n", "unknown option 'prot'"),
        ("[servers]\nport = 1\n", r"unknown table \[servers\]"),
        ("[server]\nport = 'x'\n", "server.port is 'x'; it must be a whole number"),
        ("[server]\nport = 70000\n", "port is 70000; it must be at most 65535"),
        ("[cache]\nenable_prefix_cache = 'maybe'\n", "must be true or false"),
        ("[model]\ndtype = 'int3'\n", "dtype is 'int3'; it must be one of"),
        ("[server\n", "is not TOML"),
        ("server = 3\n", r"\[server\] in the configuration must be a table"),
    ],
)
def test_a_wrong_file_names_the_mistake(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "kvasir.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(file=file)


def test_a_missing_file_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        load(file="nowhere.toml")


def test_nan_does_not_pass_a_bound() -> None:
    with pytest.raises(ConfigError, match="drain_timeout_s is nan"):
        load(environ={"KVASIR_DRAIN_TIMEOUT_S": "nan"})


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.parent.glob("configs/*.toml")), ids=lambda f: f.name)
def test_every_shipped_configuration_loads(file: Path) -> None:
    load(file=file)
