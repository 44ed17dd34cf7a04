"""Make a run's score table from its journal: one row per explanation, judge set-up and control.

Two kinds of rows cannot be made from the journal and are kept from the old table: scores from before journals kept test
sets, and latents with too few contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import pandas as pd

from autointerp.contexts.material import Material
from autointerp.contexts.sampling import EXPLAINED_BY
from autointerp.explaining.copies import normalise
from autointerp.journal.journal import Journal, PlannedContext, SetUp
from autointerp.journal.method import BASELINE
from autointerp.llm.opening import get_capabilities
from autointerp.scoring.adaptive import score_rounds
from autointerp.scoring.judges.base import Judge
from autointerp.scoring.scorers import SCORERS
from autointerp.scoring.scorers.base import SCORE_COLUMNS, ScoreRow
from autointerp.scoring.setups import JUDGED_BY, Row, records_of
from sae.common.files import digest, read_table, table_metadata, write_table
from sae.common.progress import track
from sae.study.run import Run

_IDENTITY = ("latent", "explanation_id", *EXPLAINED_BY.values(), "draw", *JUDGED_BY, "control", "replicate")
COLUMNS = (*_IDENTITY, *SCORE_COLUMNS)
"""Of the score table. All are there even when every explanation failed and nothing was judged."""
_WHOLE = ("latent", "explanation_id", "draw", "replicate", *(name for name in COLUMNS if name.startswith("n_")))
_PLACE = ("explanation_id", "latent", "judge", "scorer", "settings_hash", "judge_prompt_hash", "model")
UNTESTED = "failed: too few contexts that can be marked otherwise"
UNEXPLAINED = "failed: no explanation: "
_ROUNDS_UNKNOWN = "failed: which rounds were judged is not known; run the same `score` again"


def update_score_table(
    run: Run, journal: Journal, set_up: SetUp, replicate: int, explanations: pd.DataFrame, judge: Judge
) -> pd.DataFrame:
    """Return the run's score table, recomputed if the journal has changed.

    Args:
        explanations: those to be scored by ``set_up`` and ``replicate``; latents with too few contexts become rows too.
        judge: its server's capabilities are kept in the file.
    """
    path, material = run.stage_path("scores"), Material.of(run).digest
    stored = table_metadata(path)
    table = read_table(path) if path.exists() else pd.DataFrame(columns=list(COLUMNS))
    old = records_of(table) if stored.get("columns") == digest(COLUMNS) else []
    test_sets = journal.test_sets(set_up.scorer, set_up.settings_hash)
    untested = {_place(row): row for row in old if row["status"] == UNTESTED}
    for explained in records_of(explanations):
        if not any(test_sets[explained["latent"]]):
            row = {**_explained_by(explained["latent"], explained), **_judged_by(set_up)}
            row |= {"control": "none", "replicate": replicate, "status": UNTESTED}
            untested.setdefault(_place(row), row)
    state = journal.state()
    state["verdicts"] = [of for of in state["verdicts"] if of[1] in SCORERS]  # other scorers have no rows
    inputs = digest([state, material, COLUMNS, sorted(place[:-2] for place in untested)])
    if stored.get("inputs") == inputs:
        return table
    n = sum(of[5] for of in state["verdicts"])
    with track(f"score table of {run.name}", n, "verdicts") if n else nullcontext() as bar:
        table = score_table(journal, old, untested.values(), bar.advance if bar else None)
    found = get_capabilities(judge)
    capabilities = found.as_dict() if found else stored.get("capabilities")
    about = {"inputs": inputs, "columns": digest(COLUMNS), "material": material, "capabilities": capabilities}
    write_table(path, table, **about)
    return table


def score_table(
    journal: Journal,
    old: Iterable[Row] = (),
    untested: Iterable[Row] = (),
    advance: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Return one row per explanation, judge set-up, control and replicate, from the verdicts.

    Failed explanations are rows too.

    Contexts of the test set without a verdict count as failed. Verdicts of removed scorers make no rows, nor do swapped
    controls with the latent's own text, which earlier versions drew.

    Args:
        old: rows of an earlier table, kept if the test set of their verdicts is not in the journal.
        untested: rows of latents with too few contexts.
        advance: called for each row made, with the number of its verdicts.
    """
    explanations = {row["id"]: row for row in records_of(journal.explanations())}
    adaptive = {key: settings.get("adaptive") for key, settings in journal.setups().items()}
    before = {_place(row): row for row in old}
    own = {_explainer(row): normalise(row["text"]) for row in explanations.values() if row["status"] == "ok"}
    rows: list[Row] = []
    for set_up in (SetUp(*of[:5]) for of in journal.state()["verdicts"]):
        if set_up.scorer not in SCORERS:
            continue
        test_sets = journal.test_sets(set_up.scorer, set_up.settings_hash)
        # Sums are rounded in the order of their parts, and answers come in any order: a score must not depend on it.
        verdicts = journal.verdicts(**set_up._asdict()).sort_values("context", kind="stable")
        for key, group in verdicts.groupby(["explanation_id", "latent", "control", "replicate"], sort=True):
            number, latent, control, replicate = cast(tuple[int, int, str, int], key)
            if advance:
                advance(len(group))
            explained = explanations[number]
            mine = own.get(_explainer({**explained, "latent": latent}))
            if control == "swap" and mine == normalise(explained["text"]):
                continue
            row = {**_explained_by(latent, explained), **_judged_by(set_up)}
            row |= {"control": control, "replicate": replicate}
            rounds = test_sets.get(latent)
            if rounds is None and _place(row) in before:
                rows.append(before[_place(row)])
            else:
                scores = _score(set_up.scorer, group, rounds, adaptive.get(set_up.settings_hash))
                rows.append({**row, **scores.as_columns()})
    rows.sort(key=_place)
    known = [row for row in untested if row["explanation_id"] in explanations]
    rows += sorted(known, key=lambda row: (row["scorer"], row["settings_hash"], *_place(row)))
    for explained in explanations.values():
        if explained["status"] == "failed":
            status = f"{UNEXPLAINED}{explained['failure']}"
            rows.append({**_explained_by(explained["latent"], explained), "control": "none", "status": status})
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({name: int for name in _WHOLE if table[name].notna().all()})


def _score(
    name: str,
    verdicts: pd.DataFrame,
    rounds: Sequence[Sequence[PlannedContext]] | None,
    adaptive: Mapping[str, Any] | None,
) -> ScoreRow:
    """Return the score of one explanation under one set-up. ``rounds``: its test set, ``None`` where not known."""
    scorer = SCORERS[name]()
    if adaptive is None:
        return scorer.score(verdicts, [context for contexts in rounds or () for context in contexts])
    if rounds is None:
        return scorer.score(verdicts.iloc[:0])._replace(status=_ROUNDS_UNKNOWN)
    return score_rounds(scorer, verdicts, rounds, adaptive)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return where a row belongs in the table: by explanation, then by who judged. No two rows have the same place."""
    return tuple(row[column] for column in (*_PLACE, "control", "replicate"))


def rows_of_set_up(table: pd.DataFrame, set_up: SetUp, replicate: int = 0) -> pd.DataFrame:
    """Return the rows of a set-up and replicate, without controls, and the failed explanations that it would judge."""
    found = table[(table["control"] == "none") & ((table["replicate"] == replicate) | table["replicate"].isna())]
    by = _judged_by(set_up)
    judged = (found[list(by)] == pd.Series(by)).all(axis=1)
    unexplained, by_ngram = found["judge"].isna(), found["explainer"] == BASELINE
    if set_up.judge == BASELINE:
        unexplained &= by_ngram
    elif not by_ngram.all():  # next to others' explanations those are the baseline's
        unexplained &= ~by_ngram
    return found[judged | unexplained]


def _judged_by(set_up: SetUp) -> Row:
    """Return the columns that say who judged, and how."""
    same = {key: getattr(set_up, key) for key in ("judge", "model", "scorer", "settings_hash")}
    return {**same, "judge_prompt_hash": set_up.prompt_hash}


def _explainer(explanation: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the latent of an explanation, and how it was explained."""
    return tuple(explanation[name] for name in ("latent", "draw", *EXPLAINED_BY))


def _explained_by(latent: int, explanation: Mapping[str, Any]) -> Row:
    """Return the columns that say which explanation a score is of. ``latent``: whose contexts were judged."""
    by = {theirs: explanation[mine] for mine, theirs in EXPLAINED_BY.items()}
    return {"latent": latent, "explanation_id": explanation["id"], **by, "draw": explanation["draw"]}
