"""The walls between the parts, as import rules that are checked and not only written down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What `server` may import of the engine.
SERVER_MAY_USE = {
    "engine.batching.memory",
    "engine.batching.ordering",
    "engine.client",
    "engine.config",
    "engine.config_load",
    "engine.errors",
    "engine.launch",
    "engine.launch_calibration",
    "engine.launch_drafter",
    "engine.logs",
    "engine.metrics",
    "engine.sampling_params",
    "engine.types",
    "engine.version",
}

# Packages whose modules may import torch; everything else must load without it.
TENSOR_PACKAGES = ("kernels", "engine.execution", "engine.models", "engine.compression", "engine.mimir")


def modules(package: str) -> list[tuple[str, Path]]:
    """Dotted name and file of every module of a top-level package."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append((".".join(parts), path))
    return found


MODULE_NAMES = {name for package in ("server", "engine", "kernels", "loadtest") for name, _ in modules(package)}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, lazily inside functions or only for typing too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module, f"{path}: import from nowhere"
            # `from engine import errors` names a module of the package as well as the package
            found = {f"{node.module}.{alias.name}" for alias in node.names} & MODULE_NAMES
            names.update(found or {node.module})
    return names


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_server_imports_only_the_engine_modules_that_speak_its_language() -> None:
    for module, path in modules("server"):
        for name in imports(path):
            assert not is_inside(name, "torch"), f"{module} imports {name}"
            assert not is_inside(name, "kernels"), f"{module} imports {name}"
            if is_inside(name, "engine"):
                assert name in SERVER_MAY_USE, f"{module} imports {name}"


def test_kernels_import_neither_engine_nor_server() -> None:
    for module, path in modules("kernels"):
        for name in imports(path):
            assert not is_inside(name, "engine"), f"{module} imports {name}"
            assert not is_inside(name, "server"), f"{module} imports {name}"


def test_engine_never_imports_the_server() -> None:
    for module, path in modules("engine"):
        for name in imports(path):
            assert not is_inside(name, "server"), f"{module} imports {name}"


def test_scheduling_and_text_never_import_the_data_plane() -> None:
    for package in ("engine/scheduling", "engine/text"):
        for module, path in modules(package):
            for name in imports(path):
                for wall in ("torch", "kernels", "engine.execution", "engine.models", "engine.compression"):
                    assert not is_inside(name, wall), f"{module} imports {name}"


def test_execution_and_models_see_only_the_plan_of_the_scheduler() -> None:
    for package in ("engine/execution", "engine/models"):
        for module, path in modules(package):
            for name in imports(path):
                if is_inside(name, "engine.scheduling"):
                    assert name == "engine.scheduling.plan", f"{module} imports {name}"


def test_no_wildcard_imports_and_no_pickle() -> None:
    for package in ("server", "engine", "kernels", "loadtest"):
        for module, path in modules(package):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert all(alias.name != "*" for alias in node.names), f"{module} imports *"
            forbidden = imports(path) & {"pickle", "dill", "marshal", "shelve", "cloudpickle"}
            assert not forbidden, f"{module} imports {forbidden}"


def torch_free_modules() -> list[str]:
    names = [name for package in ("server", "engine") for name, _ in modules(package)]
    return [
        name
        for name in names
        if not any(is_inside(name, package) for package in TENSOR_PACKAGES) and not name.endswith("__main__")
    ]


def test_torch_free_modules_import_without_torch() -> None:
    """One fresh interpreter in which importing torch fails: also catches what is imported indirectly."""
    program = "import sys, importlib\nsys.modules['torch'] = None\n" + "\n".join(
        f"importlib.import_module({name!r})" for name in torch_free_modules()
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("package", ["server", "engine", "kernels", "loadtest"])
def test_every_module_says_what_it_is(package: str) -> None:
    for module, path in modules(package):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{module} has no docstring"
