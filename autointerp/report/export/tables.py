"""The tables of a run, by name: those of the stages and the journal, and the pairs of ``compare``.

A missing table raises an error with the command that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from autointerp.journal.journal import Journal
from sae.alignment.alignment import pair_path, read_sides
from sae.common.commands import command
from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import read_table
from sae.study.align import behaviour_folder
from sae.study.run import Run

Frames = Iterator[pd.DataFrame]
"""One table, in pieces where it may not fit in memory at once; all have the same columns."""

VERDICTS_AT_ONCE = 100_000


@dataclass(frozen=True)
class Table:
    """A kind of table: its rows, and how to make it from a run and other runs."""

    name: str
    says: str
    make: Callable[[Run, Sequence[Run]], Frames]
    of_pairs: bool = False
    """whether further runs may be named, which are then those that the first one is seen against"""


def frames_of(name: str, runs: Sequence[Run]) -> Frames:
    """Return the table ``name`` of the first of ``runs``; one about pairs is against the others (default: all).

    Raises NotFound for an unknown name or a missing table, and BadInput for a second run if the table is about one.
    """
    table = table_named(name)
    run, others = runs[0], [other for other in runs[1:] if other.name != runs[0].name]
    if others and not table.of_pairs:
        of_pairs = " and ".join(t.name for t in TABLES.values() if t.of_pairs)
        raise BadInput(f"table {name!r} is about one run; several --sae are for {of_pairs}")
    return table.make(run, others)


def table_named(name: str) -> Table:
    if name not in TABLES:
        raise NotFound(
            f"--table {name!r} does not exist; did you mean {suggest(name, TABLES)}? There are {', '.join(TABLES)}"
        )
    return TABLES[name]


# --- files of the stages


def _not_yet(run: Run, what: str, *words: str) -> NotFound:
    return NotFound(f"run {run.name!r} has no {what} yet; run `{command(run.root, *words)}`")


def _stage(stage: str, what: str, *words: str) -> Callable[[Run, Sequence[Run]], Frames]:
    """Return a reader of a stage's file, which names the command to run if there is no file."""

    def make(run: Run, _: Sequence[Run]) -> Frames:
        path = run.stage_path(stage)
        if not path.exists():
            siblings = [other.name for other in run.siblings()] if words == ("align",) else []
            of = [run.name, *siblings] if words == ("align",) else ["--sae", run.name]
            raise _not_yet(run, what, *words, *of)
        yield read_table(path)

    return make


def _latents(run: Run, _: Sequence[Run]) -> Frames:
    if not run.stage_path("firing").exists():
        raise _not_yet(run, "firings", "harvest", "--sae", run.name)
    yield run.latents()


def _training(run: Run, _: Sequence[Run]) -> Frames:
    if not run.training_log_path.exists():
        raise NotFound(
            f"run {run.name!r} has no training log: "
            + ("it was imported" if run.imported else "it is not trained; give its `train` command again")
        )
    yield read_table(run.training_log_path)


def _alignment(run: Run, others: Sequence[Run]) -> Frames:
    yield _sides(run, others, "alignments", "alignment")


def _behaviour(run: Run, others: Sequence[Run]) -> Frames:
    yield _sides(run, others, "behaviour", "comparison of firings")


def _sides(run: Run, others: Sequence[Run], folder: str, what: str) -> pd.DataFrame:
    """Return the run's side of each of its pairs, with ``run`` and ``other`` before the file's columns."""
    place = run.root / "alignments" if folder == "alignments" else behaviour_folder(run.root)
    wanted = others or [other for other in run.siblings() if pair_path(place, run.name, other.name) is not None]
    for other in wanted or run.siblings():
        if pair_path(place, run.name, other.name) is None:
            raise NotFound(
                f"there is no {what} of {run.name!r} and {other.name!r} yet; run "
                f"`{command(run.root, 'align', run.name, other.name)}`"
            )
    if not wanted:
        raise NotFound(f"run {run.name!r} has no sibling to be compared with; {run.suggest_another_run()}")
    tables = []
    for other in wanted:
        side = read_sides(place, run.name, other.name)[0]
        side.insert(0, "run", run.name)
        side.insert(1, "other", other.name)
        tables.append(side)
    return pd.concat(tables, ignore_index=True)


# --- the journal --------------------------------------------------------------------------------------------


def _explanations(run: Run, _: Sequence[Run]) -> Frames:
    with _journal(run) as journal:
        yield journal.explanations()


def _verdicts(run: Run, _: Sequence[Run]) -> Frames:
    with _journal(run) as journal:
        yield from journal.verdicts_in_pieces(VERDICTS_AT_ONCE)


def _usage(run: Run, _: Sequence[Run]) -> Frames:
    with _journal(run) as journal:
        yield journal.usage()


def _journal(run: Run) -> Journal:
    if not run.journal_path.exists():
        raise _not_yet(run, "explanations", "explain", "--sae", run.name)
    return Journal(run.journal_path)


def _contexts(run: Run, _: Sequence[Run]) -> Frames:
    """Yield the contexts that explainers saw, one latent at a time by number."""
    from autointerp.contexts.material import Material

    with _journal(run) as journal:
        latents = sorted({int(latent) for latent in journal.explanations()["latent"]})
    sampler = Material.of(run).sampler
    rows: list[dict[str, Any]] = []
    for latent in latents:
        for context in sampler.explaining(latent):
            rows.append(
                {
                    "latent": latent,
                    "window": context.window,
                    "stratum": context.stratum,
                    "text": context.text,
                    "tokens": list(context.tokens),
                    "activations": [float(a) for a in context.activations],
                }
            )
    yield pd.DataFrame(rows, columns=["latent", "window", "stratum", "text", "tokens", "activations"])


# --- tables of the report


def _reliability(run: Run, _: Sequence[Run]) -> Frames:
    from autointerp.notebook import Run as Opened

    if not run.stage_path("scores").exists():
        raise _not_yet(run, "scores", "score", "--sae", run.name)
    yield Opened(run.name, run.root).reliability()


def _ends(interval: Sequence[float | None] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {"low": low, "high": high}


def _pairs(run: Run, others: Sequence[Run]) -> Frames:
    """Return a flat row for each latent and other run: the pair that ``compare`` shows."""
    from autointerp.findings.pair import compare_runs

    _sides(run, others, "alignments", "alignment")  # says what is missing
    place = run.root / "alignments"
    wanted = others or [other for other in run.siblings() if pair_path(place, run.name, other.name) is not None]
    for other in wanted:
        rows = []
        for pair in compare_runs(run, other)["pairs"]:
            row = {"run": run.name, "other": other.name, **pair, **_flat("shared", pair["shared"])}
            for end, side in zip(("", "_there"), pair["sides"], strict=True):
                score = side["score"] or {}
                row |= {f"{name}{end}": side[name] for name in ("n_firings", "firing_frequency", "explanation")}
                row |= {f"score{end}": score.get("value"), f"auroc{end}": score.get("auroc")}
                row |= {f"score_{name}{end}": value for name, value in _ends(score.get("interval")).items()}
            del row["shared"], row["sides"], row["is_shared"]
            rows.append(row)
        yield _typed(pd.DataFrame(rows))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Give columns without a value in one piece the type that they have in the others."""
    words = ("explanation", "explanation_there")
    whole = ("latent", "partner", "encoder_partner", "n_firings", "n_firings_there")
    plain = ("run", "other", "same_partner", *(c for c in table if str(c).startswith("shared_")))
    types: dict[Any, Any] = dict.fromkeys(whole, "Int64") | dict.fromkeys(words, object)
    types |= {column: float for column in table if column not in (*words, *whole, *plain)}
    return table.astype(types)


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in values.items()}


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table("latents", "a latent: firing, sharing, eligibility and score, joined", _latents),
        Table("firing", "a latent: how often and how strongly it fires", _stage("firing", "firings", "harvest")),
        Table("overlap", "a latent: what each other run has to say of it", _stage("overlap", "overlap", "align")),
        Table(
            "eligibility",
            "a latent: whether it has contexts enough, and why not",
            _stage("contexts", "count of contexts", "explain"),
        ),
        Table("training", "a step of training", _training),
        Table("alignment", "a latent and another run: partners, nearest, cosines", _alignment, of_pairs=True),
        Table("behaviour", "a latent and another run: what it does there", _behaviour, of_pairs=True),
        Table("pairs", "a latent and its partner: cosines, explanations, scores", _pairs, of_pairs=True),
        Table("contexts", "a context that an explained latent was explained from", _contexts),
        Table("explanations", "an explanation, or why there is none", _explanations),
        Table("verdicts", "a verdict on one context, or why there is none", _verdicts),
        Table("scores", "a score: an explanation, judge, scorer and control", _stage("scores", "scores", "score")),
        Table("sample", "a latent that could be drawn to be explained", _stage("sample", "sample", "explain")),
        Table("reliability", "a set-up of scores: how far they can be relied upon", _reliability),
        Table("usage", "a stage and model: what it cost", _usage),
    )
}
