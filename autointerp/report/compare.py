"""Show two runs: how far they agree, and pairs of their latents with both explanations side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from autointerp.explaining.patterns import shorten
from autointerp.findings.shape import ChosenPairs, Comparison, Pair, ScoredBy, SideOfPair
from autointerp.report import blocks as doc
from autointerp.report import dictionaries, sharing
from autointerp.report.explanations import whisker
from autointerp.report.numbers import chance_level, count, estimate_of, listed, percent, percent_interval, plural, rate
from sae.common.amounts import decimal, is_known

_NAMED = 12


def comparison_page(found: Comparison, shown_pairs: ChosenPairs) -> list[doc.Block | doc.Section | None]:
    """Return the page of a comparison.

    Args:
        found: from :func:`autointerp.findings.pair.compare_runs`.
        shown_pairs: the pairs to show, from :func:`autointerp.findings.pair.chosen`.
    """
    about = [sharing.overlap(found), sharing.similarity(found), _scores(found)]
    return [*_head(found), *about, _pairs(found, shown_pairs), _missing(found)]


def _head(found: Comparison) -> Iterator[doc.Block]:
    yield doc.Title(listed([run.name for run in found.runs]), dictionaries.describe_runs(found))
    facts: list[tuple[str, doc.Words]] = [
        (
            run.name,
            f"{dictionaries.name_seed(run)}; of {plural(run.num_latents, 'latent')} {run.n_alive:,} alive, "
            f"{run.n_explained:,} explained, {run.n_scored:,} scored",
        )
        for run in found.runs
    ]
    if found.scored_by:
        facts.append(("scored by", _who(found.scored_by)))
    yield doc.Facts(facts)
    yield from sharing.warn_apart(found.apart)
    yield from dictionaries.warn_stale(found)
    yield doc.Points(list(_answers(found)))


def _who(scored_by: ScoredBy) -> str:
    def agent(name: str | None, model: str | None) -> str:
        return f"{name or '?'} ({model})" if model else name or "?"

    explained = agent(scored_by.explainer, scored_by.explainer_model)
    return f"{scored_by.scorer}: {agent(scored_by.judge, scored_by.model)}, of explanations by {explained}"


def _answers(found: Comparison) -> Iterator[str]:
    tree, similar = found.overlap, found.similarity
    assert tree is not None
    assert similar is not None
    row, null = tree.by(tree.definition), chance_level(similar.null)
    yield (
        f"{percent(row.value.value)} of the alive latents are shared ({tree.definition}), 95 % "
        f"{percent_interval(row.value.interval)}{_chance(percent, chance_level(row.null))}."
    )
    encoder = f"{estimate_of(similar.mean_encoder)}{_chance(decimal, null.mean_encoder if null else None)}"
    decoder = f"{estimate_of(similar.mean_decoder)}{_chance(decimal, null.mean_decoder if null else None)}"
    yield f"Mean cosine of partners: encoder {encoder}, decoder {decoder}."
    if found.agreement is not None:
        agreement = found.agreement["together"]
        correlation = estimate_of(agreement.spearman, 2, sign=True)
        yield f"{plural(agreement.n, 'pair')} scored on both sides: the scores correlate by {correlation} (Spearman)."


def _chance(write: Callable[[float], str], value: float | None) -> str:
    return "" if value is None or not is_known(value) else f" (chance level {write(value)})"


def _scores(found: Comparison) -> doc.Section:
    a, b = (run.name for run in found.runs)
    title = "Do partners score alike?"
    says = (
        f"Pairs whose two explanations were scored in the same way. Difference: the score in {a} minus that in {b}; "
        "gap: its size. Intervals are over these pairs, which are not a sample of all pairs."
    )
    note: list[doc.Block] = []
    if found.scored_by and found.scored_by.other_made_otherwise:
        note = [f"The scores of {b} were made in another way (judge, explainer or contexts) and are skipped."]
    tree = found.agreement
    if tree is None:
        return doc.Section(title, says, ["No pair is scored on both sides.", *note])
    labels = {"shared": "shared", "unshared": "not shared", "together": "all"}
    rows = [(label, tree[name]) for name, label in labels.items() if tree[name].n]
    cells: doc.Rows = []
    for label, row in rows:
        figures = [
            estimate_of(row.difference, sign=True),
            estimate_of(row.gap),
            estimate_of(row.spearman, 2, sign=True),
        ]
        cells.append([label, count(row.n), *figures, whisker(row.spearman, -1, 1, 0)])
    heads: doc.Heads = ["", ">pairs", "difference", "gap", "Spearman", doc.Column("", "chart", is_extra=True)]
    means = [f"{label} {decimal(row.mean)} in {a} and {decimal(row.mean_there)} in {b}" for label, row in rows]
    return doc.Section(title, says, [doc.Table(heads, cells, [f"Mean scores: {'; '.join(means)}."]), *note])


def _pairs(found: Comparison, chosen: ChosenPairs) -> doc.Section:
    a, b = (run.name for run in found.runs)
    says = (
        f"A latent of {a} and its partner in {b} by decoder direction; whether the encoders pick the same one, and "
        f"whether that counts as shared ({found.definition} at {decimal(found.threshold, 2)}). "
        "“Fire together”: the Jaccard index of the tokens at which they fire."
    )
    body: list[doc.Block] = [chosen.says]
    for pair in chosen.pairs:
        body += _pair(pair, (a, b))
    if found.n_without_partner:
        words = f"{plural(found.n_without_partner, 'latent')} of {a} have no partner: {b} has fewer latents."
        body.append(doc.Sentence(doc.quiet(words), is_apart=True))
    if chosen.n_of > len(chosen.pairs):
        body.append(doc.Sentence(doc.quiet("--latents shows more, --json has all pairs."), is_apart=True))
    return doc.Section("Pairs", says, body)


def _pair(pair: Pair, names: tuple[str, str]) -> Iterator[doc.Block]:
    partner = pair.encoder_partner
    other = "no partner by encoder" if partner is None else f"encoder's partner is {partner}"
    facts = [
        f"encoder {decimal(pair.encoder_cosine, 2)}",
        f"decoder {decimal(pair.decoder_cosine, 2)}",
        "same partner by both" if pair.same_partner else other,
        *([f"fire together {decimal(pair.jaccard, 2)}"] if is_known(pair.jaccard) else []),
    ]
    shared = doc.Span("   shared", "all") if pair.is_shared else doc.Span("   not shared", "one")
    similarity = f"   similarity {decimal(pair.similarity, 2)}"
    yield doc.Sentence([doc.strong(f"{pair.latent} ↔ {pair.partner}"), shared, similarity], is_apart=True)
    yield doc.Sentence(doc.quiet(" · ".join(facts)), indent=2)
    heads = [doc.Column(f"{name} {side.latent}", "fold") for side, name in zip(pair.sides, names, strict=True)]
    yield doc.Table(heads, list(zip(*map(_side, pair.sides), strict=True)))


def _side(side: SideOfPair) -> list[doc.Words]:
    """Show how often a latent fires, its score and its explanation."""
    fires = "not harvested" if side.n_firings is None else "never fires"
    if side.n_firings is not None and side.alive:
        fires = f"fires {count(side.n_firings)} times, {rate(side.firing_frequency)}"
    score = "not scored" if side.score is None else f"score {estimate_of(side.score.value, 2)}"
    text = side.explanation
    words = shorten(text) if text is not None else doc.quiet(f"({side.without_explanation})")
    return [doc.quiet(fires), doc.quiet(score), words]


def _missing(found: Comparison) -> doc.Section | None:
    """List pairs that lack an explanation or a score on one side, with the commands that provide them."""
    tree = found.lacking
    entries = tree.without_explanation
    body: list[doc.Block] = []
    if not tree.n_explained_both and not entries:
        body.append("Nothing is explained in either run yet.")
    for name in (run.name for run in found.runs):
        for is_able, words in ((True, "with an explained partner"), (False, "with too few contexts to be explained")):
            latents = [e.latent for e in entries if e.run == name and e.can_be_explained == is_able]
            sentence = f"{name}: {plural(len(latents), 'latent')} {words}: {_first(latents)}."
            body += [sentence if is_able else doc.quiet(sentence)] if latents else []
    how = ", with the same --llm-url or --vllm as before" if tree.by_language_model else ""
    if tree.explain:
        body += [f"This explains partners{how}:", *map(doc.Command, tree.explain)]
    if tree.not_scored:
        words = f"{plural(len(tree.not_scored), 'pair')} explained on both sides without a score on either or both"
        body.append(f"{words}: {_first(tree.not_scored)}.")
    if tree.score:
        body += [f"This scores what is explained{how}:", doc.Command(tree.score)]
    says = "Explanations and scores that a pair has on one side alone cannot be compared."
    return doc.Section("Not on both sides", says, body) if body else None


def _first(latents: Sequence[int]) -> str:
    """Return the first few numbers, and how many follow."""
    rest = len(latents) - _NAMED
    words = ", ".join(map(str, latents[:_NAMED]))
    return f"{words} and {rest:,} more (--json has all)" if rest > 0 else words
