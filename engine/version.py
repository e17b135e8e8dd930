"""The version of the distribution, and the commit it was built from."""

from __future__ import annotations

import json
import os
from importlib import metadata

__version__ = "0.1.0"


def commit() -> str:
    """The commit: KVASIR_COMMIT, which images set, or what pip noted when it installed from a repository; else ""."""
    given = os.environ.get("KVASIR_COMMIT", "")
    if given:
        return given
    try:
        origin = metadata.distribution("kvasir-llm").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return ""
    return str(json.loads(origin or "{}").get("vcs_info", {}).get("commit_id", ""))
