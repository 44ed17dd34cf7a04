"""Show one latent: contexts, explanations, scores, and its partners in the other seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from autointerp.explaining.patterns import quote, shorten
from autointerp.report import blocks as doc
from autointerp.report import charts
from autointerp.report.charts import ACCENT
from autointerp.report.explanations import NEGATIVES
from autointerp.report.numbers import count, percent, plural, rate
from sae.alignment.overlap import classify_sharing
from sae.alignment.relation import RELATIONS
from sae.common.amounts import decimal, estimate, interval, is_known, precision_in_words

Tree = Mapping[str, Any]


def latent_page(found: Tree) -> list[doc.Block | doc.Section | None]:
    """Return the page of ``found``, from :func:`autointerp.findings.latent.latent_findings`."""
    title = doc.Title(f"latent {found['latent']}", f"of {found['run']}")
    return [title, *_head(found), _contexts(found), _explanations(found), _matches(found)]


def _head(found: Tree) -> Iterator[doc.Block]:
    firing, activations = found["firing"], found["activations"]
    facts: list[tuple[str, doc.Words]] = []
    if firing is None:
        facts.append(("fires", "not harvested yet"))
    elif firing["dead"]:
        facts.append(("fires", "never, over the harvested tokens"))
    else:
        words = (
            f"{count(firing['n_firings'])} times, {rate(firing['firing_frequency'])} of the tokens, in "
            f"{count(firing['n_windows'])} contexts; the {_ordinal(firing['rank'])} most frequent"
        )
        strength = f"mean {firing['mean_activation']:.3g}, largest {firing['max_activation']:.3g}"
        facts += [("fires", words), ("activation", strength)]
    if firing is not None and firing.get("ineligible_reason"):
        facts.append(("not eligible", firing["ineligible_reason"]))
    if found["logits"] is None:
        facts.append(("promotes", f"not known: {found['no_logits']}"))
    else:
        for name, side in (("promotes", "promoted"), ("suppresses", "suppressed")):
            facts.append((name, "  ".join(quote(of["token"]).replace(" ", "␣") for of in found["logits"][side])))
    if found["matches"]:
        n, of = found["n_shared"], len(found["matches"])
        words = f"with {n} of {of} other seeds (strict); similarity {decimal(found['similarity'], 2)}"
        facts.append(("shared", doc.Span(words, str(classify_sharing(n, of)))))
    yield doc.Facts(facts)
    if activations is not None:
        largest = f"{activations['edges'][-1]:.3g}"

        def draw(width: int, _: bool) -> list[Text]:
            counts = charts.pooled(activations["counts"], width)
            scale = Text("0" + largest.rjust(len(counts) - 1), "dim")
            return [Text("activations over all firings", "dim"), charts.strip(counts, ACCENT), scale]

        yield doc.Chart(draw)


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n:,}{ending}"


def _contexts(found: Tree) -> doc.Section:
    says = (
        "From the strongest activation to the weakest, over its whole range. The largest activation of each context "
        "stands before it; tokens that activate most are marked."
    )
    body: list[doc.Block] = [doc.Context(of["tokens"], of["activations"], indent=0) for of in found["contexts"]]
    if not body:
        is_dead = found["firing"] and found["firing"]["dead"]
        body.append("It never fires." if is_dead else "No contexts are available.")
        if found["firing"] is None:
            body.append(doc.Command(found["commands"]["harvest"]))
    return doc.Section("Contexts", says, body)


def _explanations(found: Tree) -> doc.Section:
    says = "What an explainer made of contexts like these, and how well a judge recognises other contexts by it."
    body: list[doc.Block] = []
    for i, entry in enumerate(found["explanations"]):
        who = f"{entry['explainer']}: {entry['model']}" if entry["model"] else entry["explainer"]
        who += f", draw {entry['draw']}" if entry["draw"] else ""
        body.append(doc.Sentence([doc.strong(who), doc.quiet(f"   {entry['created']}")], is_apart=i > 0))
        body.append(doc.Sentence(entry["text"] or f"failed: {entry['failure'] or 'unknown'}", indent=2))
        body += [doc.Sentence(doc.Span(f"! {flag}", "warn"), indent=2) for flag in entry["flags"]]
        own = [row for row in found["scores"] if row["explanation_id"] == entry["id"] and row["control"] == "none"]
        if judged := [row for row in own if row.get("judge")]:
            body.append(_score_table(judged))
    if swapped := [row for row in found["scores"] if row["control"] != "none"]:
        body += [doc.quiet("Controls: its contexts judged by another latent's explanation"), _score_table(swapped)]
    for row in found["reliability"]:
        if is_known(row["value"]):
            who = f"{_who(row)}, {precision_in_words(row['precision'])}"
            words = f"Reliability of such scores over the run's {plural(row['n'], 'latent')} ({who}): "
            body.append(doc.quiet(words + estimate(row["value"], row["interval"], 2)))
    if not found["explanations"]:
        if found["cannot_be_explained"]:
            body.append(f"It cannot be explained: {found['cannot_be_explained']}.")
        else:
            body += ["It has not been explained yet.", doc.Command(found["commands"]["explain"])]
    elif not found["scores"] and not found["cannot_be_explained"]:
        body += ["It has not been scored yet.", doc.Command(found["commands"]["score"])]
    return doc.Section("Explanation", says, body)


def _score_table(rows: Sequence[Tree]) -> doc.Table:
    """Show a row for each score, followed by one for each of its harder kinds of negatives."""
    cells: doc.Rows = []
    for row in rows:
        who = _who(row) if row["control"] == "none" else f"{row['control']}, {row['scorer']}, {row['judge']}"
        swapped = () if row["control"] == "none" else ("draw",)  # own scores are below their explanation
        who += "".join(f", {name} {row[name]:.0f}" for name in (*swapped, "replicate") if row.get(name))
        if row["status"] != "ok":
            cells.append([who, "–", str(row["status"]), "", "", "", ""])
            continue
        contexts = f"{count(row['n_active'])} + {count(row['n_inactive'])}"
        score, bounds = decimal(row["balanced_accuracy"], 2), interval([row["ba_low"], row["ba_high"]], 2)
        rates = [_estimate(row, name) for name in ("auroc", "tpr", "tnr")]
        cells.append([who, score, bounds, contexts, *rates])
        if is_known(row.get("precision")):
            cells.append([doc.quiet(f"  {precision_in_words(row['precision'])}"), *[""] * 6])
        for kind, name in NEGATIVES.items():
            if is_known(row.get(f"ba_{kind}")):
                score = decimal(row[f"ba_{kind}"], 2)
                bounds = interval([row[f"ba_{kind}_low"], row[f"ba_{kind}_high"]], 2)
                contexts = f"{count(row['n_active'])} + {count(row[f'n_{kind}'])}"
                rates = [_estimate(row, f"auroc_{kind}"), "", _estimate(row, f"tnr_{kind}")]
                cells.append([doc.quiet(f"  {name}"), score, bounds, contexts, *rates])
    extra = [doc.Column(name, is_extra=True) for name in ("AUROC", "true positive", "true negative")]
    return doc.Table(["scored by", ">score", "95 % interval", ">contexts", *extra], cells)


def _who(row: Tree) -> str:
    return f"{row['scorer']}, {row['judge']}" + (f" {row['model']}" if row.get("model") else "")


def _estimate(row: Tree, name: str) -> str:
    return estimate(row.get(name), [row.get(f"{name}_low"), row.get(f"{name}_high")], 2)


def _matches(found: Tree) -> doc.Section:
    says = (
        "Its partner in each sibling run under the best one-to-one matching, by encoder and by decoder direction "
        "(cosine). Brackets: the nearest latent, where that is another."
    )
    if not found["matches"]:
        align = doc.Command(found["commands"]["align"])
        return doc.Section("In the other seeds", says, ["No sibling run is aligned with it.", align])
    rows: doc.Rows = []
    for match in found["matches"]:
        shared = ", ".join(name for name, is_shared in match["shared"].items() if is_shared) or "no"
        style = "all" if match["shared"]["strict"] else "one"
        spaces = [cell for space in ("encoder", "decoder") for cell in _partner(match, space)]
        rows.append([doc.strong(match["run"]), *spaces, doc.Span(shared, style)])
    heads: doc.Heads = ["run", ">encoder", "cosine", ">decoder", "cosine", doc.Column("shared", "fold")]
    body: list[doc.Block] = [doc.Table(heads, rows)]
    for match in found["matches"]:
        body += _behaviour(match)
        if match["explanation"]:
            score = f"   score {decimal(match['score'], 2)}" if match["score"] is not None else ""
            head = [doc.strong(f"{match['run']} {match['decoder_partner']}"), doc.quiet(score)]
            body += [doc.Sentence(head, is_apart=True), doc.Sentence(shorten(match["explanation"]), indent=2)]
    return doc.Section("In the other seeds", says, body)


def _behaviour(match: Tree) -> Iterator[doc.Block]:
    """Show which latents of one sibling fire with it, and what that SAE has instead if it is unshared."""
    tree = match["behaviour"]
    if tree is None:
        return
    partner = tree["jaccard_partner"]
    if partner is None:
        is_alone = tree["max_jaccard_neighbor"] is None
        words = "nothing fires where it does" if is_alone else "the latents that fire with it are paired with others"
    else:
        jaccard, there, here = (decimal(tree[key], 2) for key in ("jaccard", "p_there", "p_here"))
        words = f"paired with {partner}: Jaccard {jaccard}; P({partner} | {match['latent']}) {there}, reversed {here}"
    yield doc.Sentence([doc.strong(f"{match['run']} by firing  "), words], is_apart=True)
    if tree["relation"] is None:
        return
    members = tree["relation_latents"] or []
    relation = RELATIONS[tree["relation"]]
    if members:
        relation += f" ({', '.join(map(str, members))}; {percent(tree['relation_covered'])} of its firings)"
    terms = [f"{term['value']:+.2f} × {term['latent']}" for term in tree["rebuilt_from"] or []]
    null = f" (by chance {decimal(tree['rebuilt_null'], 2)})" if tree["rebuilt_null"] is not None else ""
    rebuilt = f"{'  '.join(terms) or 'nothing'}, explaining {decimal(tree['rebuilt'], 2)}{null}"
    facts: list[tuple[str, doc.Words]] = [("in the other SAE", relation), ("rebuilt as", rebuilt)]
    for name, key in (("nearest, decoder", "nearest_decoder"), ("nearest, firing", "nearest_firing")):
        near = [f"{term['latent']} ({decimal(term['value'], 2)})" for term in tree[key] or []]
        facts.append((name, ", ".join(near) or "none"))
    yield doc.Facts(facts, indent=2)


def _partner(match: Tree, space: str) -> tuple[str, doc.Words]:
    """Return ``412``, ``.83 [97 .84]``: the matched latent and its cosine, with the nearest if that is another."""
    partner, neighbor = match[f"{space}_partner"], match[f"max_{space}_neighbor"]
    words: list[str | doc.Span] = [decimal(match[f"{space}_cosine"], 2)]
    if neighbor != partner:
        words.append(doc.quiet(f" [{neighbor} {decimal(match[f'max_{space}_cosine'], 2)}]"))
    return "–" if partner is None else str(partner), words
