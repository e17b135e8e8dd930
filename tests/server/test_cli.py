"""The `kvasir` command: flags that are wrong, and the terminal client."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import ConfigError
from server import terminal
from server.cli import main


@pytest.mark.parametrize("command", [["serve", "--prot", "3"], ["chat", "--mod", "x"], ["complete", "--temp", "1"]])
def test_a_misspelled_or_shortened_flag_sets_nothing(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(command)
    assert exit.value.code == 2
    *usage, reason = capsys.readouterr().err.strip().splitlines()
    assert f"unrecognized arguments: {command[1]}" in reason
    assert len(usage) <= 2


def test_bench_takes_the_flags_of_the_load_test(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--help"])
    assert exit.value.code == 0
    assert "--concurrency" in capsys.readouterr().out
    assert main(["bench", "--url", "http://127.0.0.1:9", "--num-requests", "1"]) == 2
    assert "cannot reach http://127.0.0.1:9" in capsys.readouterr().err


class Talker:
    """A client that fails on one message and answers the others with what it was asked."""

    model, url = "m", "u"

    def stream_chat(self, messages: list[dict[str, str]]) -> Iterator[str]:
        if messages[-1]["content"] == "bad":
            raise ConfigError("too long")
        yield f"{len(messages)} messages"


def test_a_failed_message_does_not_end_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["one", "bad", "two", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert terminal.chat(Talker(), system=None, message="") == 0  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert "1 messages\n3 messages\n" in shown.out, "the failed message is not part of the conversation"
    assert shown.err == "kvasir: too long\n"


def test_a_key_that_no_header_can_carry_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        terminal.Client("http://127.0.0.1:9", "k\u20ac", "m", {})


def test_python_m_server_is_kvasir_serve() -> None:
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "server", "--help"], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0
    assert "--served-model-name" in result.stdout
