"""`score`: put every stored explanation to the test, journal each verdict, and make the run's score table of them.

An explanation is judged on contexts that its explainer never saw. Beside each mean stands a control: the same
contexts judged by the explanation of another, dissimilar latent, which is what words that say nothing about this
latent are worth. What was judged is not judged again; what failed is.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from autointerp.backends import LlmOptions, open_judge, resolve
from autointerp.contexts import Context
from autointerp.journal import Journal, Verdict
from autointerp.judges.base import Judge
from autointerp.llm.usage import Usage
from autointerp.material import Material
from autointerp.scorers import SCORERS, Scorer
from autointerp.scorers.base import ScoreRow
from autointerp.scorers.controls import swap_partners
from autointerp.work import Outcome, in_flight
from sae.errors import BadInput, nearest
from sae.files import digest, read_table, table_metadata, write_table
from sae.progress import say, track
from sae.run import Run, all_runs, command

_IDENTITY = ("latent", "explanation_id", "explainer", "explainer_model", "explain_settings_hash", "explain_prompt_hash")
_JUDGED_BY = ("judge", "model", "scorer", "settings_hash", "judge_prompt_hash")
COLUMNS = (*_IDENTITY, "draw", *_JUDGED_BY, "control", "replicate", *ScoreRow._fields)
"""Of the score table. All are there even when every explanation failed and nothing was judged."""
UNTESTED = "failed: too few contexts that can be marked otherwise"
CONTROL_LATENTS = {"ngram": None, "llm": 50}  # a swapped control costs as much as the score; None: all latents


@dataclass(frozen=True)
class _Question:
    """One latent's contexts under one explanation: its own, or as a control somebody else's."""

    latent: int
    explanation_id: int
    text: str
    seen: frozenset[int]
    control: str = "none"


@dataclass(frozen=True)
class _Test:
    """A scorer with the judge that it asks, of one run's contexts."""

    scorer: Scorer
    judge: Judge
    same: dict[str, str]
    """What all its verdicts have in common in the journal."""
    items: Callable[[int], Sequence[Context]]
    """What is to be judged of a latent; worked out once."""

    @property
    def key(self) -> tuple[str, str]:
        return self.scorer.name, self.same["settings_hash"]

    @classmethod
    def of(cls, scorer: Scorer, judge: Judge, material: Material) -> _Test:
        asked = judge.of_marks() if scorer.marked else judge
        same = {
            "judge": asked.name,
            "scorer": scorer.name,
            "settings_hash": digest({"judge": asked.settings_hash, "material": material.digest}),
            "prompt_hash": asked.prompt_hash,
            "model": asked.model,
        }
        items = functools.cache(lambda latent: scorer.items(scorer.test_set(material.sampler, latent)))
        return cls(scorer, asked, same, items)


def score_runs(
    runs: Sequence[Run] | None,
    root: Path,
    scorers: Sequence[str],
    backend: str,
    options: LlmOptions,
    control_latents: int | None = None,
) -> Outcome:
    """Score the stored explanations of ``runs``, or of every run under ``root``; see this module's head.

    Named runs without explanations are explained first. Without names nothing is ever explained.
    """
    for name in scorers:
        if name not in SCORERS:
            raise BadInput(f"--scorer {name!r} is not known; choose {nearest(name, SCORERS)}")
    kind = resolve(backend, options.for_judge(), "judge")
    chosen = _with_explanations(runs, root, options)
    if not chosen:
        raise BadInput(f"no run under {str(root)!r} has explanations to score; make some with `python cli.py explain`")
    if control_latents is None:
        control_latents = CONTROL_LATENTS[kind]
    return asyncio.run(_score(chosen, root, [SCORERS[name]() for name in scorers], kind, options, control_latents))


def _with_explanations(runs: Sequence[Run] | None, root: Path, options: LlmOptions) -> list[Run]:
    if runs is None:
        return [run for run in all_runs(root) if _was_explained(run)]
    from autointerp.explain import begun_path, explain_runs
    from autointerp.selection import Choice

    for run in runs:
        if begun_path(run).exists() or not _was_explained(run):
            say(f"{run.name}: not explained yet, doing that first (200 latents)")
            begun_path(run).touch()
            explain_runs([run], Choice(), "auto", options)
    return list(runs)


def _was_explained(run: Run) -> bool:
    """Whether anything was ever asked about its latents; an ``explain`` stopped early leaves a journal without rows."""
    if not run.journal_path.exists():
        return False
    with Journal(run.journal_path) as journal:
        return not journal.explanations().empty


async def _score(
    runs: Sequence[Run],
    root: Path,
    scorers: Sequence[Scorer],
    kind: str,
    options: LlmOptions,
    control_latents: int | None,
) -> Outcome:
    outcome = Outcome("score", [run.name for run in runs])
    async with open_judge(kind, options, root / "cache.sqlite") as judge:
        outcome.backend = f"{judge.name} ({judge.model})" if judge.model else judge.name
        for run in runs:
            for scorer in scorers:
                await _score_run(run, scorer, judge, options.concurrency, control_latents, outcome)
    sae = [word for run in runs for word in ("--sae", run.name)]
    outcome.retry = command(root, "score", *sae, *options.words())
    outcome.next = command(root, "report", "--sae", runs[0].name)
    return outcome


async def _score_run(
    run: Run, scorer: Scorer, judge: Judge, concurrency: int, control_latents: int | None, outcome: Outcome
) -> None:
    material = Material.of(run)
    tests = [_Test.of(of(), judge, material) for of in SCORERS.values()]
    test = next(test for test in tests if test.scorer.name == scorer.name)
    same = test.same
    path = run.stage_path("scores")
    asked_now: set[int] = set()
    with Journal(run.journal_path) as journal, journal.claim():
        explanations = journal.explanations(status="ok")
        readable = _readable(explanations, judge)
        if len(readable) < len(explanations):
            outcome.notes.append(
                f"{run.name}: {len(explanations) - len(readable)} explanations by a language model were left out: the "
                f"n-gram judge reads only n-gram explanations; give --llm-url to have them judged"
            )
        inputs = _inputs(material, same, control_latents, journal)
        if inputs is not None and table_metadata(path).get("inputs") == inputs:
            table = read_table(path)  # nothing was added, and nothing failed that could be tried again
        else:
            questions = [_question(row) for row in _rows(readable)]
            questions += _controls(run, readable, control_latents)

            async def ask(question: _Question) -> None:
                judged = await _judge_one(question, test.items(question.latent), test.judge, journal, same)
                if judged and question.control == "none":
                    asked_now.add(question.explanation_id)

            if questions:
                with track(f"score {run.name} ({scorer.name})", len(questions), "explanations") as bar:
                    await in_flight(questions, ask, concurrency, bar)
            before = (
                read_table(path, ["scorer", "settings_hash"]).drop_duplicates() if path.exists() else pd.DataFrame()
            )
            made = {(row["scorer"], row["settings_hash"]) for row in _rows(before)} | {test.key}
            table = score_table(journal, tests, readable, made)
            final = _inputs(material, same, control_latents, journal)
            write_table(path, table, inputs=final, material=material.digest)
    untested = 0
    for row in _rows(_of_this_judge(table, same)):
        if row["status"] == "ok":
            outcome.n_done += 1
            outcome.n_new += row["explanation_id"] in asked_now
        elif row["status"] == UNTESTED:
            untested += 1
        else:
            outcome.failures[row["status"].removeprefix("failed: ")] += 1

    if untested:
        outcome.notes.append(
            f"{run.name}: {untested} explanations have no {scorer.name} score: too few contexts for it"
        )


def _inputs(material: Material, same: Mapping[str, str], control_latents: int | None, journal: Journal) -> str | None:
    """The digest of all that the score table of a finished call depends on; ``None`` while failures can be retried."""
    *_, failed_verdicts = state = journal.state()
    if failed_verdicts:
        return None
    return digest({"material": material.digest, "judge": dict(same), "controls": control_latents, "journal": state})


def _of_this_judge(table: pd.DataFrame, same: Mapping[str, str]) -> pd.DataFrame:
    """The rows that are this judge's doing under these settings, and the failed explanations it would have judged.

    What other judges, protocols and prompts made of the same explanations stands in the table beside them.
    """
    found = table[table["control"] == "none"]
    judged = found["judge_prompt_hash"] == same["prompt_hash"]
    for column in ("judge", "scorer", "settings_hash", "model"):
        judged &= found[column] == same[column]
    unexplained = found["judge"].isna()
    if same["judge"] == "ngram":
        unexplained &= found["explainer"] == "ngram"
    return found[judged | unexplained]


def _readable(explanations: pd.DataFrame, judge: Judge) -> pd.DataFrame:
    """The explanations that the judge can read: the n-gram judge parses one form of sentence, its explainer's."""
    return explanations[explanations["explainer"] == "ngram"] if judge.name == "ngram" else explanations


def _controls(run: Run, explanations: pd.DataFrame, n: int | None) -> Iterator[_Question]:
    """For up to ``n`` latents of each set-up, the explanation of a dissimilar latent in place of their own."""
    from safetensors import safe_open

    if n == 0 or explanations.empty:
        return
    with safe_open(run.weights_path, framework="numpy") as weights:
        decoder = np.asarray(weights.get_tensor("W_dec"))
    for _, group in explanations.groupby(["explainer", "settings_hash", "prompt_hash", "model", "draw"]):
        own = {question.latent: question for question in map(_question, _rows(group))}
        chosen = swap_partners(sorted(own), decoder, run.store(), seed=run.settings.contexts.sample_seed)
        for latent in _first_by_hash(list(chosen), n):
            other = own[chosen[latent]]
            yield replace(own[latent], explanation_id=other.explanation_id, text=other.text, control="swap")


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], table.to_dict("records"))


def _question(explanation: Mapping[str, Any]) -> _Question:
    """A row of the journal's explanations as the question whether it is right."""
    return _Question(
        int(explanation["latent"]), int(explanation["id"]), explanation["text"], frozenset(explanation["contexts"])
    )


def _first_by_hash(latents: Sequence[int], n: int | None) -> list[int]:
    ranked = sorted(latents, key=lambda latent: digest(["control", latent]))
    return sorted(ranked if n is None else ranked[:n])


async def _judge_one(
    question: _Question, items: Sequence[Context], judge: Judge, journal: Journal, same: dict[str, str]
) -> int:
    """Judge what has no verdict yet of one question, journalling request by request. Returns how many those were."""
    done = journal.judged(
        latent=question.latent, explanation_id=question.explanation_id, control=question.control, replicate=0, **same
    )
    todo = [c for c in items if c.window not in done and c.window not in question.seen]
    stage = "score" if question.control == "none" else "control"
    for start in range(0, len(todo), judge.contexts_per_request):
        part = todo[start : start + judge.contexts_per_request]
        judgements = await judge.judge(question.text, part)
        journal.add_verdicts(
            [
                Verdict(
                    latent=question.latent,
                    explanation_id=question.explanation_id,
                    judge=same["judge"],
                    scorer=same["scorer"],
                    settings_hash=same["settings_hash"],
                    prompt_hash=same["prompt_hash"],
                    model=same["model"],
                    context=context.window,
                    truth=context.truth,
                    negative_kind=None if context.truth else context.kind,
                    control=question.control,
                    p=judgement.p,
                    label=judgement.label,
                    failure=judgement.failure,
                )
                for context, judgement in zip(part, judgements, strict=True)
            ]
        )
        # With the verdicts and not at the end: what was paid for is on record however the command ends.
        spent = sum((judgement.usage for judgement in judgements), Usage())
        journal.add_usage(stage, judge.model, spent, question.latent)
    return len(todo)


def score_table(
    journal: Journal, tests: Sequence[_Test], readable: pd.DataFrame, made: Set[tuple[str, str]]
) -> pd.DataFrame:
    """One row per explanation, judge set-up and control, from the verdicts; failed explanations are rows too.

    ``tests`` give what should have been judged of a latent under their settings, so that what is missing counts as
    failed. What other set-ups asked (another harvest, say) is no longer known, and is taken as it stands. Of the
    ``readable`` explanations, those whose latent has too few contexts for a test among the ``made`` ones (scorer and
    settings) are rows without scores.
    """
    explanations = {row["id"]: row for row in _rows(journal.explanations())}
    verdicts = journal.verdicts()
    known = {test.key: test for test in tests}
    rows: list[dict[str, Any]] = []
    keys = ["explanation_id", "latent", "judge", "scorer", "settings_hash", "prompt_hash", "model"]
    keys += ["control", "replicate"]
    for key, group in verdicts.groupby(keys, sort=True):
        found: dict[str, Any] = dict(zip(keys, cast(tuple[Any, ...], key), strict=True))
        explained = explanations[found["explanation_id"]]
        test = known.get((found["scorer"], found["settings_hash"]))
        asked = test.items(found["latent"]) if test is not None else ()
        rows.append(
            {
                **_identity(found["latent"], explained),
                **_judged_by(found),
                "control": found["control"],
                "replicate": found["replicate"],
                **SCORERS[found["scorer"]]().score(group, asked)._asdict(),
            }
        )
    for test in (known[key] for key in sorted(made & known.keys())):
        for explained in _rows(readable):
            if not test.items(explained["latent"]):
                untested = {"control": "none", "replicate": 0, "status": UNTESTED}
                rows.append({**_identity(explained["latent"], explained), **_judged_by(test.same), **untested})
    for explained in explanations.values():
        if explained["status"] == "failed":
            status = f"failed: no explanation: {explained['failure']}"
            rows.append({**_identity(explained["latent"], explained), "control": "none", "status": status})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _judged_by(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say who judged, and how."""
    same = {key: verdict[key] for key in ("judge", "model", "scorer", "settings_hash")}
    return {**same, "judge_prompt_hash": verdict["prompt_hash"]}


def _identity(latent: int, explanation: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say which explanation a score is of. ``latent`` is whose contexts were judged."""
    return {
        "latent": latent,
        "explanation_id": explanation["id"],
        "explainer": explanation["explainer"],
        "explainer_model": explanation["model"],
        "explain_settings_hash": explanation["settings_hash"],
        "explain_prompt_hash": explanation["prompt_hash"],
        "draw": explanation["draw"],
    }
