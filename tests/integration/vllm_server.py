"""A vLLM server of its own for the length of a ``with`` block, as the commands start it, and its counters."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

from autointerp.llm.local import server as vllm_server
from autointerp.llm.local.model import VllmModel, find_python

REPOSITORY = Path(__file__).resolve().parents[2]
EAGER = "--enforce-eager"
"""Nothing is compiled: that takes longer than these tests."""

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy lies between us and ourselves


class VllmServer(vllm_server.VllmServer):
    """``with VllmServer(model_folder, log_file) as server: … server.url …``; started, and called as its folder is.

    :raises Unavailable: it is not installed, or ends or hangs before it is ready.
    """

    def __init__(self, model: Path, log: Path) -> None:
        served = VllmModel(str(model), model.name, arguments=(EAGER,))
        super().__init__(served, find_python(), log, start_seconds=600)

    def __enter__(self) -> VllmServer:
        asyncio.run(self.ready())
        return self

    def _make_environment(self) -> dict[str, str]:
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(self.log.parent / "vllm-cache")}
        return super()._make_environment() | own

    def metric(self, name: str) -> float:
        """One of the server's counters, summed over its labels."""
        with _open(f"{self.url}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{", 1)[0].split(" ", 1)[0] == name]
        assert found, f"the server has no metric {name}"
        return sum(found)
