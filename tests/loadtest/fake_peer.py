"""A server that passes for any peer: takes all flags, answers health and tells its own; started as a script by tests.

FAKE_PEER: "ready", "never" (health stays 503) or "dies". A child of it takes FAKE_CHILD_MIB of memory and gives it
back at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

CHILD = (
    "import sys, time; x = bytearray(b'1') * (int(sys.argv[1]) << 20); del x; print('done', flush=True); time.sleep(60)"
)


def main() -> None:
    behaviour = os.environ.get("FAKE_PEER", "ready")
    if behaviour == "dies":
        sys.exit("the weights are not there")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, os.environ.get("FAKE_CHILD_MIB", "1")], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_ready = behaviour == "ready"
            self.send_response(200 if is_ready else 503)
            self.end_headers()
            environment = {key: value for key, value in os.environ.items() if key.startswith(("VLLM", "OMP", "HF"))}
            self.wfile.write(json.dumps({"flags": sys.argv[1:], "env": environment, "child": child.pid}).encode())

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
