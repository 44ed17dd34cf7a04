"""Compare prompts by the first answers of an explainer: how many copy the prompt? Needs a server with a model.

    python cli.py demo                                                          # makes runs with contexts
    python benchmarks/explaining.py --llm-url http://127.0.0.1:8080/v1
    python benchmarks/explaining.py --llm-url … --prompts prompts benchmarks/prompts/five_examples

Every prompt is asked about the same latents and contexts, once, at temperature 0. A row: how many answers repeat an
example or the instructions, how many have no explanation in them, and all texts. Answers are kept in
``build/explaining.sqlite``, so that a stopped measurement resumes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from outcome import about, leave, prompts_parser
from rich.console import Console
from rich.table import Table

from autointerp.contexts.material import Material
from autointerp.explaining.copies import find_copied
from autointerp.explaining.explainers.llm import LlmExplainer, parse_explanation
from autointerp.llm.client import LlmClient, ResponseCache
from autointerp.llm.exchange import AnswerFailed
from autointerp.llm.prompts import FOLDER, conversation
from sae.common.progress import say
from sae.study.run import Run

Row = dict[str, Any]


async def ask(client: LlmClient, folder: Path, contexts: dict[int, Any]) -> Row:
    """Return the row of one prompt."""
    shown = conversation("explain", folder)
    explainer = LlmExplainer(client)
    texts: dict[int, str | None] = {}
    for latent, examples in contexts.items():
        request = replace(explainer.request(examples, shown=shown), max_tokens=150)
        try:
            texts[latent], _ = await client.ask(request, parse_explanation)
        except AnswerFailed:
            texts[latent] = None
    sources = [*shown.examples, shown.instructions]
    return {
        "name": folder.name,
        "latents": len(texts),
        "copied": sum(text is not None and find_copied(text, sources) is not None for text in texts.values()),
        "failed": sum(text is None for text in texts.values()),
        "texts": {str(latent): text for latent, text in texts.items()},
    }


async def measure(given: Any) -> tuple[list[Row], str]:
    """Ask with every prompt; return the rows and the name of the model."""
    sampler = Material.of(Run.open(given.run, given.root)).sampler
    contexts = {latent: sampler.explaining(latent)[: given.contexts] for latent in given.latents}
    rows = []
    Path("build").mkdir(exist_ok=True)
    async with LlmClient(
        given.llm_url, given.llm_model, cache=ResponseCache(Path("build/explaining.sqlite"))
    ) as client:
        await client.check()
        for folder in given.prompts:
            rows.append(await ask(client, folder, contexts))
            say(f"{folder.name}: {rows[-1]['copied']} of {len(contexts)} copied")
        return rows, client.model


def show(rows: Sequence[Row]) -> None:
    table = Table("prompts", "latents", "copied", "no explanation")
    for row in rows:
        table.add_row(row["name"], *(str(row[key]) for key in ("latents", "copied", "failed")))
    Console(width=100).print(table)


def main() -> None:
    parser = prompts_parser(__doc__, FOLDER)
    latents = [1302, 897, 1534, 1914, 1358, 856, 1306, 1259, 1770]
    parser.add_argument("--latents", type=int, nargs="+", default=latents, help="default: nine of the demo's")
    parser.add_argument("--contexts", type=int, default=10, help="of each latent, at most")
    given = parser.parse_args()
    begun = time.time()
    rows, model = asyncio.run(measure(given))
    leave(given, rows, about(begun, model=model), lambda: show(rows))


if __name__ == "__main__":
    main()
