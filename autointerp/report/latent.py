"""One latent in the terminal: what it fires on, what it was said to mean, and what the other seeds have of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from autointerp.explaining.patterns import shorten
from autointerp.report import blocks
from autointerp.report.controls import NEGATIVES
from autointerp.report.dictionaries import rate
from autointerp.report.explanations import context_line
from autointerp.report.layout import (
    ACCENT,
    QUIET,
    STYLE_OF_CLASS,
    Page,
    command_line,
    count,
    grid,
    indented,
    percent,
    plural,
    section,
)
from autointerp.report.terminal import emit
from autointerp.report.visible import shown, visible
from sae.alignment.latent_table import shared_class
from sae.alignment.relation import RELATIONS
from sae.common.amounts import decimal, estimate, interval, is_known, precision_in_words

Latent = Mapping[str, Any]


def show_latent(found: Latent, console: Console) -> None:
    """Print one latent; ``found`` is the object of :func:`autointerp.findings.latent.latent_findings`."""
    page = Page.of(console)
    parts = [_head(found, page), _contexts(found, page), _explanations(found, page), _matches(found, page)]
    emit(Group(*parts, Text()), console, page.width)


def _head(found: Latent, page: Page) -> RenderableType:
    title = Text.assemble((f"latent {found['latent']}", f"bold {ACCENT}"), (f"   of {visible(found['run'])}", "bold"))
    table = grid(("", "left"), ("", "fold"), head=False)
    firing = found["firing"]
    if firing is None:
        table.add_row(Text("fires", QUIET), "not harvested yet")
    elif firing["dead"]:
        table.add_row(Text("fires", QUIET), "never, over the harvested tokens")
    else:
        words = (
            f"{count(firing['n_firings'])} times, {rate(firing['firing_frequency'])} of the tokens, in "
            f"{count(firing['n_windows'])} contexts; the {_ordinal(firing['rank'])} most frequent"
        )
        table.add_row(Text("fires", QUIET), words)
        strength = f"mean {firing['mean_activation']:.3g}, largest {firing['max_activation']:.3g}"
        table.add_row(Text("activation", QUIET), strength)
    if found["activations"] is not None:
        unnamed = firing is None or firing["dead"]
        table.add_row(
            Text("activation" if unnamed else "", QUIET), blocks.strip(found["activations"]["counts"], ACCENT)
        )
        largest = f"{found['activations']['edges'][-1]:.3g}"
        table.add_row("", Text("0" + largest.rjust(len(found["activations"]["counts"]) - 1), QUIET))
    if firing is not None and firing.get("ineligible_reason"):
        table.add_row(Text("not eligible", QUIET), shown(firing["ineligible_reason"]))
    if found["matches"]:
        n, of = found["n_shared"], len(found["matches"])
        name = str(shared_class(n, of))
        words = f"with {n} of {of} other seeds (strict); similarity {decimal(found['similarity'], 2)}"
        table.add_row(Text("shared", QUIET), Text(words, STYLE_OF_CLASS[name]))
    return Group(title, Text("━" * page.width, ACCENT, no_wrap=True), table)


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n:,}{ending}"


def _contexts(found: Latent, page: Page) -> RenderableType:
    how = "shaded by activation" if page.colour else "« » around what activates most"
    says = f"From the strongest activation to the weakest, over its whole range; the largest stands in front ({how})."
    if not found["contexts"]:
        why = "It never fires." if found["firing"] and found["firing"]["dead"] else "None are at hand."
        body: list[RenderableType] = [Text(why)]
        if found["firing"] is None:
            body.append(command_line(found["commands"]["harvest"]))
        return section(page, "Contexts", says, *body)
    return section(page, "Contexts", says, *(context_line(context, page, indent=0) for context in found["contexts"]))


def _explanations(found: Latent, page: Page) -> RenderableType:
    says = "What an explainer made of contexts like these, and how well a judge could tell other contexts by it."
    if not found["explanations"] and found["cannot_be_explained"]:
        return section(
            page, "Explanation", says, Text(f"It cannot be explained: {visible(found['cannot_be_explained'])}.")
        )
    if not found["explanations"]:
        next_step = command_line(found["commands"]["explain"])
        return section(page, "Explanation", says, Text("It has not been explained yet."), next_step)
    body: list[RenderableType] = []
    for entry in found["explanations"]:
        who = f"{entry['explainer']}: {entry['model']}" if entry["model"] else entry["explainer"]
        body.append(Text.assemble((visible(who), "bold"), (f"   {visible(entry['created'])}", QUIET)))
        words = (
            shown(entry["text"]) if entry["text"] else Text.assemble("failed: ", shown(entry["failure"] or "unknown"))
        )
        body += [Padding(words, (0, 0, 0, 2)), *_scores(found, entry["id"], page), Text()]
    swapped = [row for row in found["scores"] if row["control"] != "none"]
    if swapped:
        body += [
            Text("Controls: its contexts judged by another latent's explanation", QUIET),
            _score_table(swapped, page),
        ]
    body += _reliability(found)
    if not found["scores"] and not found["cannot_be_explained"]:
        body += [Text("It has not been scored yet."), command_line(found["commands"]["score"])]
    return section(page, "Explanation", says, *body)


def _scores(found: Latent, identifier: int, page: Page) -> Iterator[RenderableType]:
    own = [row for row in found["scores"] if row["explanation_id"] == identifier and row["control"] == "none"]
    judged = [row for row in own if row.get("judge")]
    if judged:
        yield indented(_score_table(judged, page))


_WITH_RATES = 116  # columns that the score table takes with the true positive and negative rates


def _score_table(rows: Sequence[Mapping[str, Any]], page: Page) -> RenderableType:
    """A line for each score, and under it one for each harder kind of negatives that it has."""
    with_rates = page.width >= _WITH_RATES
    heads = ("scored by", ("balanced accuracy" if with_rates else "score", "right"), "95 % interval")
    rates_too = (("true positive", "left"), ("true negative", "left")) if with_rates else ()
    roomy = page.width >= 76
    table = grid(*heads, *rates_too, ("AUROC", "left"), ("contexts", "right"), gap=2 if roomy else 1)

    def auroc(row: Mapping[str, Any], name: str = "auroc") -> str:
        return _with_interval(row, name) if roomy else decimal(row.get(name), 2)

    for row in rows:
        who = _who(row)
        if row["control"] != "none":
            who = f"{row['control']}, {row['scorer']}, {row['judge']}"
        if row["status"] != "ok":
            table.add_row(shown(who), "–", shown(str(row["status"])))
            continue
        rates = [_with_interval(row, "tpr"), _with_interval(row, "tnr")] if with_rates else []
        bounds = interval([row["ba_low"], row["ba_high"]], 2)
        contexts = f"{count(row['n_active'])} + {count(row['n_inactive'])}"
        score = decimal(row["balanced_accuracy"], 2)
        table.add_row(shown(who), score, bounds, *rates, auroc(row), contexts)
        if is_known(row.get("precision")):
            table.add_row(Text(f"  {precision_in_words(row['precision'])}", QUIET))
        for kind, name in NEGATIVES.items():
            if not is_known(row.get(f"ba_{kind}")):
                continue
            rates = ["", _with_interval(row, f"tnr_{kind}")] if with_rates else []
            bounds = interval([row[f"ba_{kind}_low"], row[f"ba_{kind}_high"]], 2)
            figures = decimal(row[f"ba_{kind}"], 2), bounds, *rates, auroc(row, f"auroc_{kind}")
            contexts = f"{count(row['n_active'])} + {count(row[f'n_{kind}'])}"
            table.add_row(Text(f"  {name}", QUIET), *figures, contexts)
    return table


def _who(row: Mapping[str, Any]) -> str:
    return f"{row['scorer']}, {row['judge']}" + (f" {row['model']}" if row.get("model") else "")


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    return estimate(row.get(name), [row.get(f"{name}_low"), row.get(f"{name}_high")], 2)


def _reliability(found: Latent) -> Iterator[RenderableType]:
    """How far the scores above can be trusted to tell latents apart, set-up by set-up."""
    told = [row for row in found["reliability"] if is_known(row["value"])]
    for row in told:
        who = f"{_who(row)}, {precision_in_words(row['precision'])}"
        words = f"Reliability of such scores over the run's {plural(row['n'], 'latent')} ({visible(who)}): "
        yield Text(words + estimate(row["value"], row["interval"], 2), QUIET)


def _matches(found: Latent, page: Page) -> RenderableType:
    title = "In the other seeds"
    says = (
        "Its partner in each sibling run under the best one-to-one matching, by encoder and by decoder direction "
        "(cosine); the nearest latent, taken or not, in brackets."
    )
    if not found["matches"]:
        lone = "No sibling run is aligned with it."
        return section(page, title, says, Text(lone), command_line(found["commands"]["align"]))
    table = grid("", ("encoder", "right"), ("", "left"), ("decoder", "right"), ("", "left"), ("shared", "fold"))
    for match in found["matches"]:
        holds = [name for name, is_shared in match["shared"].items() if is_shared]
        style = STYLE_OF_CLASS["all" if match["shared"]["strict"] else "one"]
        table.add_row(
            Text(visible(match["run"]), "bold"),
            *_partner(match, "encoder"),
            *_partner(match, "decoder"),
            Text(", ".join(holds) if holds else "no", style),
        )
    body: list[RenderableType] = [table]
    for match in found["matches"]:
        body += _behaviour(match)
        if match["explanation"]:
            head = f"\n{visible(match['run'])} {match['decoder_partner']}"
            score = f"   score {decimal(match['score'], 2)}" if match["score"] is not None else ""
            body += [
                Text.assemble((head, "bold"), (score, QUIET)),
                Padding(shown(shorten(match["explanation"])), (0, 0, 0, 2)),
            ]
    return section(page, title, says, *body)


def _behaviour(match: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Where it fires, beside the latents of one sibling; what it is there where the weights do not find it again."""
    tree = match["behaviour"]
    if tree is None:
        return
    run, partner = visible(match["run"]), tree["jaccard_partner"]
    words = Text(f"\n{run} by firing  ", "bold")
    if partner is None:
        alone = tree["max_jaccard_neighbor"] is None
        words.append("nothing fires where it does" if alone else "what fires with it is paired with others", "not bold")
    else:
        jaccard, there, here = (decimal(tree[key], 2) for key in ("jaccard", "p_there", "p_here"))
        told = f"paired with {partner}: Jaccard {jaccard}; P({partner} | {match['latent']}) {there}, reversed {here}"
        words.append(told, "not bold")
    yield words
    if tree["relation"] is None:
        return
    members = tree["relation_latents"] or []
    told = f"{RELATIONS[tree['relation']]}"
    if members:
        told += f" ({', '.join(map(str, members))}; {percent(tree['relation_covered'])} of its firings)"
    lines = [("there it", told)]
    terms = [f"{term['value']:+.2f} × {term['latent']}" for term in tree["rebuilt_from"] or []]
    null = f" (by chance {decimal(tree['rebuilt_null'], 2)})" if tree["rebuilt_null"] is not None else ""
    lines.append(("rebuilt as", f"{'  '.join(terms) or 'nothing'}, explaining {decimal(tree['rebuilt'], 2)}{null}"))
    for name, key in (("nearest, decoder", "nearest_decoder"), ("nearest, firing", "nearest_firing")):
        near = [f"{term['latent']} ({decimal(term['value'], 2)})" for term in tree[key] or []]
        lines.append((name, ", ".join(near) or "none"))
    table = grid("", ("", "fold"), head=False)
    for name, said in lines:
        table.add_row(Text(name, QUIET), said)
    yield indented(table)


def _partner(match: Mapping[str, Any], space: str) -> tuple[str, Text]:
    """``412``, ``.83 [97 .84]``: the matched latent and its cosine; the nearest where that is another."""
    partner, neighbor = match[f"{space}_partner"], match[f"max_{space}_neighbor"]
    words = Text(decimal(match[f"{space}_cosine"], 2))
    if neighbor != partner:
        words.append(f" [{neighbor} {decimal(match[f'max_{space}_cosine'], 2)}]", QUIET)
    return "–" if partner is None else str(partner), words
