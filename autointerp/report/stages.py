"""What the commands before the report print when they end: what was done, what failed, and what comes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from autointerp.report import dictionaries, sharing
from autointerp.report.layout import (
    ACCENT,
    QUIET,
    Page,
    command_line,
    count,
    grid,
    human,
    listed,
    origin,
    plural,
    section,
)
from autointerp.report.terminal import emit
from autointerp.report.visible import shown, visible
from sae.common.commands import command
from sae.study.run import all_runs, split_readable

_DONE = {"explain": "explained", "score": "scored"}
_MOST_REASONS = 8


def show_outcome(found: Mapping[str, Any], stage: str, console: Console) -> None:
    """What ``explain`` or ``score`` did: counts, what was left out, and failures with their reasons and
    the command that retries them."""
    page = Page.of(console)
    runs = [visible(name) for name in found["runs"]]
    done = _DONE.get(stage, "done")
    n_controls = found.get("n_controls", 0)
    words = f"{plural(found['n_done'] - n_controls, found['of'])} {done if found['of'] == 'latent' else 'made'}"
    words += f" and {n_controls:,} of control SAEs" if n_controls else ""
    if 0 < found["n_new"] < found["n_done"]:
        words += f", {found['n_new']:,} of them now"
    head = Text.assemble((listed(runs), f"bold {ACCENT}"), f"  {words} by {visible(found['backend'])}")
    body: list[RenderableType] = [Text(), head]
    body += [Text(visible(note), QUIET) for note in found["notes"]]
    if found.get("left_out"):
        body += [Text(), _reasons(found["left_out"], "left out because")]
    if found["n_failed"]:
        body += [Text(), _reasons(found["failures"], "failed because")]
        if found["retry"]:
            body += [Text("\nThis asks again only what failed:"), command_line(found["retry"])]
    elif found.get("next"):
        body += [Text("Next:", QUIET), command_line(found["next"])]
    emit(Group(*body), console, page.width)


def _reasons(counts: Mapping[str, int], head: str) -> RenderableType:
    """The commonest reasons, each with its number of latents."""
    table = grid(("latents", "right"), (head, "fold"))
    reasons = sorted(counts.items(), key=lambda item: -item[1])
    for reason, n in reasons[:_MOST_REASONS]:
        table.add_row(count(n), shown(reason))
    if len(reasons) > _MOST_REASONS:
        rest = sum(n for _, n in reasons[_MOST_REASONS:])
        table.add_row(count(rest), Text("other reasons; --json has them all", QUIET))
    return table


def show_cost(found: Mapping[str, Any], console: Console) -> None:
    """Show what ``explain`` or ``score`` would cost: a :class:`autointerp.scoring.dry_run.Forecast` as a mapping."""
    cheaper, seconds, dollars = found["cheaper"], found["seconds"], found["dollars"]
    most, about = "at most " if cheaper else "", "" if found["exact"] else " (an estimate)"
    lines = [
        f"{found['stage']} would send {most}{_requests(found)} to {visible(found['model']) or 'no model'}",
        *([_other_protocol(found["protocol"], cheaper)] if cheaper else []),
        f"  answered before {found['answered_before']:,}, in the answer cache {found['from_cache']:,}",
        f"  prompt tokens {found['prompt_tokens']:,}{about}, of them cached by the server {found['cached_tokens']:,}",
        f"  written tokens about {found['completion_tokens']:,}, at most {found['completion_at_most']:,}",
        f"  counted by {visible(found['counted_by'])}",
        "  time unknown: this model has not been asked before" if seconds is None else f"  time about {seconds:,.0f} s",
        "  price unknown: give --price-in and --price-out" if dollars is None else f"  price about ${dollars:,.4f}",
        *(f"  {visible(note)}" for note in found["notes"]),
    ]
    for line in lines:
        console.out(line, highlight=False)


def _requests(found: Mapping[str, Any]) -> str:
    least = f" (at least {found['requests_at_least']:,})" if found["requests_at_least"] < found["requests"] else ""
    return f"{found['requests']:,} requests{least}"


def _other_protocol(protocol: str, cheaper: Mapping[str, Any]) -> str:
    price = "" if cheaper["dollars"] is None else f", about ${cheaper['dollars']:,.4f}"
    return (
        f"  all figures are for --protocol {protocol}, the more expensive one; --protocol {cheaper['protocol']} would "
        f"be {_requests(cheaper)}, {cheaper['prompt_tokens']:,} prompt tokens{price}; "
        "without --protocol the command chooses after asking the server what it can do"
    )


def show_alignment(found: Mapping[str, Any], console: Console) -> None:
    """What aligned runs share: the parts of the report that are about that, by themselves."""
    page = Page.of(console)
    parts: list[RenderableType | None] = [
        sharing.overlap(found, page),
        sharing.similarity(found, page),
        sharing.counterparts(found, page),
    ]
    if found["apart"]:
        words = f"Aligned by --force: {found['apart']}. What differs between them is not the seed alone."
        parts.insert(0, Text.assemble(("\n! ", "bold red"), shown(words)))
    emit(Group(*(part for part in parts if part is not None)), console, page.width)


def show_runs(found: Sequence[Mapping[str, Any]], console: Console, root: Path) -> None:
    """One line per run, study by study, its controls last, with how far each has come."""
    page = Page.of(console)
    if not found:
        none = Text(f"There are no runs under {visible(str(root))}.")
        emit(Group(none, command_line(command(root, "demo"))), console, page.width)
        return
    stages = ("trained", "harvested", "aligned", "explained", "scored")
    body: list[RenderableType] = []
    for study in dict.fromkeys(run["control_of"] or run["study"] for run in found):
        members = [run for run in found if (run["control_of"] or run["study"]) == study]
        members.sort(key=lambda run: run["control_of"] is not None)
        first = members[0]
        trained = _trained_runs(study, root)
        table = grid("", ("seed", "right"), *stages)
        for run in members:
            marks = [_mark(run, stage, trained) for stage in stages]
            name = Text(visible(run["name"]), "bold")
            name.append("  control" if run["control_of"] else "", f"not bold {QUIET}")
            table.add_row(name, origin(run["seed"]), *marks)
        sizes = sorted({dictionaries.size_in_words(run) for run in members})
        tokens = "" if first["tokens"] is None else f", {human(first['tokens'])} tokens"
        says = f"{visible(first['subject'])} · {visible(first['hookpoint'])} · {listed(sizes)}{tokens}"
        body.append(section(page, visible(study), says, table))
    emit(Group(*body), console, page.width)


def _mark(run: Mapping[str, Any], stage: str, trained: Sequence[str]) -> Text:
    """``yes``, a dash, or with how many of the study's other trained runs it is aligned where not with all."""
    if not run[stage]:
        return Text("–", QUIET)
    others = [name for name in trained if name != run["name"]]
    n = sum(name in run["aligned_with"] for name in others)
    if stage == "aligned" and n < len(others):
        return Text(f"with {n} of {len(others)}", ACCENT)
    return Text("yes", ACCENT)


def _trained_runs(study: str, root: Path) -> list[str]:
    return [run.name for run in split_readable(all_runs(root))[0] if run.study == study and run.is_trained]


def show_deletion(found: Mapping[str, Any], console: Console) -> None:
    """What would be deleted, with sizes, the largest first, and what stays."""
    page = Page.of(console)
    body: list[RenderableType] = []
    if found["parts"]:
        table = grid(("size", "right"), "what", ("", "fold"))
        for part in sorted(found["parts"], key=lambda part: -part["bytes"]):
            table.add_row(f"{human(part['bytes'])}B", part["kind"], visible(part["path"]))
        table.add_row(Text(f"{human(found['bytes'])}B", "bold"), Text("together", "bold"), "")
        body.append(table)
    else:
        body.append(Text("Nothing to delete."))
    body += [Text(visible(words), QUIET) for words in found["kept"]]
    emit(Group(*body), console, page.width)
