"""The findings of a study: one JSON object, which the terminal, the HTML report and ``report --json`` all show.

It is built from what the stages left on disk (tables, alignments, journals) and from nothing else: no model,
no weights, no torch. So a report is quick, can be made on another machine than the study, and cannot
disagree with the files. What has not been made yet is ``None``, and ``missing`` says by which command it would be.

    schema, study, focus, runs, subject, corpus, missing
    overlap        how much comes back, under every definition           needs: align (alive latents: harvest)
    similarity     matched cosines and their histogram                          align
    counterparts   what latents do in the other seeds, and what became of those that do not return     align
    membership     which seeds have the focus run's latents                     align
    training, firing, frequency_by_class                                        train, harvest
    scores         with their controls, baseline, reliability                           explain, score
    relation       score and similarity, raw and corrected; of several runs     explain, score, align
    interesting, failures                                                       explain, score
    findings       the paper's, each with a verdict (autointerp.findings.paper)       what each of them takes
    methods        definitions, interval methods, who explained and judged, prompt hashes

Fractions are between 0 and 1; a number that could not be measured is ``None``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from autointerp.findings import relation as score_similarity
from autointerp.findings import reliability
from autointerp.findings import returning as seeds
from autointerp.findings import scores as scored
from autointerp.findings.controls import METHODS as OF_DIFFERENCES
from autointerp.findings.controls import comparison_findings
from autointerp.findings.counterparts import counterpart_findings
from autointerp.findings.evidence import Study, Told, View, asking
from autointerp.findings.interesting import ContextSource, ShownContext, interesting
from autointerp.findings.latent import contexts_of
from autointerp.findings.pairs import pooled_relation
from autointerp.findings.paper.table import findings_table
from autointerp.findings.scores import other_scorer_findings
from autointerp.findings.statistics import estimation
from autointerp.findings.statistics.correlation import METHODS
from autointerp.journal.method import ENOUGH_TO_CALL_DEAD
from autointerp.scoring.adaptive import SIZES
from autointerp.scoring.setups import described, reason, status_kind
from sae.alignment.nulls import FIRING_NULLS, NULLS
from sae.alignment.overlap import DEFINITIONS, INTERVALS
from sae.alignment.relation import RELATIONS
from sae.common.amounts import precision_in_words
from sae.common.errors import UserError
from sae.common.files import SCHEMA
from sae.study.run import Run


def findings_of(
    run: Run,
    study: Sequence[Run],
    *,
    definition: str = "strict",
    threshold: float = 0.7,
    against: Sequence[str] = (),
    explainer: str | None = None,
) -> dict[str, Any]:
    """The findings of a study with ``run`` in the middle, contexts included where its firing store is there.

    ``explainer``: scores are the newest of its explanations; by default the newest of all
    (:func:`autointerp.scoring.setups.setups_of`).
    """
    view = View(run.name, definition, threshold, tuple(against), explainer=explainer)
    return findings(run.root, [r.name for r in study], view, contexts_at_hand(run))


def contexts_at_hand(run: Run) -> ContextSource:
    """Gives a latent its contexts, or none where the run's firing store or tokenizer is not there."""

    def contexts(_: str, latent: int) -> Sequence[ShownContext]:
        try:
            return contexts_of(run, latent)
        except UserError:  # a store moved away, a hub out of reach: the report says so and shows the rest
            return []

    return contexts


def findings(
    root: Path,
    runs: Sequence[str],
    view: View | None = None,
    contexts: ContextSource | None = None,
    with_sweeps: bool = True,
) -> dict[str, Any]:
    """The findings of ``runs`` (one study's, under ``root``) as JSON values.

    ``contexts`` gives (run, latent) its contexts, to be shown with the latents of ``interesting``; without it they
    carry none. ``with_sweeps``: the findings table has the rows about sweeps too. Raises :class:`UserError` for unknown
    names and files that cannot be read.
    """
    return study_findings(Study.open(root, runs, view or View()), contexts, with_sweeps)


def study_findings(study: Study, contexts: ContextSource | None = None, with_sweeps: bool = True) -> dict[str, Any]:
    """:func:`findings` of a study that is open already."""
    rows, told = study.score_rows(), study.journal()
    latents = study.focus_latents()
    similar = "similarity" in latents
    has_scores = rows is not None and bool((rows["status"].map(status_kind) == "ok").any())
    part, sample = None, study.sample()
    if rows is not None and study.setup is not None:
        verdicts = reliability.verdicts_of(study.focus, rows, study.setup)
        part = score_similarity.Part(study.focus.name, rows, latents, verdicts, sample=sample)
    scores = None
    if rows is not None or told.explained:
        scores = scored.score_findings(_rows_or_none(rows), latents, told.explained, told.too_few, sample)
        scores["reliability"] = (
            None
            if part is None or study.setup is None
            else reliability.reliability_findings(part.rows, part.verdicts, sample)
        )
        if scores["precision"] is not None:
            scores["precision"]["rounds"] = told.rounds
        scores |= comparison_findings(study, _rows_or_none(rows), told, sample)
        scores["other_scorers"] = other_scorer_findings(study, latents, told)
        n, command = scores.pop("n_waiting"), asking(study, told, "score")
        scores["waiting"] = {"n": n, "command": command} if n else None
    tree = {
        "schema": SCHEMA,
        "study": study.focus.study,
        "focus": study.focus.name,
        "runs": [study.describe(run) for run in study.runs],
        "compared": study.compared,
        **_provenance(study.focus),
        "missing": study.missing(told.explained, has_scores),
        "stale": study.stale(),
        "forced": [{"runs": pair, "command": study.command("align", *pair, "--force")} for pair in study.forced()],
        "overlap": seeds.overlap_findings(study),
        "similarity": seeds.similarity_findings(study),
        "counterparts": counterpart_findings(study.behaviour, study.tables, study.alive, study.behaviour_facts),
        "membership": seeds.membership_findings(study, latents),
        "training": seeds.training_findings(study.runs),
        "firing": seeds.firing_findings(study),
        "frequency_by_class": seeds.frequency_by_class_findings(latents),
        "scores": scores,
        "relation": _relation(study, part) if part is not None and similar else None,
        "interesting": interesting(study.focus.name, rows, latents, told.texts, contexts)
        if rows is not None and has_scores and similar
        else None,
        "failures": _failures(study, rows, told),
        "methods": _methods(study, told),
    }
    worth = tree["interesting"]
    show = study.command("show", "--sae", study.focus.name, "--latent", str(worth[0]["latent"])) if worth else None
    return {**tree, "show": show, "findings": findings_table(study, told, tree, part, with_sweeps)}


def _rows_or_none(rows: pd.DataFrame | None) -> pd.DataFrame:
    columns = ["latent", "control", "status", "balanced_accuracy"]
    return pd.DataFrame({c: pd.Series(dtype=object) for c in columns}) if rows is None else rows


def _provenance(run: Run) -> dict[str, Any]:
    record, settings = run.record, run.settings
    subject, corpus = record.get("subject", {}), record.get("corpus", {})
    return {
        "subject": {
            "model": subject.get("source", settings.subject.model),
            "hookpoint": record.get("hookpoint", settings.subject.hookpoint),
            "width": subject.get("d_in"),
            "fingerprint": subject.get("fingerprint"),
        },
        "corpus": {
            "kind": corpus.get("kind", settings.corpus.kind),
            "source": [str(s) for s in settings.corpus.source],
            "tokens": corpus.get("n_tokens"),
            "fingerprint": corpus.get("fingerprint"),
        },
    }


def _relation(study: Study, part: score_similarity.Part) -> dict[str, Any] | None:
    """Of the focus run, and ``pooled`` over all runs that were scored alike (``None`` where it alone was)."""
    found = score_similarity.relation_findings(part)
    return None if found is None else {**found, "pooled": pooled_relation(study, part.verdicts)}


# --- failures and methods ---------------------------------------------------------------------------------


def _failures(study: Study, rows: pd.DataFrame | None, told: Told) -> dict[str, Any]:
    """Latents that failed, by stage and reason, with the command that retries only them."""
    by_reason: dict[tuple[str, str], set[int]] = {}
    for latent, why in told.failed.items():
        by_reason.setdefault(("explain", why), set()).add(latent)
    answers = 0
    if rows is not None:
        kinds = rows["status"].map(status_kind)
        for row in rows[kinds == "failed"].to_dict("records"):
            if int(row["latent"]) not in told.failed:
                stage = "score" if row["control"] == "none" else f"score ({row['control']} control)"
                by_reason.setdefault((stage, reason(row)), set()).add(int(row["latent"]))
        answers = scored.failed_answers(rows[kinds == "ok"])
    reasons = [
        {"stage": stage, "reason": why, "n": len(latents), "latents": sorted(latents)}
        for (stage, why), latents in sorted(by_reason.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1]))
    ]
    n = len(set().union(*by_reason.values())) if by_reason else 0
    return {"n": n, "n_answers": answers, "reasons": reasons, "retry": _retry(study, told) if n or answers else None}


def _retry(study: Study, told: Told) -> str:
    """The command that tries again what failed, and only that: what is done is not asked again."""
    if not told.failed:
        return asking(study, told, "score")
    latents = ["--indices", ",".join(map(str, sorted(told.failed)))] if len(told.failed) <= 20 else []
    return asking(study, told, "explain", *latents)


def _other_setups(study: Study) -> dict[str, Any]:
    """The set-ups that the figures are not of; of each other explainer, the command that shows its newest scores."""
    others = [] if study.scores is None else [described(study.scores, setup) for setup in study.other_setups]
    newest: dict[str, int] = {}
    for other in others:
        if (name := other.get("explainer")) and name != (study.setup or {}).get("explainer"):
            newest.setdefault(str(name), other["n_scored"])

    def shows(name: str) -> str:
        return study.command("report", "--sae", study.focus.name, "--explainer", name)

    explainers = [{"explainer": name, "n_scored": n, "command": shows(name)} for name, n in newest.items()]
    return {"other_setups": others, "other_explainers": explainers}


def _methods(study: Study, told: Told) -> dict[str, Any]:
    view, setup, settings = study.view, study.setup or {}, study.focus.settings
    last = told.table.iloc[-1] if len(told.table) else None
    rounds = told.rounds or {}
    contexts = settings.contexts.model_copy(update={name: rounds[name] for name in SIZES if name in rounds})
    to = precision_in_words(rounds["half_width"]) if rounds else None
    prompts = {"explain": sorted({str(h) for h in told.table["prompt_hash"] if h}) if last is not None else []}
    prompts["judge"] = [str(setup[c]) for c in setup if "prompt_hash" in c and "explain" not in c and setup[c]]
    record = study.focus.record
    commit = str(record.get("git_commit") or "")[:12]
    versions = ", ".join(f"{k} {v}" for k, v in record.get("packages", {}).items() if k in ("torch", "transformers"))
    return {
        "definition": view.definition,
        "threshold": view.threshold,
        "definitions": DEFINITIONS,
        "nulls": {**NULLS, **FIRING_NULLS},
        "relations": RELATIONS,
        "against": list(view.against),
        "seeds": [run.seed for run in study.runs],
        "explainer": None if last is None else {"name": str(last["explainer"]), "model": str(last["model"])},
        "judge": {"name": setup["judge"], "model": str(setup.get("model") or "")} if setup else None,
        "scorer": setup.get("scorer"),
        "models": sorted({str(v) for v in (setup.get("model"), None if last is None else last["model"]) if v}),
        "prompt_hashes": {k: v for k, v in prompts.items() if v},
        "settings_hash": setup.get("settings_hash"),
        **_other_setups(study),
        "cost": told.cost,
        "similarity": "mean over the other runs of (matched encoder cosine + matched decoder cosine) / 2",
        "dead": f"no firing over the harvested tokens; the word is used from {ENOUGH_TO_CALL_DEAD:,} tokens on",
        "contexts": f"{settings.harvest.window} tokens; up to {contexts.n_explain} to explain from and, never the same "
        f"text, up to {contexts.n_active} activating over {contexts.n_strata} strata of activation and "
        f"{contexts.n_inactive} position-matched silent ones to test on"
        + (f", judged in rounds until the 95 % interval of the score is narrow enough ({to})" if to else ""),
        "score": "balanced accuracy, (true positive rate + true negative rate) / 2; latents weigh the same in means",
        "control": "swap: the same contexts judged by the explanation of a dissimilar latent (decoder cosine below "
        ".2, little firing together)",
        "control_saes": "a sample of the latents of an SAE whose random decoder is never trained, and of one that is "
        "not trained at all, explained and judged by the same protocol",
        "baseline": "n-gram explanations of the same latents, from the same contexts, judged by the n-gram judge on "
        "the language model's contexts",
        "negatives": f"random: silent contexts from the same slots of the sequence, which make the score; hard: up to "
        f"{contexts.n_hard} in which one of the nearest latents (decoder cosine, firing together) fires strongly; same "
        f"token: up to {contexts.n_same_token} that hold the token on which the latent mostly peaks; both from "
        "the slots of the activating contexts, or the nearest that have some",
        "near_duplicates": f"windows that share {contexts.near_duplicate:g} of their token 5-grams count as one text",
        "intervals": {
            "overlap": INTERVALS,
            "rates": METHODS["proportion"],
            "scores": METHODS["balanced_accuracy"],
            "AUROC": METHODS["auroc"],
            "means": METHODS["bootstrap_mean"],
            "differences": OF_DIFFERENCES["difference"],
            "correlations": METHODS["spearman"],
            "held fixed": METHODS["partial_spearman"],
            "strata": METHODS["stratified_spearman"],
            **reliability.METHODS,
            **score_similarity.METHODS,
            **estimation.METHODS,
        },
        "training": "FVU, L0: mean over the last twentieth of the training log",
        "made_with": ", ".join(word for word in (versions, commit and f"commit {commit}") if word),
    }
