"""``python -m vllm.entrypoints.openai.api_server`` for tests.

``FAKE_VLLM`` holds a JSON object:

- ``record``: a file to which each start adds a line: process ids, arguments, environment, and which of those started
  before are still there.
- ``die``: what to print before ending with code ``code`` (1).
- ``delay``: seconds until it listens. ``never``: it does not.
- ``deaf``: SIGTERM is ignored, by the process and by the child that it starts.
- ``ends_after``: so many questions, and the process is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fake_server import FakeServer, Reply, Seen
from fake_vllm_python import alive


class Server(FakeServer):
    """The fake server with vLLM's ``/health``, and its word on which pages may read what it says."""

    ends_after: int | None = None
    origins: Sequence[str] = ()

    def models_reply(self, headers: dict[str, str], path: str) -> Reply:
        if path != "/health":
            return super().models_reply(headers, path)
        page = headers.get("origin", "")
        return Reply(body={}, headers={"access-control-allow-origin": page} if page in self.origins else {})

    def chat_reply(self, seen: Seen) -> Reply:
        if self.ends_after is not None and len(self.requests) >= self.ends_after:
            print("RuntimeError: the engine is gone", flush=True)
            os._exit(3)
        return super().chat_reply(seen)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--allowed-origins", type=json.loads)
    given = parser.parse_known_args()[0]
    how: dict[str, Any] = json.loads(os.environ.get("FAKE_VLLM", "{}"))
    if how.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if "record" in how:
        path = Path(how["record"])
        before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        started = {
            "pids": [os.getpid(), child.pid],
            "arguments": sys.argv[1:],
            "environment": dict(os.environ),
            "beside": [pid for start in before for pid in start["pids"] if alive(pid)],
        }
        with path.open("a") as record:
            record.write(json.dumps(started) + "\n")
    print(f"(APIServer pid=7) INFO 11-26 04:00:00 [api_server.py:1] loading {given.model} slowly", flush=True)
    if "die" in how:
        print(how["die"], flush=True)
        sys.exit(how.get("code", 1))
    time.sleep(600 if how.get("never") else how.get("delay", 0))
    assert given.host == "127.0.0.1"
    with Server(models=given.served_model_name, port=given.port) as server:
        server.origins = given.allowed_origins
        server.ends_after = how.get("ends_after")
        time.sleep(600)


if __name__ == "__main__":
    main()
