"""How child processes are started: by exec, with our package importable and nothing else changed."""

from __future__ import annotations

import os
from pathlib import Path


def environment() -> dict[str, str]:
    """The parent's variables, with the folder of our packages first on the module path."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = root if not inherited else os.pathsep.join((root, inherited))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
