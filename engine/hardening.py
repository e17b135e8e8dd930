"""Settings that make a running process harder to abuse."""

from __future__ import annotations

import sys


class ForbiddenOperation(RuntimeError):
    """Something tried to unpickle an object in a process that never does so."""


def forbid_pickle() -> None:
    """From now on, unpickling anything that names a class or function raises. Cannot be taken back."""
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        raise ForbiddenOperation(f"unpickling {arguments} is forbidden here")
