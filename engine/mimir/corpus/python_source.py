"""Text that every Python installation carries: the standard library's sources and reference topics (PSF licence)."""

import ast
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "turtledemo",
    "pydoc_data",
    "ensurepip",
    "__pycache__",
}
MAX_FILE_CHARS = 200_000


@lru_cache(maxsize=1)
def source_files() -> tuple[str, ...]:
    """The standard library's modules as text, sorted by path; data-like folders and very long files are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts))
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return tuple(text for text in texts if 200 < len(text) < MAX_FILE_CHARS)


@lru_cache(maxsize=1)
def prose() -> tuple[str, ...]:
    """English paragraphs: the language reference topics that `help()` shows, then long docstrings."""
    from pydoc_data.topics import topics

    return (*(topics[name] for name in sorted(topics)), *_docstrings())


def _docstrings() -> Iterator[str]:
    for text in source_files():
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) > 120:
                    yield doc
