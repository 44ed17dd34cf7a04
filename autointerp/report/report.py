"""The report of a study: a summary, then a section for each question, then the methods.

Every number comes from :func:`autointerp.findings.study.findings`, so terminal, page and ``--json`` agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from autointerp.findings.paper.finding import AGREES, DISAGREES, SIGNED, UNDECIDED, Finding
from autointerp.findings.shape import Agent, ReportedRun, StudyFindings
from autointerp.journal.method import BASELINE
from autointerp.report import blocks as doc
from autointerp.report import dictionaries, explanations, sharing
from autointerp.report.numbers import chance_level, estimate_of, human, listed, percent, percent_interval, plural
from sae.common.amounts import decimal, estimate, is_known, precision_in_words
from sae.common.estimate import Estimate

Tree = Mapping[str, Any]
_BRIEF = ("findings", "overlap", "scores", "relation", "interesting", "failures")
_N_COMMANDS = 4


def report_page(found: StudyFindings, *, is_full: bool = False) -> list[doc.Block | doc.Section | None]:
    """Return the whole report, or the summary and the main sections."""
    if is_full:
        return [*summary(found), *(build(found) for build in sections().values())]
    rest = "report --full shows every table and the methods; report --html writes a page with figures."
    brief = (replace(part, details=()) for name in _BRIEF if (part := sections()[name](found)))
    return [*summary(found), *brief, doc.Sentence(doc.quiet(rest), is_apart=True)]


def sections() -> dict[str, Callable[[StudyFindings], doc.Section | None]]:
    """Return the builders of the sections after the summary, in order; they return ``None`` for an empty section."""
    return {
        "findings": lambda found: paper_findings(found.findings),
        "overlap": sharing.overlap,
        "similarity": sharing.similarity,
        "counterparts": sharing.counterparts,
        "membership": dictionaries.membership,
        "frequency": dictionaries.frequency,
        "training": dictionaries.training,
        "scores": explanations.scores,
        "counted": explanations.counted,
        "relation": explanations.relation,
        "interesting": explanations.interesting,
        "failures": explanations.failures,
        "methods": methods,
    }


# --- summary ------------------------------------------------------------------------------------------------------


def summary(found: StudyFindings) -> list[doc.Block]:
    """Summarise sharing, interpretability, their relation, what is missing or failed, and the next commands."""
    blocks: list[doc.Block] = [doc.Title(found.study, dictionaries.describe_runs(found))]
    blocks += dictionaries.warn_stale(found)
    answers: list[doc.Words] = [[doc.strong(f"{label}: "), words] for label, words in answer(found)]
    if problems(found):
        answers.append([doc.strong("Missing or failed: "), problems(found)])
    if answers:
        blocks.append(doc.Points(answers))
    blocks.append(doc.Facts(list(describe_study(found).items())))
    commands = next_commands(found)
    return [*blocks, "Next:", *map(doc.Command, commands)] if commands else blocks


def answer(found: StudyFindings) -> list[tuple[str, str]]:
    """Return the answers in plain sentences, each with its topic."""
    topics = {"Sharing": _sharing, "Interpretability": _interpretability, "Relation": _relation}
    return [(topic, " ".join(words)) for topic, build in topics.items() if (words := list(build(found)))]


def _sharing(found: StudyFindings) -> Iterator[str]:
    tree = found.overlap
    if tree is None:
        return
    row, definition = tree.by(tree.definition), tree.definition
    pairs = plural(len(row.pairs), "pair")
    yield (
        f"{percent(row.value.value)} of the alive latents are shared {dictionaries.name_change(found)} ({definition}, "
        f"mean of {pairs}, 95 % {percent_interval(row.value.interval)}{_chance(row.null)})."
    )
    if found.membership is not None and len(found.compared) > 2:
        alone = next((part for part in found.membership.parts if part.shared_class == "one"), None)
        if alone is not None:
            chance = f" ({_chance(alone.null)[2:]})" if _chance(alone.null) else ""
            yield f"{percent(alone.fraction)} of the latents of {found.focus} are in no other SAE{chance}."


def _chance(null: Mapping[str, float]) -> str:
    level = chance_level(null)
    return f"; chance level {percent(level)}" if is_known(level) else ""


def _interpretability(found: StudyFindings) -> Iterator[str]:
    tree = found.scores
    if tree is None or not tree.n_scored:
        return
    words = (
        f"Explanations score {estimate_of(tree)} in balanced accuracy, the mean of "
        f"{plural(tree.n_scored, 'latent')} (.5 is guessing"
    )
    if tree.control is not None:
        words += f"; another latent's explanation scores {decimal(tree.control.mean.value)}"
    yield words + ")."
    above = [(name, x) for name, _, x in explanations.list_controls(tree) if is_known(x.value)]
    if above:
        yield f"This is {listed([f'{_apart(x)} the {name}' for name, x in above])}."
    if tree.control is not None and tree.control.leaks:
        yield "The swapped control is not at .5: some of the score does not come from the explanations (see below)."
    if tree.flags:
        n = len(set().union(*(row.latents for row in tree.flags)))
        yield f"Flagged: {plural(n, 'explanation')} shared by other latents or quoting nothing they saw (see below)."


def _apart(difference: Estimate) -> str:
    """Describe a difference, its interval read in the same direction: ``.080 [.045, .120] above``."""
    value, bounds = difference.value, difference.interval
    if value >= 0:
        return f"{estimate(value, bounds)} above"
    return f"{estimate(-value, [-b for b in reversed(bounds)] if bounds else None)} below"


def _relation(found: StudyFindings) -> Iterator[str]:
    tree = found.relation
    if tree is None or not is_known(tree.spearman.value):
        return
    # As the paper's finding: over all runs that were scored alike.
    over = f" (over {len(tree.pooled.runs)} runs)" if tree.pooled else ""
    correlations = tree.pooled or tree
    both = correlations.spearman, correlations.partial
    whole, held = (estimate_of(of, 2, sign=True) for of in both)
    yield f"{_verdict(*both)} (Spearman {whole}; at equal firing frequency {held}){over}."


def _verdict(*both: Estimate) -> str:
    """Return the conclusion that the intervals of the correlation and of the partial correlation allow."""
    whole, held = (1 if of.low > 0 else -1 if of.high < 0 else 0 for of in both)
    how = "better" if (held or whole) > 0 else "worse"
    if held and whole == held:
        return f"Latents with similar partners in other seeds score {how}"
    if held:
        return f"At equal frequency, latents with similar partners in other seeds score {how}"
    if whole:
        return f"Latents with similar partners in other seeds score {how}, but not clearly so at equal frequency"
    return "No clear relation between similarity to other seeds and score"


def problems(found: StudyFindings) -> str:
    """Return in one line what is missing and how much failed."""
    words = [entry.says.rstrip(".") for entry in found.missing]
    if found.failures.n:
        words.append(f"{plural(found.failures.n, 'latent')} failed")
    if found.failures.n_answers:
        words.append(f"{plural(found.failures.n_answers, 'answer')} of the judge failed")
    return "; ".join(words) + "." if words else ""


def next_commands(found: StudyFindings) -> list[str]:
    """Return the commands that make missing parts or retry failures; else one to look further."""
    commands = [*(entry.command for entry in found.missing), found.failures.retry]
    if not any(commands):
        commands = [found.show]
    return list(dict.fromkeys(filter(None, commands)))[:_N_COMMANDS]


def describe_study(found: StudyFindings) -> dict[str, str]:
    """Describe the subject model, text, runs, explainer and judge."""
    subject, runs, corpus = found.subject, found.runs, found.corpus
    words = {"subject model": f"{subject.model} · {subject.hookpoint} (width {subject.width})"}
    text = " ".join([corpus.kind, *corpus.source])
    text += f" · {human(corpus.tokens)} tokens" if corpus.tokens else ""
    trained = next(iter(found.training.tokens.values()), None) if found.training else None
    harvested = found.firing and found.firing.tokens
    text += f", {human(trained)} trained on" if trained else ""
    words["text"] = text + (f", {human(harvested)} harvested" if harvested else "")
    words["runs"] = ", ".join(f"{run.name} ({dictionaries.name_seed(run)}{_unfinished(run)})" for run in runs)
    if aligned := _aligned(found):
        words["aligned"] = aligned
    if len(runs) > 1:
        words["focus run"] = f"{found.focus} (counts and explanations below refer to it)"
    words["explainer"] = _agent(found.methods.explainer, "nothing has been explained yet")
    words["judge"] = _agent(found.methods.judge, "nothing has been scored yet")
    return words


def _unfinished(run: ReportedRun) -> str:
    if "trained" not in run.stages:
        return ", import not finished" if run.seed is None else ", training not finished"
    return "" if "harvested" in run.stages else ", not harvested"


def _aligned(found: StudyFindings) -> str:
    """Name the runs in the figures about sharing if these are not all, and the command that aligns the others."""
    names, compared = [run.name for run in found.runs], found.compared
    apart = [name for name in names if name not in compared or len(compared) < 2]
    if len(names) < 2 or not apart:
        return ""
    waiting = {entry.stage: entry.command for entry in found.missing}
    command = waiting.get("overlap") or waiting.get("train", "")
    words = f"{listed(compared)}; not {listed(apart)}" if len(compared) > 1 else "none"
    return f"{words} (next: {command})" if command else words


def _agent(agent: Agent | None, otherwise: str) -> str:
    if agent is None:
        return otherwise
    if agent.name == BASELINE:
        return "n-gram baseline: token patterns, no language model"
    return f"{agent.name}: {agent.model or 'no language model'}"


# --- the paper's findings -----------------------------------------------------------------------------------------

STYLE_OF_VERDICT = {AGREES: "accent", DISAGREES: "one", UNDECIDED: "quiet"}
_TALLY = {AGREES: "in agreement", DISAGREES: "in disagreement", UNDECIDED: "undecided"}


def paper_findings(rows: Sequence[Finding]) -> doc.Section | None:
    """Return the tally of the paper's findings; in detail, each with values here and there, verdict and reason."""
    if not rows:
        return None
    says = (
        "Each finding of Paulo & Belrose (arXiv 2501.16615), decided by a written rule on an interval: it agrees in "
        "direction, disagrees, or cannot be decided from these data."
    )
    counts = Counter(row.verdict for row in rows)
    tally = ", ".join(f"{counts[verdict]} {words}" for verdict, words in _TALLY.items() if counts[verdict])
    body = [f"Of {plural(len(rows), 'finding')}: {tally}."]
    return doc.Section("The paper's findings, measured here", says, body, [*chain(*map(_describe_finding, rows))])


def _describe_finding(row: Finding) -> Iterator[doc.Block]:
    verdict = doc.Span(row.verdict, STYLE_OF_VERDICT[row.verdict])
    value = estimate(row.value, (row.low, row.high), sign=row.unit == SIGNED)
    has_value = is_known(row.value)
    head: doc.Words = [doc.strong(f"{row.id:<13}"), verdict, f"   {value}" if has_value else ""]
    yield doc.Sentence(head, is_apart=True)
    yield doc.Sentence(f"{row.finding}; paper: {row.reference}", indent=2)
    if has_value:
        yield doc.Sentence(doc.quiet(f"here: {row.measure}"), indent=2)
    yield doc.Sentence(doc.quiet(row.why), indent=2)
    if row.command:
        yield doc.Command(row.command)


# --- methods ------------------------------------------------------------------------------------------------------


def methods(found: StudyFindings) -> doc.Section:
    tree, scores = found.methods, found.scores
    shared = f"{tree.definition} at cosine {decimal(tree.threshold, 2)}; unshared: alive, shared with no other run"
    lines: list[tuple[str, str | None]] = [
        ("shared", shared),
        ("similarity", tree.similarity),
        ("dead", tree.dead),
        ("contexts", tree.contexts),
        ("near-duplicates", tree.near_duplicates),
        ("score", tree.score),
        ("negatives", tree.negatives),
        ("control", tree.control),
        ("control SAEs", tree.control_saes if scores and scores.control_saes else None),
        ("baseline", tree.baseline if scores and scores.baseline else None),
        *((f"95 %, {what}", how) for what, how in tree.intervals.items()),
        *((f"{what} prompt", ", ".join(value[:12] for value in hashes)) for what, hashes in tree.prompt_hashes.items()),
        *(("requests", words) for words in explanations.cost(found)),
        *(("also scored", words) for words in describe_setups(tree.other_setups)),
        ("made with", tree.made_with),
    ]
    says = (
        "How the numbers above are defined, after Paulo & Belrose (arXiv 2501.16615) and, for the scores, Paulo et al. "
        "(arXiv 2410.13928)."
    )
    return doc.Section("Methods", says, [doc.Facts([(name, words) for name, words in lines if words])])


def describe_setups(setups: Sequence[Tree]) -> list[str]:
    """Return a line per set-up of scores, with the beginning of a differing hash if lines would be equal."""
    lines = [_describe_setup(setup) for setup in setups]
    found = []
    for words, setup in zip(lines, setups, strict=True):
        alike = [other for other, theirs in zip(setups, lines, strict=True) if theirs == words]
        differing = [key for key in setup if any(other.get(key) != setup[key] for other in alike)]
        apart = [f"{key.removesuffix('_hash').replace('_', ' ')} {str(setup[key])[:8]}" for key in differing]
        found.append(", ".join([words, *apart]))
    return found


def _describe_setup(setup: Tree) -> str:
    def agent(role: str, model: str) -> str:
        name = str(setup.get(role) or "unknown")
        return f"{name} ({setup[model]})" if setup.get(model) else name

    return (
        f"{plural(setup['n_scored'], 'latent')}: explained by {agent('explainer', 'explainer_model')}, judged by "
        f"{agent('judge', 'model')}, {setup['scorer']}, {precision_in_words(setup['precision'])}"
    )
