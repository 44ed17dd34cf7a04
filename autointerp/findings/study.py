"""Compute the findings of a study, which the terminal, the HTML report and ``report --json`` show.

Only the files that the stages wrote are read (tables, alignments, journals): no model, no weights, no torch.
A part whose stage has not run is ``None``, and ``missing`` names the command that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from autointerp.contexts.sampling import Sample
from autointerp.findings import controls, relation, reliability, repeats, returning, shape
from autointerp.findings.counterparts import counterpart_findings
from autointerp.findings.evidence import JournalFacts, Study, View, asking
from autointerp.findings.json_values import number
from autointerp.findings.latent import LatentReader
from autointerp.findings.pairs import pooled_relation
from autointerp.findings.paper.table import findings_table
from autointerp.findings.scores import failed_answers, other_scorer_findings, score_findings
from autointerp.findings.statistics import estimation
from autointerp.findings.statistics.correlation import METHODS
from autointerp.journal.method import ENOUGH_TO_CALL_DEAD
from autointerp.scoring.adaptive import SIZES
from autointerp.scoring.setups import described, own_scores, reason, status_kind
from sae.alignment.bootstrap import INTERVALS
from sae.alignment.nulls import FIRING_NULLS, NULLS
from sae.alignment.overlap import DEFINITIONS
from sae.alignment.relation import RELATIONS
from sae.common.amounts import precision_in_words
from sae.common.errors import NotFound, UserError
from sae.common.estimate import Estimate
from sae.common.files import SCHEMA
from sae.common.progress import say_once
from sae.study.run import Run

N_INTERESTING = 10
N_CONTEXTS = 3


class Context(Protocol):
    """The parts of :class:`autointerp.contexts.sampler.Context` that are shown."""

    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def activations(self) -> Sequence[float]: ...


#: (run name, latent) → contexts; called only for the latents shown.
ContextSource = Callable[[str, int], Sequence[Context]]


def findings_of(
    run: Run,
    study: Sequence[Run],
    *,
    definition: str = "strict",
    threshold: float = 0.7,
    against: Sequence[str] = (),
    **scores: Any,
) -> shape.StudyFindings:
    """Return the findings of a study with ``run`` as focus run, with contexts if its firing store is available.

    ``scores`` chooses among set-ups as in :class:`View` (``explainer="llm"``…): the newest that fits is used
    (:func:`autointerp.scoring.setups.setups_of`).
    """
    view = View(run.name, definition, threshold, tuple(against), **scores)
    return findings(run.root, [r.name for r in study], view, open_contexts(run))


def open_contexts(run: Run) -> ContextSource:
    """Return a function that reads a latent's contexts, none if the run's firing store or tokenizer is missing."""
    reader = LatentReader(run)

    def read(_: str, latent: int) -> Sequence[Context]:
        try:
            material = reader.material(run)
            return [] if material is None else material.sampler.explaining(latent)
        except UserError as error:  # a store moved away, a hub out of reach: the report shows the rest
            if not isinstance(error, NotFound):
                say_once(f"the report has no contexts: {error}")
            return []

    return read


def findings(
    root: Path,
    runs: Sequence[str],
    view: View | None = None,
    contexts: ContextSource | None = None,
    with_sweeps: bool = True,
) -> shape.StudyFindings:
    """Return the findings of ``runs`` (one study's, under ``root``).

    ``contexts`` maps (run, latent) to the contexts shown with ``interesting`` latents. ``with_sweeps``: include the
    rows about sweeps. Raises :class:`UserError` for unknown names and unreadable files.
    """
    return study_findings(Study.open(root, runs, view or View()), contexts, with_sweeps)


def study_findings(
    study: Study, contexts: ContextSource | None = None, with_sweeps: bool = True
) -> shape.StudyFindings:
    """Return :func:`findings` of a study that is already open."""
    rows, facts, latents = study.score_rows(), study.journal(), study.focus_latents()
    focus, setup, sample = study.focus, study.setup, study.sample
    has_similarity = "similarity" in latents
    has_scores = rows is not None and bool((rows["status"] == "ok").any())
    part, scores, related, shown = None, None, None, None
    if rows is not None and setup is not None:
        verdicts = reliability.verdicts_of(focus, rows, setup)
        part = relation.Part(focus.name, rows, latents, verdicts, sample=sample)
        if has_similarity and (found := relation.relation_findings(part)) is not None:
            related = shape.Relation(**vars(found), pooled=pooled_relation(study, verdicts))
        if has_similarity and has_scores:
            shown = choose_interesting(focus.name, rows, latents, facts, contexts)
    if rows is not None or facts.explained:
        scores = _scores(study, facts, rows, part, sample)
    subject, corpus = _provenance(focus)
    return shape.StudyFindings(
        schema=SCHEMA,
        study=focus.study,
        focus=focus.name,
        runs=[study.describe(run) for run in study.runs],
        compared=study.compared,
        subject=subject,
        corpus=corpus,
        missing=list(study.missing(facts.explained, has_scores)),
        stale=list(study.stale()),
        forced=[shape.Forced(pair, study.command("align", *pair, "--force")) for pair in study.forced()],
        overlap=returning.overlap_findings(study),
        similarity=returning.similarity_findings(study.shared),
        counterparts=counterpart_findings(study.behaviour, study.tables, study.alive, study.behaviour_facts),
        membership=returning.membership_findings(study, latents),
        training=returning.training_findings(study.runs),
        firing=returning.firing_findings(study),
        frequency_by_class=returning.frequency_by_class_findings(latents),
        scores=scores,
        relation=related,
        interesting=shown,
        failures=_failures(study, rows, facts),
        methods=_methods(study, facts),
        show=study.command("show", "--sae", focus.name, "--latent", str(shown[0].latent)) if shown else None,
        findings=findings_table(study, facts, scores, related, part, with_sweeps),
    )


def _scores(
    study: Study, facts: JournalFacts, rows: pd.DataFrame | None, part: relation.Part | None, sample: Sample | None
) -> shape.Scores:
    if rows is None:
        rows = pd.DataFrame(columns=["latent", "control", "status", "balanced_accuracy"], dtype=object)
    latents = study.focus_latents()
    found = score_findings(rows, latents, facts.explained, facts.too_few, sample, facts.rounds)
    control_saes, lacking = controls.control_sae_findings(study, rows, facts, sample)
    n_waiting = len(facts.explained - set(rows["latent"][rows["control"] == "none"]))
    return shape.Scores(
        **vars(found),
        reliability=None if part is None else reliability.reliability_findings(part.rows, part.verdicts, sample),
        repeats=[] if part is None else repeats.repeat_findings(study, part.rows, part.verdicts, facts, sample),
        control_saes=control_saes,
        lacking_controls=lacking,
        baseline=controls.baseline_findings(study, controls.own_scored(rows, facts, sample)),
        other_scorers=other_scorer_findings(study, latents, facts),
        waiting=shape.Waiting(n_waiting, asking(study, facts, "score")) if n_waiting else None,
        flags=_flags(facts),
    )


def _provenance(run: Run) -> tuple[shape.Subject, shape.Corpus]:
    record, settings = run.record, run.settings
    subject, corpus = record.get("subject", {}), record.get("corpus", {})
    model, hookpoint = (
        subject.get("source", settings.subject.model),
        record.get("hookpoint", settings.subject.hookpoint),
    )
    kind, source = corpus.get("kind", settings.corpus.kind), [str(s) for s in settings.corpus.source]
    return (
        shape.Subject(model, hookpoint, subject.get("d_in"), subject.get("fingerprint")),
        shape.Corpus(kind, source, corpus.get("n_tokens"), corpus.get("fingerprint")),
    )


def _flags(facts: JournalFacts) -> list[shape.Reason]:
    """Return the latents whose explanation is flagged, by flag."""
    latents = dict(zip(facts.table.get("id", ()), facts.table.get("latent", ()), strict=True))
    by_flag: dict[tuple[str, str], set[int]] = {}
    for explanation, flags in facts.flags.items():
        for flag in flags:
            by_flag.setdefault(("explain", flag), set()).add(int(latents[explanation]))
    return _by_size(by_flag)


def _by_size(by_reason: Mapping[tuple[str, str], Set[int]]) -> list[shape.Reason]:
    ordered = sorted(by_reason.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1]))
    return [shape.Reason(stage, why, len(latents), sorted(latents)) for (stage, why), latents in ordered]


def _failures(study: Study, rows: pd.DataFrame | None, facts: JournalFacts) -> shape.Failures:
    """Return the latents that failed, by stage and reason, with the command that retries only them."""
    by_reason: dict[tuple[str, str], set[int]] = {}
    for latent, why in facts.failed.items():
        by_reason.setdefault(("explain", why), set()).add(latent)
    n_answers = 0
    if rows is not None:
        kinds = rows["status"].map(status_kind)
        for row in rows[kinds == "failed"].to_dict("records"):
            if int(row["latent"]) not in facts.failed:
                stage = "score" if row["control"] == "none" else f"score ({row['control']} control)"
                by_reason.setdefault((stage, reason(row)), set()).add(int(row["latent"]))
        n_answers = failed_answers(rows[kinds == "ok"])
    n, retry = len(set().union(*by_reason.values())), None
    if facts.failed:
        latents = ["--indices", ",".join(map(str, sorted(facts.failed)))] if len(facts.failed) <= 20 else []
        retry = asking(study, facts, "explain", *latents)
    elif n or n_answers:
        retry = asking(study, facts, "score")
    return shape.Failures(n, n_answers, _by_size(by_reason), retry)


def _other_setups(study: Study, facts: JournalFacts) -> tuple[list[dict[str, Any]], list[shape.OtherExplainer]]:
    """Describe the set-ups not reported; compare the newest scores of each other explainer with the reported ones."""
    if study.scores is None:
        return [], []
    others = [described(study.scores, setup) for setup in study.other_setups]
    newest: dict[str, tuple[int, dict[str, Any]]] = {}
    for setup, other in zip(study.other_setups, others, strict=True):
        if (name := other.get("explainer")) and name != (study.setup or {}).get("explainer"):
            newest.setdefault(str(name), (other["n_scored"], setup))
    found = []
    for name, (n, setup) in newest.items():
        command = study.command("report", "--sae", study.focus.name, "--explainer", name)
        found.append(shape.OtherExplainer(name, n, command, controls.compare_explainer(study, setup, facts)))
    return others, found


def _methods(study: Study, facts: JournalFacts) -> shape.Methods:
    view, setup, settings = study.view, study.setup or {}, study.focus.settings
    last = facts.table.iloc[-1] if len(facts.table) else None
    rounds = facts.rounds or {}
    contexts = settings.contexts.model_copy(update={name: rounds[name] for name in SIZES if name in rounds})
    to = precision_in_words(rounds["half_width"]) if rounds else None
    prompts = {"explain": sorted({str(h) for h in facts.table["prompt_hash"] if h}) if last is not None else []}
    prompts["judge"] = [str(setup[c]) for c in setup if "prompt_hash" in c and "explain" not in c and setup[c]]
    other_setups, other_explainers = _other_setups(study, facts)
    record = study.focus.record
    commit = str(record.get("git_commit") or "")[:12]
    versions = ", ".join(f"{k} {v}" for k, v in record.get("packages", {}).items() if k in ("torch", "transformers"))
    return shape.Methods(
        definition=view.definition,
        threshold=view.threshold,
        definitions=DEFINITIONS,
        nulls={**NULLS, **FIRING_NULLS},
        relations=RELATIONS,
        against=list(view.against),
        seeds=[run.seed for run in study.runs],
        explainer=None if last is None else shape.Agent(str(last["explainer"]), str(last["model"])),
        judge=shape.Agent(setup["judge"], str(setup.get("model") or "")) if setup else None,
        scorer=setup.get("scorer"),
        models=sorted({str(v) for v in (setup.get("model"), None if last is None else last["model"]) if v}),
        prompt_hashes={k: v for k, v in prompts.items() if v},
        settings_hash=setup.get("settings_hash"),
        other_setups=other_setups,
        other_explainers=other_explainers,
        cost=facts.cost,
        similarity="mean over the other runs of (matched encoder cosine + matched decoder cosine) / 2",
        dead=f"no firing over the harvested tokens; the word is used from {ENOUGH_TO_CALL_DEAD:,} tokens on",
        contexts=f"{settings.harvest.window} tokens; up to {contexts.n_explain} to explain from and, never the same "
        f"text, up to {contexts.n_active} activating over {contexts.n_strata} strata of activation and "
        f"{contexts.n_inactive} position-matched silent ones to test on"
        + (f", judged in rounds until the 95 % interval of the score is narrow enough ({to})" if to else ""),
        score="balanced accuracy, (true positive rate + true negative rate) / 2; latents weigh the same in means",
        control="swap: the same contexts judged by the explanation of a dissimilar latent (decoder cosine below "
        ".2, little firing together, another text)",
        control_saes="a sample of the latents of an SAE whose random decoder is never trained, and of one that is "
        "not trained at all, explained and judged by the same protocol",
        baseline="n-gram explanations of the same latents, from the same contexts, judged by the n-gram judge on "
        "the language model's contexts",
        negatives=f"random: silent contexts from the same slots of the sequence, which make the score; hard: up to "
        f"{contexts.n_hard} in which one of the nearest latents (decoder cosine, firing together) fires strongly; same "
        f"token: up to {contexts.n_same_token} that hold the token on which the latent mostly peaks; both from "
        "the slots of the activating contexts, or the nearest that have some",
        near_duplicates=f"windows that share {contexts.near_duplicate:g} of their token 5-grams count as one text",
        intervals={
            "overlap": INTERVALS,
            "rates": METHODS["proportion"],
            "scores": METHODS["balanced_accuracy"],
            "AUROC": METHODS["auroc"],
            "means": METHODS["bootstrap_mean"],
            "differences": controls.METHODS["difference"],
            "correlations": METHODS["spearman"],
            "held fixed": METHODS["partial_spearman"],
            "strata": METHODS["stratified_spearman"],
            **reliability.METHODS,
            **repeats.METHODS,
            **relation.METHODS,
            **estimation.METHODS,
        },
        training="FVU, L0: mean over the last twentieth of the training log",
        made_with=", ".join(word for word in (versions, commit and f"commit {commit}") if word),
    )


# --- latents shown one by one ------------------------------------------------------------------------------------


def choose_interesting(
    run: str, rows: pd.DataFrame, latents: pd.DataFrame, facts: JournalFacts, contexts: ContextSource | None
) -> list[shape.Interesting]:
    """Return latents that no other seed has and that can be explained, best first.

    Their interval is above chance and their own explanation beats a swapped one. Ordered by the *lower* end of the
    interval, so that luck counts less.
    """
    own, swapped = own_scores(rows), rows[(rows["control"] == "swap") & (rows["status"] == "ok")]
    joined = own.join(latents[latents.columns.difference(own.columns)], how="inner")
    joined["swapped"] = swapped.set_index("latent")["balanced_accuracy"].reindex(joined.index)
    beats = joined["swapped"].isna() | (joined["balanced_accuracy"] > joined["swapped"])
    kept = joined[joined["unshared"].astype(bool) & (joined["ba_low"] > 0.5) & beats]
    kept = kept.sort_values(["ba_low", "balanced_accuracy"], ascending=False, kind="stable").head(N_INTERESTING)
    return [
        shape.Interesting(
            latent=int(row["latent"]),
            score=Estimate(row["balanced_accuracy"], row["ba_low"], row["ba_high"]),
            auroc=number(row.get("auroc")),
            control=number(row["swapped"]),
            similarity=number(row["similarity"]),
            firing_frequency=number(row.get("firing_frequency")),
            explanation_id=int(row["explanation_id"]),
            explanation=facts.texts.get(int(row["explanation_id"])),
            flags=facts.flags.get(int(row["explanation_id"]), []),
            contexts=spread_contexts(contexts(run, int(row["latent"]))) if contexts else [],
        )
        for row in kept.reset_index().to_dict("records")
    ]


def spread_contexts(contexts: Sequence[Context], n: int = N_CONTEXTS) -> list[shape.ShownContext]:
    """Return ``n`` contexts from the strongest to the median: the strongest alone make a latent look too pure."""
    ordered = sorted(contexts, key=lambda c: -max(c.activations, default=0.0))
    picked = sorted({round(i * (len(ordered) - 1) / (2 * max(1, n - 1))) for i in range(n)}) if ordered else []
    return [shape.ShownContext(ordered[i].tokens, [round(float(a), 4) for a in ordered[i].activations]) for i in picked]
