"""Measure the HTML report of a wide study: its size, the time to make it, and the time until a browser can use it.

    python benchmarks/html_report.py [--latents 32768] [--runs 3] [--scored 7000] [--rounds 5] [--json] [--out x.json]

The study is made up (tables as the stages leave them, no model): partners by chance, scores, explanations of some 300
characters. There is no firing store, so what its contexts would weigh is made up for by the explanations: the details
fill their budget. The file is then opened in a headless Chromium with software rendering, each time in a fresh context:

- *ready*: from navigation until the list of latents answers to the keyboard;
- *figures*: until the figures may be drawn (all scripts have run);
- *one scatter*: until the first scatter plot of all latents is drawn, its scrolling into view included;
- *search*: from a key to the filtered list; *end*: from a key to the last row of the list.

Needs the test dependencies and a Chromium: `make test-browser` brings both. The goal: a page under 60 MB that is ready
in under 3 s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from outcome import about, leave, parser_of

ROOT = Path(__file__).parent.parent
for folder in (ROOT / "tests" / "autointerp", ROOT / "tests" / "browser", ROOT):
    sys.path.insert(0, str(folder))
SECONDS, MEGABYTES = 3.0, 60.0  # the goals


def wide_study(root: Path, m: int, n_runs: int, n_scored: int) -> list[Any]:
    """Every stage of a study of ``m`` latents, as files. Two fifths of the latents return."""
    import small_study

    from sae.alignment.alignment import Alignment, write_alignment

    runs = small_study.runs_of(root, n_runs, m=m)
    small_study.harvested(runs)
    rng = np.random.default_rng(0)
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            sides = _sides(rng, m)
            certificate = {"runs": [a.name, b.name], "schema": 1}
            write_alignment(root / "alignments", a.name, b.name, Alignment(*sides, certificate), "made up")
    latents = sorted(rng.choice(int(0.95 * m), n_scored, replace=False).tolist())
    for run in runs[:2]:
        small_study.scored(run, _explained(run, latents))
    return runs


def _sides(rng: np.random.Generator, m: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """An alignment of both runs in terms of the other."""
    returns = np.arange(m) < 0.4 * m
    there = rng.permutation(m)
    tables = [pd.DataFrame({"latent": np.arange(m)}) for _ in range(2)]
    for space in ("encoder", "decoder"):
        cosine = np.clip(np.where(returns, rng.normal(0.85, 0.08, m), rng.normal(0.3, 0.1, m)), -1, 1)
        partner = np.where(returns, there, rng.permutation(there)) if space == "encoder" else there
        partner = there if len(np.unique(partner)) < m else partner
        back = np.argsort(partner)
        for table, of, values in ((tables[0], partner, cosine), (tables[1], back, cosine[back])):
            table[f"{space}_partner"] = of.astype(np.int32)
            table[f"{space}_cosine"] = values
            table[f"max_{space}_neighbor"] = of.astype(np.int32)
            table[f"max_{space}_cosine"] = np.minimum(1, values + np.abs(rng.normal(0, 0.05, m)))
            table[f"{space}_price"] = 0.0
    return tables[0], tables[1]


def _explained(run: Any, latents: list[int]) -> dict[int, int]:
    from autointerp.journal.journal import Journal

    numbers = {}
    with Journal(run.journal_path) as journal, journal._database.writing() as connection:
        for latent in latents:
            words = f"latent {latent} fires on the opening of a function definition, before its name; " * 4
            row = (latent, "ngram", "e" * 64, "", "", 0, words, "ok", None, "[1, 2]", "2026-01-01T00:00:00")
            found = connection.execute(
                "INSERT INTO explanation (latent, explainer, settings_hash, prompt_hash, model, draw, text, status, "
                "failure, contexts, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            numbers[latent] = int(found.lastrowid or 0)
    return numbers


def opened(path: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by what was waited for."""
    from browser_pages import FLAGS, chromium, until
    from playwright.sync_api import sync_playwright

    took: dict[str, list[float]] = {name: [] for name in ("ready", "figures", "one scatter", "search", "end")}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        for _ in range(rounds):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.add_init_script(
                "new MutationObserver(() => { const stage = document.documentElement?.dataset.ready;"
                " if (stage) (window.stages ??= {})[stage] ??= performance.now(); })"
                ".observe(document, { subtree: true, attributes: true, attributeFilter: ['data-ready'] });"
            )
            page.goto(path.as_uri())
            until(page, "window.stages?.figures", 60)
            stages = page.evaluate("window.stages")
            took["ready"].append(stages["latents"] / 1000)
            took["figures"].append(stages["figures"] / 1000)
            begun = time.perf_counter()
            page.evaluate("document.querySelector('#figure-cosines').scrollIntoView({ behavior: 'instant' })")
            page.wait_for_selector("#figure-cosines[data-drawn]")
            took["one scatter"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            page.fill("#search", "latent 77 ")
            until(page, "document.querySelector('#count').textContent.length < 26", 60)
            took["search"].append(time.perf_counter() - begun)
            page.fill("#search", "")
            page.wait_for_timeout(300)
            page.keyboard.press("ArrowDown")
            begun = time.perf_counter()
            page.keyboard.press("End")
            until(page, "document.activeElement.getAttribute('aria-rowindex') > 1000", 60)
            took["end"].append(time.perf_counter() - begun)
            assert page.evaluate("document.querySelectorAll('#browser .rows [role=row]').length") < 100
            context.close()
        browser.close()
    return took


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from autointerp.report.html.page import write_report

    setting = f"{arguments.latents} latents, {arguments.runs} runs, {arguments.scored} scored"
    with tempfile.TemporaryDirectory() as folder:
        runs = wide_study(Path(folder), arguments.latents, arguments.runs, arguments.scored)
        begun = time.perf_counter()
        written = write_report(runs[0], runs)
        made = time.perf_counter() - begun
        took = opened(Path(written["path"]), arguments.rounds)
    rows: list[dict[str, Any]] = [
        {"name": "size", "ours": written["n_bytes"] / 1e6, "unit": "MB", "goal": MEGABYTES},
        {"name": "details", "ours": written["n_details"], "unit": "latents", "goal": None},
        {"name": "made in", "ours": made, "unit": "s", "goal": None},
        *(
            {
                "name": name,
                "ours": statistics.median(seconds),
                "unit": "s",
                "goal": SECONDS if name in ("ready", "figures") else None,
                "from": min(seconds),
                "to": max(seconds),
            }
            for name, seconds in took.items()
        ),
    ]
    return [{"setting": setting, "peer": None, "peer_name": None, **row} for row in rows]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--latents", type=int, default=32_768)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scored", type=int, default=7_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = measured(arguments)
    leave(arguments, rows, about(), lambda: shown(rows))


def shown(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        spread = f"  ({row['from']:.2f} to {row['to']:.2f})" if "from" in row else ""
        goal = f"  goal: under {row['goal']:g}" if row["goal"] else ""
        print(f"{row['name']:>12}  {row['ours']:10,.2f} {row['unit']}{spread}{goal}")


if __name__ == "__main__":
    main()
