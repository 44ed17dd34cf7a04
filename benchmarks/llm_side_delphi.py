"""delphi's side of ``llm_client.py``: its HTTP client under its pipeline, as its own scoring uses them.

    python benchmarks/llm_side_delphi.py MESSAGES URL CONCURRENCY

``MESSAGES`` is a JSON file of the conversations to send. Nothing is kept and no answer is read beyond its text: less
than delphi does for a score. Only these two modules are imported: the rest of the package wants vLLM and a GPU's tools.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import delphi

clients = types.ModuleType("delphi.clients")
clients.__path__ = [str(Path(delphi.__file__).parent / "clients")]
sys.modules["delphi.clients"] = clients

from delphi.clients.openrouter import OpenRouter
from delphi.pipeline import Pipeline


async def main(path: str, url: str, concurrency: int) -> dict[str, float]:
    conversations = json.loads(Path(path).read_text())
    client = OpenRouter("m", "none", f"{url}/v1/chat/completions", max_tokens=4, temperature=0.0)
    answered = 0

    async def send(messages: Any) -> None:
        nonlocal answered
        text = (await client.generate(messages)).text
        answered += text == "1"

    def loaded(n: int) -> Any:
        def loader() -> Iterator[Any]:
            yield from conversations[:n]

        return loader

    await Pipeline(loaded(2 * concurrency), send).run(concurrency)
    answered = 0
    began = time.perf_counter(), time.process_time()
    await Pipeline(loaded(len(conversations)), send).run(concurrency)
    return {
        "seconds": time.perf_counter() - began[0],
        "processor": time.process_time() - began[1],
        "answered": answered,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
