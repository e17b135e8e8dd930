"""Every block of docs/recipes.md runs against a real server with the bundled model, and prints something."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text("utf-8")
PLACE = "http://127.0.0.1:8000"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "bash"]
LIBRARIES = {"anthropic", "langchain_openai", "litellm", "openai"}


def library_of(code: str) -> str:
    names = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    return next(name for name in names if name in LIBRARIES)


def test_every_client_has_a_recipe_and_every_block_is_run() -> None:
    assert {library_of(code) for code in PYTHON} == LIBRARIES
    assert SHELL
    assert len(PYTHON) + len(SHELL) == len(BLOCKS) == PAGE.count("```") // 2
    assert all(PLACE in code for _, code in BLOCKS)


@pytest.mark.parametrize("code", PYTHON, ids=[f"{library_of(code)}-{i}" for i, code in enumerate(PYTHON)])
def test_a_python_recipe_runs(code: str, server_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(library_of(code)) is None:
        pytest.skip(f"{library_of(code)} is not installed; its newest release needs other versions of our packages")
    exec(compile(code.replace(PLACE, server_url), "docs/recipes.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("code", SHELL)
def test_a_shell_recipe_runs(code: str, server_url: str) -> None:
    done = subprocess.run(["bash", "-euc", code.replace(PLACE, server_url)], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert b'"usage"' in done.stdout
