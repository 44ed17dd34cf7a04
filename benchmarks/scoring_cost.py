"""Count the prompt tokens of scoring a latent, in total and not cached, compared with delphi.

    python cli.py demo                                            # makes runs with explanations and verdicts
    python benchmarks/scoring_cost.py --run demo_a [--vllm-python .venv-vllm/bin/python] [--json] [--out x.json]

Same latents, explanations, contexts and estimator (detection, balanced accuracy). delphi's prompt is made by the file
``detection_prompt.py`` of its own package (``eai-delphi``, installed without its dependencies into ``build/delphi``),
with its default of five contexts in a request. Ours are the requests that ``score`` sends.

``adaptive`` stops where `score --ci-half-width` would, by the verdicts of the run's n-gram judge. delphi is then
given the fixed size ``n`` with the same standard error, at which the mean over latents of the variance of the score
equals that of the adaptive scores (``same error``), and the size at which no latent's standard
error, whatever its rates, is above the one asked for (``same guarantee``: rates of one half).

Tokens are counted by the tokenizer and chat template of ``--model``, the cache is simulated in blocks of 16 with
nothing evicted. With ``--vllm-python`` a vLLM server is then asked the same requests for ``--measured`` latents, and
its counters ``vllm:prefix_cache_queries`` and ``…_hits`` are compared with the arithmetic.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
from outcome import about, leave, parser_of

from autointerp.contexts.material import Material
from autointerp.contexts.sampler import Context, TestSet
from autointerp.journal.journal import Journal
from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import Message
from autointerp.llm.tokens import BLOCK, count_cached, load_local_tokenizer
from autointerp.scoring.adaptive import Look, StoppingRule, find_stop
from autointerp.scoring.judges.llm import LlmJudge
from autointerp.scoring.questions import TestSets
from autointerp.scoring.scorers.detection import DetectionScorer
from sae.common.errors import BadInput
from sae.study.run import Run

ROOT = Path(__file__).resolve().parent.parent
DELPHI = "eai-delphi==0.1.3"
SHOWN = 5  # delphi's num_examples_per_scorer_prompt
CPU_BLOCK = 128  # tokens in a block of vLLM's prefix cache on CPUs
BUNDLED = ROOT / "sae" / "activations" / "bundled" / "pystdlib-4m"

Messages = Sequence[Message]
Ask = Callable[[str, Sequence[Context]], Iterator[Messages]]
"""Explanation and contexts → the messages of each request."""


def delphi_prompt() -> Callable[[str, str], list[Message]]:
    """The function of delphi's package that makes a detection prompt; its module imports nothing."""
    home = ROOT / "build" / "delphi"
    found = list(home.glob("lib/*/site-packages/delphi/scorers/classifier/prompts/detection_prompt.py"))
    if not found:
        venv.create(home, with_pip=True)
        subprocess.run([home / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", DELPHI], check=True)
        found = list(home.glob("lib/*/site-packages/delphi/scorers/classifier/prompts/detection_prompt.py"))
    spec = importlib.util.spec_from_file_location("detection_prompt", found[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Callable[[str, str], list[Message]] = module.prompt
    return made


def asks_like_delphi(prompt: Callable[[str, str], list[Message]]) -> Ask:
    def ask(explanation: str, contexts: Sequence[Context]) -> Iterator[Messages]:
        for start in range(0, len(contexts), SHOWN):
            part = contexts[start : start + SHOWN]  # laid out as Classifier._build_prompt does
            yield prompt("\n".join(f"Example {i}: {c.text}" for i, c in enumerate(part)), explanation)

    return ask


def asks_like_us(model: str, protocol: str, size: int = 5) -> Ask:
    client = LlmClient("http://127.0.0.1:9", model)  # never asked
    judge = LlmJudge(client, "single" if protocol == "single" else "batch", contexts_per_request=size)

    def ask(explanation: str, contexts: Sequence[Context]) -> Iterator[Messages]:
        for start in range(0, len(contexts), judge.contexts_per_request):
            part = contexts[start : start + judge.contexts_per_request]
            yield judge.request(explanation, part).messages

    return ask


class Latent:
    """One latent's explanation, contexts and the n-gram judge's answers."""

    def __init__(self, material: Material, latent: int, text: str, labels: dict[int, bool | None]) -> None:
        self.latent, self.text, self.labels = latent, text, labels
        self.test_set = material.sampler.testing(latent)

    def first(self, n: int) -> list[Context]:
        """The first ``n`` of each kind, laid out for the judge."""
        return DetectionScorer().items(TestSet(self.test_set.active[:n], self.test_set.inactive[:n]))

    @property
    def variance_of_one(self) -> float:
        """Of balanced accuracy from one context of each kind, by all verdicts."""
        rates = []
        for contexts, truth in ((self.test_set.active, True), (self.test_set.inactive, False)):
            right = [self.labels[c.window] == truth for c in contexts]
            p = (sum(right) + 1) / (len(right) + 2)  # a rate of 1 is not known to be 1
            rates.append(p * (1 - p))
        return sum(rates) / 4


def latents_of(run: Run, most: int) -> list[Latent]:
    material = Material.of(run)
    with Journal(run.journal_path) as journal:
        rows = journal.explanations(status="ok", explainer="ngram").to_dict("records")[:most]
        labels = journal.labels(judge="ngram", scorer="detection")
        found = [
            Latent(
                material,
                int(row["latent"]),
                str(row["text"]),
                labels.get((row["id"], row["latent"], "none"), {}),
            )
            for row in rows
        ]
    whole = [x for x in found if all(c.window in x.labels for c in (*x.test_set.active, *x.test_set.inactive))]
    if not whole:
        raise BadInput(
            f"run {run.name!r} has no latents scored by the n-gram baseline; `python cli.py demo` makes some"
        )
    return whole


async def cost(
    ask: Ask, chosen: Sequence[tuple[Latent, list[list[Context]]]], model: str, block: int = BLOCK
) -> dict[str, float]:
    """Per latent: requests, prompt tokens, and those that no earlier request had as whole leading blocks."""
    tokenize = load_local_tokenizer(model)
    assert tokenize is not None, f"{model} has no tokenizer with a chat template here"
    known: set[bytes] = set()
    total = np.zeros(4)
    for latent, parts in chosen:
        for contexts in parts:
            total[3] += len(contexts)
            for messages in ask(latent.text, contexts):
                tokens = await tokenize.of_messages(messages)
                total[:3] += 1, len(tokens), len(tokens) - count_cached(tokens, known, block)
    requests, prompt, uncached, judged = (total / len(chosen)).tolist()
    return {"contexts": judged, "requests": requests, "prompt_tokens": prompt, "uncached_tokens": uncached}


def adaptive_parts(run: Run, latents: Sequence[Latent], half_width: float) -> list[tuple[Latent, list[list[Context]]]]:
    tests = TestSets(run, DetectionScorer(), StoppingRule(half_width))
    assert tests.adaptive is not None
    found = []
    for latent in latents:
        rounds = tests.draw(latent.latent)
        stop = find_stop(rounds, latent.labels, tests.adaptive)
        assert stop is not None
        found.append((latent, rounds[: stop.look + 1]))
    return found


def sizes_of(parts: Sequence[tuple[Latent, list[list[Context]]]]) -> list[Look]:
    both = [[c.active for part in rounds for c in part] for _, rounds in parts]
    return [Look(sum(one), len(one) - sum(one)) for one in both]


def rows_of(run: Run, latents: Sequence[Latent], half_widths: Sequence[float], model: str) -> list[dict[str, Any]]:
    delphi = asks_like_delphi(delphi_prompt())
    ways = {"batch of 5": asks_like_us(model, "batch"), "single": asks_like_us(model, "single")}
    ways |= {f"batch of {size}": asks_like_us(model, "batch", size) for size in (10, 20, 40)}
    n_whole = min(len(x.test_set.active) for x in latents)
    theirs_of: dict[int, dict[str, float]] = {}

    def theirs(n: int) -> dict[str, float]:
        if n not in theirs_of:
            theirs_of[n] = asyncio.run(cost(delphi, [(x, [x.first(n)]) for x in latents], model))
        return theirs_of[n]

    rows = []
    for name, ask in ways.items():
        ours = asyncio.run(cost(ask, [(x, [x.first(n_whole)]) for x in latents], model))
        rows.append(_row(f"fixed, {name}", "same contexts", ours, theirs(n_whole), n_whole))
    for half_width in half_widths:
        parts = adaptive_parts(run, latents, half_width)
        ours_variance = np.mean(
            [x.variance_of_one / n.n_active for (x, _), n in zip(parts, sizes_of(parts), strict=True)]
        )
        same_error = round(float(np.mean([x.variance_of_one for x in latents]) / ours_variance))
        guarantee = int(np.ceil(1 / 8 / (half_width / 1.96) ** 2))
        for name, ask in ways.items():
            ours = asyncio.run(cost(ask, parts, model))
            for how, n in (("same error", same_error), ("same guarantee", guarantee)):
                if n <= n_whole:
                    rows.append(_row(f"± {half_width:g}, {name}", how, ours, theirs(n), n))
    return rows


def _row(name: str, setting: str, ours: dict[str, float], theirs: dict[str, float], n: int) -> dict[str, Any]:
    row = {"name": name, "setting": f"{setting}, delphi with {n} of each kind", "peer_name": "delphi"}
    return row | {
        "ours": {key: round(value, 1) for key, value in ours.items()},
        "peer": {key: round(value, 1) for key, value in theirs.items()},
        "of_total": round(ours["prompt_tokens"] / theirs["prompt_tokens"], 3),
        "of_uncached": round(ours["uncached_tokens"] / theirs["uncached_tokens"], 3),
    }


def measured(latents: Sequence[Latent], python: Path, model: Path) -> list[dict[str, Any]]:
    """The same requests to a real vLLM on the CPU, one after another: its counters, and the arithmetic."""
    sys.path.insert(0, str(ROOT / "tests" / "integration"))
    import vllm_server

    os.environ["AUTOINTERP_VLLM_PYTHON"] = str(python.absolute())
    ways = {"delphi": asks_like_delphi(delphi_prompt()), "batch of 5": asks_like_us(model.name, "batch")}
    ways |= {f"batch of {size}": asks_like_us(model.name, "batch", size) for size in (20, 40)}
    ways |= {"single": asks_like_us(model.name, "single")}
    chosen = [(x, [x.first(20)]) for x in latents]
    rows = []
    with tempfile.TemporaryDirectory() as folder, vllm_server.VllmServer(model, Path(folder) / "vllm.log") as server:
        api = openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0)
        for name, ask in ways.items():
            before = [server.metric(f"vllm:prefix_cache_{what}_total") for what in ("queries", "hits")]
            for latent, parts in chosen:
                for messages in ask(latent.text, parts[0]):
                    sent: Any = list(messages)
                    own = {"cache_salt": name}  # nobody finds in the cache what another way has left there
                    api.chat.completions.create(
                        model=model.name, messages=sent, max_tokens=1, temperature=0, extra_body=own
                    )
            after = [server.metric(f"vllm:prefix_cache_{what}_total") for what in ("queries", "hits")]
            queries, hits = (b - a for a, b in zip(before, after, strict=True))
            counted = asyncio.run(cost(ask, chosen, str(model), CPU_BLOCK))
            n = len(chosen)
            rows.append(
                {
                    "name": f"vLLM, {name}",
                    "setting": f"{n} latents, 20 contexts of each kind",
                    "prompt_tokens": queries / n,
                    "uncached_tokens": (queries - hits) / n,
                    "counted": {key: round(value, 1) for key, value in counted.items()},
                }
            )
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--root", type=Path, default=Path("eval_runs"))
    parser.add_argument("--run", default="demo_a")
    parser.add_argument("--latents", type=int, default=100)
    parser.add_argument(
        "--precision", type=float, nargs="+", default=[0.1, 0.127], help="half-widths of adaptive scoring"
    )
    parser.add_argument("--model", default=str(BUNDLED), help="whose tokenizer and chat template count")
    parser.add_argument("--vllm-python", type=Path, help="the interpreter of an environment with vLLM: measure too")
    parser.add_argument("--measured", type=int, default=3, help="latents asked of vLLM")
    given = parser.parse_args()
    run = Run.open(given.run, given.root)
    latents = latents_of(run, given.latents)
    rows = rows_of(run, latents, given.precision, given.model)
    if given.vllm_python is not None:
        rows += measured(latents[: given.measured], given.vllm_python, BUNDLED)
    leave(given, rows, about(latents=len(latents)), lambda: print(*map(json.dumps, rows), sep="\n"))


if __name__ == "__main__":
    main()
