"""Show two runs: how far they agree, and pairs of their latents with both explanations side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from autointerp.explaining.patterns import shorten
from autointerp.report import dictionaries, sharing
from autointerp.report.blocks import (
    Block,
    Column,
    Command,
    Facts,
    Heads,
    Points,
    Rows,
    Section,
    Sentence,
    Span,
    Table,
    Title,
    Words,
    numbers,
    quiet,
    strong,
)
from autointerp.report.explanations import whisker
from autointerp.report.numbers import chance_level, count, listed, percent, percent_interval, plural, rate
from sae.common.amounts import decimal, estimate, is_known

Found = Mapping[str, Any]
_NAMED = 12


def comparison_page(found: Found, shown_pairs: Found) -> list[Block | Section | None]:
    """Return the page of a comparison.

    Args:
        found: from :func:`autointerp.findings.pair.compare_runs`.
        shown_pairs: the pairs to show, from :func:`autointerp.findings.pair.chosen`.
    """
    about = [sharing.overlap(found), sharing.similarity(found), _scores(found)]
    return [*_head(found), *about, _pairs(found, shown_pairs), _missing(found)]


def _head(found: Found) -> Iterator[Block]:
    yield Title(listed([run["name"] for run in found["runs"]]), dictionaries.describe_runs(found))
    facts: list[tuple[str, Words]] = [
        (
            run["name"],
            f"{dictionaries.name_seed(run)}; of {plural(run['num_latents'], 'latent')} {run['n_alive']:,} alive, "
            f"{run['n_explained']:,} explained, {run['n_scored']:,} scored",
        )
        for run in found["runs"]
    ]
    if found["scored_by"]:
        facts.append(("scored by", _who(found["scored_by"])))
    yield Facts(facts)
    yield from sharing.warn_apart(found["apart"])
    for entry in found["stale"]:
        yield Sentence(strong(f"Out of date: {entry['says']}"))
        yield Command(entry["command"])
    yield Points(_answers(found))


def _who(scored_by: Mapping[str, Any]) -> str:
    def agent(name: str, model: str | None) -> str:
        return f"{name} ({model})" if model else name

    explained = agent(scored_by["explainer"] or "?", scored_by["explainer_model"])
    return f"{scored_by['scorer']}: {agent(scored_by['judge'], scored_by['model'])}, of explanations by {explained}"


def _answers(found: Found) -> list[str]:
    tree, similar = found["overlap"], found["similarity"]
    row, null = tree[tree["definition"]], chance_level(similar["null"]) or {}
    answers = [
        f"{percent(row['value'])} of the alive latents are shared ({tree['definition']}), 95 % "
        f"{percent_interval(row['interval'])}{_chance(percent, chance_level(row['null']))}."
    ]
    cosines = []
    for space in ("encoder", "decoder"):
        name = f"mean_{space}"
        value = estimate(similar[name], similar[f"{name}_interval"])
        cosines.append(f"{space} {value}{_chance(decimal, null.get(name))}")
    answers.append(f"Mean cosine of partners: {', '.join(cosines)}.")
    if found["agreement"] is not None:
        tree = found["agreement"]["together"]
        answers.append(
            f"{plural(tree['n'], 'pair')} scored on both sides: the scores correlate by "
            f"{_estimate(tree['spearman'], 2, sign=True)} (Spearman)."
        )
    return answers


def _chance(write: Callable[[float], str], value: float | None) -> str:
    return "" if value is None else f" (chance level {write(value)})"


def _estimate(tree: Mapping[str, Any], digits: int = 3, *, sign: bool = False) -> str:
    return estimate(tree["value"], tree["interval"], digits, sign=sign)


def _scores(found: Found) -> Section:
    a, b = (run["name"] for run in found["runs"])
    title = "Do partners score alike?"
    says = (
        f"Pairs whose two explanations were scored in the same way. Difference: the score in {a} minus that in {b}; "
        "gap: its size. Intervals are over these pairs, which are not a sample of all pairs."
    )
    note: list[Block] = []
    if found["scored_by"] and found["scored_by"]["other_made_otherwise"]:
        note = [Sentence(f"The scores of {b} were made in another way (judge, explainer or contexts) and are skipped.")]
    tree = found["agreement"]
    if tree is None:
        return Section(title, says, [Sentence("No pair is scored on both sides."), *note])
    labels = {"shared": "shared", "unshared": "not shared", "together": "all"}
    rows = [(label, tree[name]) for name, label in labels.items() if tree[name]["n"]]
    cells: Rows = []
    for label, row in rows:
        figures = [_estimate(row["difference"], sign=True), _estimate(row["gap"])]
        spearman = row["spearman"]
        chart = whisker(spearman["value"], spearman["interval"], -1, 1, 0)
        cells.append([label, count(row["n"]), *figures, _estimate(spearman, 2, sign=True), chart])
    heads: Heads = ["", *numbers("pairs"), "difference", "gap", "Spearman", Column("", "chart", is_extra=True)]
    means = [f"{label} {decimal(row['mean'])} in {a} and {decimal(row['mean_there'])} in {b}" for label, row in rows]
    return Section(title, says, [Table(heads, cells, [f"Mean scores: {'; '.join(means)}."]), *note])


def _pairs(found: Found, chosen: Found) -> Section:
    a, b = (run["name"] for run in found["runs"])
    says = (
        f"A latent of {a} and its partner in {b} by decoder direction; whether the encoders pick the same one, and "
        f"whether that counts as shared ({found['definition']} at {decimal(found['threshold'], 2)}). "
        "“Fire together”: the Jaccard index of the tokens at which they fire."
    )
    body: list[Block] = [Sentence(chosen["says"])]
    for pair in chosen["pairs"]:
        body += _pair(pair, (a, b))
    if found["n_without_partner"]:
        words = f"{plural(found['n_without_partner'], 'latent')} of {a} have no partner: {b} has fewer latents."
        body.append(Sentence(quiet(words), is_apart=True))
    if chosen["n_of"] > len(chosen["pairs"]):
        body.append(Sentence(quiet("--latents shows more, --json has all pairs."), is_apart=True))
    return Section("Pairs", says, body)


def _pair(pair: Found, names: tuple[str, str]) -> Iterator[Block]:
    partner = pair["encoder_partner"]
    other = "no partner by encoder" if partner is None else f"encoder's partner is {partner}"
    facts = [
        f"encoder {decimal(pair['encoder_cosine'], 2)}",
        f"decoder {decimal(pair['decoder_cosine'], 2)}",
        "same partner by both" if pair["same_partner"] else other,
        *([f"fire together {decimal(pair['jaccard'], 2)}"] if is_known(pair["jaccard"]) else []),
    ]
    shared = Span("   shared", "all") if pair["is_shared"] else Span("   not shared", "one")
    similarity = f"   similarity {decimal(pair['similarity'], 2)}"
    yield Sentence([strong(f"{pair['latent']} ↔ {pair['partner']}"), shared, similarity], is_apart=True)
    yield Sentence(quiet(" · ".join(facts)), indent=2)
    sides = [_side(side) for side in pair["sides"]]
    heads: Heads = [Column(f"{name} {side['latent']}", "fold") for side, name in zip(pair["sides"], names, strict=True)]
    yield Table(heads, list(zip(*sides, strict=True)))


def _side(side: Found) -> list[Words]:
    """Show how often a latent fires, its score and its explanation."""
    if side["n_firings"] is None:
        fires = "not harvested"
    else:
        often = f"fires {count(side['n_firings'])} times, {rate(side['firing_frequency'])}"
        fires = often if side["alive"] else "never fires"
    score = "not scored" if side["score"] is None else f"score {_estimate(side['score'], 2)}"
    text = side["explanation"]
    words = shorten(text) if text is not None else quiet(f"({side['without_explanation']})")
    return [quiet(fires), quiet(score), words]


def _missing(found: Found) -> Section | None:
    """List pairs that lack an explanation or a score on one side, with the commands that provide them."""
    tree = found["lacking"]
    entries = tree["without_explanation"]
    body: list[Block] = []
    if not tree["n_explained_both"] and not entries:
        body.append(Sentence("Nothing is explained in either run yet."))
    for name in (run["name"] for run in found["runs"]):
        able = [e for e in entries if e["run"] == name and e["can_be_explained"]]
        unable = [e for e in entries if e["run"] == name and not e["can_be_explained"]]
        if able:
            latents = _first([entry["latent"] for entry in able])
            body.append(Sentence(f"{name}: {plural(len(able), 'latent')} with an explained partner: {latents}."))
        if unable:
            latents = _first([entry["latent"] for entry in unable])
            words = f"{name}: {len(unable):,} more that cannot be explained (too few contexts): {latents}."
            body.append(Sentence(quiet(words)))
    how = ", with the same --llm-url or --vllm as before" if tree["by_language_model"] else ""
    if tree["explain"]:
        body += [Sentence(f"This explains partners{how}:"), *map(Command, tree["explain"])]
    if tree["not_scored"]:
        words = f"{plural(len(tree['not_scored']), 'pair')} explained on both sides without a score on either or both"
        body.append(Sentence(f"{words}: {_first(tree['not_scored'])}."))
    if tree["score"]:
        body += [Sentence(f"This scores what is explained{how}:"), Command(tree["score"])]
    says = "Explanations and scores that a pair has on one side alone cannot be compared."
    return Section("Not on both sides", says, body) if body else None


def _first(latents: Sequence[int]) -> str:
    """Return the first few numbers, and how many follow."""
    rest = len(latents) - _NAMED
    words = ", ".join(map(str, latents[:_NAMED]))
    return f"{words} and {rest:,} more (--json has all)" if rest > 0 else words
