"""The closing lines of commands: what was done, what failed, and the next command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autointerp.report import blocks as doc
from autointerp.report import dictionaries
from autointerp.report.numbers import count, human, listed, origin, plural
from autointerp.report.visible import visible
from sae.common.commands import DEFAULT_ROOT, command
from sae.study.run import all_runs, split_readable

Tree = Mapping[str, Any]
_MOST_REASONS = 8
_MOST_MODELS = 5


def outcome_page(found: Tree, stage: str) -> Iterator[doc.Block]:
    """Show the result of ``explain`` or ``score``: counts, skipped latents, failures with reasons, and a retry."""
    done = {"explain": "explained", "score": "scored"}[stage]
    n_controls = found.get("n_controls", 0)
    words = f"{plural(found['n_done'] - n_controls, found['of'])} {done if found['of'] == 'latent' else 'made'}"
    words += f" and {n_controls:,} of control SAEs" if n_controls else ""
    if 0 < found["n_new"] < found["n_done"]:
        words += f", {found['n_new']:,} of them now"
    yield ""
    yield [doc.Span(listed(found["runs"]), "strong accent"), f"  {words} by {found['backend']}"]
    for note in found["notes"]:
        yield doc.quiet(note)
    if found.get("left_out"):
        yield _reasons(found["left_out"], "skipped because")
    if found.get("flags"):
        yield _reasons(found["flags"], "explained, but flagged")
    if found["n_failed"]:
        yield _reasons(found["failures"], "failed because")
        if found["retry"]:
            yield "This retries only what failed:"
            yield doc.Command(found["retry"])
    elif found.get("next"):
        yield doc.quiet("Next:")
        yield doc.Command(found["next"])


def _reasons(counts: Mapping[str, int], head: str) -> doc.Table:
    """Return the most common reasons, each with its number of latents."""
    reasons = sorted(counts.items(), key=lambda item: -item[1])
    rows: list[tuple[str, str | doc.Span]] = [(count(n), reason) for reason, n in reasons[:_MOST_REASONS]]
    if len(reasons) > _MOST_REASONS:
        rest = sum(n for _, n in reasons[_MOST_REASONS:])
        rows.append((count(rest), doc.quiet("other reasons; --json has them all")))
    return doc.Table([">latents", doc.Column(head, "fold")], rows)


def cost_page(found: Tree) -> list[doc.Block]:
    """Show the cost of ``explain`` or ``score``: a :class:`autointerp.scoring.dry_run.Forecast` as a mapping."""
    if judges := found.get("judges"):
        price = "" if found["dollars"] is None else f", about ${found['dollars']:,.4f}"
        tokens = f"{found['prompt_tokens']:,} prompt tokens, about {found['completion_tokens']:,} completion tokens"
        total = f"all {len(judges)} judges together: {_requests(found)}, {tokens}{price}"
        return [*(block for of_judge in judges for block in cost_page(of_judge)), total]
    cheaper, seconds, dollars = found["cheaper"], found["seconds"], found["dollars"]
    most, about = "at most " if cheaper else "", "" if found["exact"] else " (an estimate)"
    lines = [
        *([_other_protocol(found["protocol"], cheaper)] if cheaper else []),
        f"answered before {found['answered_before']:,}, in the answer cache {found['from_cache']:,}",
        f"prompt tokens {found['prompt_tokens']:,}{about}, of them cached by the server {found['cached_tokens']:,}",
        f"completion tokens about {found['completion_tokens']:,}, at most {found['completion_at_most']:,}",
        f"counted by {found['counted_by']}",
        "time unknown: this model has not been asked before" if seconds is None else f"time about {seconds:,.0f} s",
        "price unknown: give --price-in and --price-out" if dollars is None else f"price about ${dollars:,.4f}",
        *found["notes"],
    ]
    head = f"{found['stage']} would send {most}{_requests(found)} to {found['model'] or 'no model'}"
    return [head, *(doc.Sentence(line, indent=2) for line in lines)]


def _requests(found: Tree) -> str:
    least = f" (at least {found['requests_at_least']:,})" if found["requests_at_least"] < found["requests"] else ""
    return f"{found['requests']:,} requests{least}"


def _other_protocol(protocol: str, cheaper: Tree) -> str:
    price = "" if cheaper["dollars"] is None else f", about ${cheaper['dollars']:,.4f}"
    return (
        f"all figures are for --protocol {protocol}, the more expensive one; --protocol {cheaper['protocol']} would "
        f"be {_requests(cheaper)}, {cheaper['prompt_tokens']:,} prompt tokens{price}; "
        "without --protocol the command chooses after asking the server what it can do"
    )


def server_page(found: Tree) -> Iterator[doc.Block]:
    """Show what a language-model server can do: a :class:`autointerp.scoring.probing.ServerReport` as a mapping."""
    models, length, n_tokens = found["models"], found["context_length"], found["answer_tokens"]
    how_long = f", {plural(n_tokens, 'token')} written for one word" if n_tokens else ""
    thinks = f"before it answers{how_long}" if found["thinks"] else "no"
    first = "the label's at once" if found["label_first"] else "not the label's at once"
    yield ""
    yield [doc.Span(", ".join(found["urls"]), "strong accent"), f"  answers as {found['model']}"]
    yield doc.Facts(
        [
            ("models listed", _list_models(models)),
            ("context", "length not reported" if length is None else f"{length:,} tokens"),
            ("plain answers", "yes"),
            ("JSON schema", "answers are held to it" if found["json_schema"] else "ignored"),
            ("log-probabilities", f"{found['logprobs']} for each token, {first}" if found["logprobs"] else "none"),
            ("cached tokens", "reported" if found["cached_tokens"] else "not reported"),
            ("thinking", thinks),
            ("prompt tokens", f"counted by {found['counted_by']}{', exactly' if found['exact'] else ''}"),
            ("this probe", f"{_probe_cost(found)}, {found['seconds_per_request']:.2g} s each"),
        ],
        indent=2,
    )
    yield f"score would use --protocol {found['protocol']}: {found['because']}."
    for words in found["missing"]:
        yield doc.quiet(words)
    yield doc.quiet("Next:")
    yield doc.Command(found["next"])


def _list_models(models: Sequence[str] | None) -> str:
    rest = len(models or ()) - _MOST_MODELS
    more = f" and {rest:,} more" if rest > 0 else ""
    return "no list" if models is None else f"{', '.join(models[:_MOST_MODELS])}{more}"


def _probe_cost(found: Tree) -> str:
    prompt, completion = found["prompt_tokens"], found["completion_tokens"]
    tokens = f"{prompt:,} prompt tokens and {completion:,} completion tokens" if prompt else "tokens not reported"
    return f"{plural(found['requests'], 'request')}, {tokens}"


def runs_page(
    found: Sequence[Tree], root: Path = DEFAULT_ROOT, damaged: Sequence[str] = ()
) -> list[doc.Block | doc.Section]:
    """Show one line per run with its progress, by study, controls last, and the names of the damaged ones."""
    if not found and not damaged:
        return [f"There are no runs under {root}.", doc.Command(command(root, "demo"))]
    stages = ("trained", "harvested", "aligned", "explained", "scored")
    sections: list[doc.Block | doc.Section] = []
    readable = split_readable(all_runs(root))[0]
    for study in dict.fromkeys(run["control_of"] or run["study"] for run in found):
        members = [run for run in found if (run["control_of"] or run["study"]) == study]
        members.sort(key=lambda run: run["control_of"] is not None)
        trained = [run.name for run in readable if run.study == study and run.is_trained]
        rows: doc.Rows = []
        for run in members:
            name = [doc.strong(run["name"]), doc.quiet("  control" if run["control_of"] else "")]
            rows.append([name, origin(run["seed"]), *(_mark(run, stage, trained) for stage in stages)])
        first = members[0]
        sizes = {dictionaries.describe_size(run["architecture"], run["num_latents"], run["k"]) for run in members}
        tokens = "" if first["tokens"] is None else f", {human(first['tokens'])} tokens"
        says = f"{first['subject']} · {first['hookpoint']} · {listed(sorted(sizes))}{tokens}"
        sections.append(doc.Section(study, says, [doc.Table(["run", ">seed", *stages], rows)]))
    if damaged:
        rows = [[doc.strong(name), doc.Span("damaged", "warn")] for name in damaged]
        sections.append(doc.Section("Damaged runs", "", [doc.Table(["run", "state"], rows)]))
    return sections


def _mark(run: Tree, stage: str, trained: Sequence[str]) -> doc.Span:
    """Return ``yes``, a dash, or the number of aligned runs of the study if these are not all."""
    if not run[stage]:
        return doc.quiet("–")
    others = [name for name in trained if name != run["name"]]
    n = sum(name in run["aligned_with"] for name in others)
    return doc.Span(f"with {n} of {len(others)}" if stage == "aligned" and n < len(others) else "yes", "accent")


def deletion_page(found: Tree) -> Iterator[doc.Block]:
    """Show what would be deleted, with sizes, largest first, and what is kept. ``found`` is a plan as a mapping."""
    if found["parts"]:
        parts = sorted(found["parts"], key=lambda part: -part["bytes"])
        rows: doc.Rows = [[f"{human(part['bytes'])}B", part["kind"], part["path"]] for part in parts]
        rows.append([doc.strong(f"{human(found['bytes'])}B"), doc.strong("total"), ""])
        yield doc.Table([">size", "what", doc.Column("path", "fold")], rows)
    else:
        yield "Nothing to delete."
    for words in found["kept"]:
        yield doc.quiet(words)


def written_line(found: Tree) -> str:
    """Say where a page is, its size, and how many latents have details."""
    size = f"{found['n_bytes'] / 1e6:.1f} MB"
    return visible(f"{found['path']}  {size}, details of {found['n_details']:,} of {found['n_latents']:,} latents")


def exported_line(found: Tree) -> str:
    """Say where a table is, and its size."""
    kept, runs = "  (already there)" if found["kept"] else "", ", ".join(found.get("runs", [found["run"]]))
    return visible(
        f"{found['path']}  {found['table']} of {runs}: {found['rows']:,} rows, {len(found['columns'])} columns, "
        f"{found['bytes'] / 1e6:.1f} MB{kept}"
    )
