"""Compare ways of asking a judge: how many contexts a request holds, and which prompts. Needs a server with a model.

    python cli.py demo                                                          # makes runs with contexts
    python benchmarks/judging.py --llm-url http://127.0.0.1:8080/v1
    python benchmarks/judging.py --llm-url … --sizes 1 5 20 --prompts prompts benchmarks/prompts/*

Judges see contexts of the explaining side only, so prompts chosen here are not fitted to the test sets. Explanations
are those of the run's language model, or of a TOML file with lines such as ``131 = "The word 'self'."``. Every way is
asked about the same contexts, half of them activating. A size of 1 is the ``single`` protocol, others are ``batch``; a
folder of prompts without the files of a protocol is not asked in it.
Answers are kept in ``build/judging.sqlite``, so that a stopped measurement resumes.

A row: share of contexts with a verdict, balanced accuracy and AUROC (means over latents, with the standard error), and
prompt tokens of a request, over the requests that were not answered by the file. The difference to the first row is
paired by latent.
"""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from outcome import about, leave, prompts_parser
from rich.console import Console
from rich.table import Table

from autointerp.contexts.material import Material
from autointerp.contexts.sampler import Context
from autointerp.journal.journal import open_journal
from autointerp.journal.method import BASELINE
from autointerp.journal.usage import Usage
from autointerp.llm.client import LlmClient, ResponseCache
from autointerp.llm.prompts import FOLDER, conversation
from autointerp.scoring.intervals import auroc, balanced_accuracy
from autointerp.scoring.judges.base import Judgement
from autointerp.scoring.judges.llm import LlmJudge
from sae.common.estimate import Estimate
from sae.common.progress import say
from sae.study.run import Run

Row = dict[str, Any]


def read_explanations(run: Run, path: Path | None) -> dict[int, str]:
    """Return the explanation of each latent."""
    if path is not None:
        return {int(latent): text for latent, text in tomllib.loads(path.read_text(encoding="utf-8")).items()}
    with open_journal(run) as journal:
        table = journal.explanations(status="ok", draw=0)
    table = table[table["explainer"] != BASELINE]
    return dict(zip(table["latent"].tolist(), table["text"].tolist(), strict=True))


def draw_contexts(run: Run, latents: Sequence[int], n: int) -> dict[int, list[Context]]:
    """Return up to ``n`` activating and as many silent contexts of each latent, mixed."""
    sampler = Material.of(run).sampler
    drawn = {}
    for latent in latents:
        active = sampler.explaining(latent)[:n]
        contexts = active + sampler.background(latent, len(active))
        order = np.random.default_rng(latent).permutation(len(contexts))
        drawn[latent] = [contexts[i] for i in order]
    return drawn


async def judge_all(
    judge: LlmJudge, explanations: Mapping[int, str], contexts: Mapping[int, list[Context]]
) -> dict[int, list[Judgement]]:
    """Return the judgements of each latent, in the order of its contexts."""
    return {latent: await judge.judge(explanations[latent], contexts[latent]) for latent in contexts}


def summarise(
    name: str, judged: Mapping[int, list[Judgement]], contexts: Mapping[int, list[Context]], seconds: float
) -> Row:
    """Return the row of one way of asking."""
    usage = sum((j.usage for found in judged.values() for j in found), Usage())
    n = sum(map(len, judged.values()))
    scores: dict[str, list[float | None]] = {"balanced_accuracy": [], "auroc": []}
    for latent, found in judged.items():
        pairs = [(c.truth, j) for c, j in zip(contexts[latent], found, strict=True) if j.label is not None]
        truth = [t for t, _ in pairs]
        scores["balanced_accuracy"].append(_known(balanced_accuracy(truth, [bool(j.label) for _, j in pairs])))
        ps = [j.p for _, j in pairs if j.p is not None]
        scores["auroc"].append(_known(auroc(truth, ps)) if len(ps) == len(pairs) else None)
    return {
        "name": name,
        "contexts": n,
        "judged": sum(j.label is not None for found in judged.values() for j in found) / n,
        "yes": float(np.mean([j.label for found in judged.values() for j in found if j.label is not None])),
        **scores,
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens / max(1, usage.requests),
        "uncached_tokens": (usage.prompt_tokens - usage.cached_tokens) / max(1, usage.requests),
        "seconds": round(seconds, 1),
    }


def _known(estimate: Estimate) -> float | None:
    return None if np.isnan(estimate.value) else estimate.value


def show(rows: Sequence[Row]) -> None:
    """Print the rows, each with its difference to the first."""
    table = Table(
        "way", "judged", "says yes", "balanced accuracy", "against the first", "AUROC", "tokens", "not cached"
    )
    for row in rows:
        tokens = [f"{row[key]:.0f}" for key in ("prompt_tokens", "uncached_tokens")]
        table.add_row(
            row["name"],
            f"{row['judged']:.1%}",
            f"{row['yes']:.0%}",
            _mean(row["balanced_accuracy"]),
            _mean(_subtract(row["balanced_accuracy"], rows[0]["balanced_accuracy"]), "+"),
            _mean(row["auroc"]),
            *tokens,
        )
    Console(width=120).print(table)


def _subtract(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


def _mean(values: Sequence[float | None], sign: str = "") -> str:
    known = np.array([x for x in values if x is not None])
    return f"{known.mean():{sign}.3f} ± {known.std(ddof=1) / np.sqrt(len(known)):.3f}" if len(known) > 1 else ""


async def measure(given: Any) -> tuple[list[Row], str]:
    """Ask in every way, and return the rows and the name of the model."""
    run = Run.open(given.run, given.root)
    explanations = read_explanations(run, given.explanations)
    contexts = draw_contexts(run, sorted(explanations)[: given.latents], given.contexts)
    rows = []
    Path("build").mkdir(exist_ok=True)
    async with LlmClient(
        given.llm_url, given.llm_model, cache=ResponseCache(Path("build/judging.sqlite")), concurrency=given.concurrency
    ) as client:
        await client.check()
        for folder in given.prompts:
            for size in given.sizes:
                judge = LlmJudge(client, "single" if size == 1 else "batch", contexts_per_request=size)
                if not (folder / f"judge_{judge.protocol}.md").exists():
                    continue
                judge._conversation = conversation(f"judge_{judge.protocol}", folder)
                begun = time.monotonic()
                judged = await judge_all(judge, explanations, contexts)
                rows.append(summarise(f"{folder.name}, {size}", judged, contexts, time.monotonic() - begun))
                say(f"{rows[-1]['name']}: {rows[-1]['requests']} requests in {rows[-1]['seconds']:.0f} s")
        return rows, client.model


def main() -> None:
    parser = prompts_parser(__doc__, FOLDER)
    parser.add_argument("--explanations", type=Path, help="TOML file; default: the run's own, by a language model")
    parser.add_argument("--latents", type=int, default=12, help="at most")
    parser.add_argument("--contexts", type=int, default=20, help="of each kind, at most")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 10, 20, 40], help="contexts in a request")
    parser.add_argument("--concurrency", type=int, default=2)
    given = parser.parse_args()
    begun = time.time()
    rows, model = asyncio.run(measure(given))
    leave(given, rows, about(begun, model=model), lambda: show(rows))


if __name__ == "__main__":
    main()
