"""What a hardened process refuses."""

from __future__ import annotations

import subprocess
import sys

from engine import children


def test_nothing_can_be_unpickled_once_it_is_forbidden() -> None:
    program = (
        "import pickle, collections\n"
        "from engine.hardening import ForbiddenOperation, forbid_pickle\n"
        "data = pickle.dumps(collections.OrderedDict(a=1))\n"
        "pickle.loads(data)\n"
        "forbid_pickle()\n"
        "try:\n"
        "    pickle.loads(data)\n"
        "except ForbiddenOperation:\n"
        "    print('refused')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=children.environment(), capture_output=True, check=True
    )
    assert result.stdout == b"refused\n"
