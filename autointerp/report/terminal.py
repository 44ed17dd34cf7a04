"""The report in the terminal: everything in the findings, in the order in which one would ask.

It is drawn for 80 columns and uses up to 120; it loses nothing without colour; piped, it is plain text. It
only draws: every number comes from :func:`autointerp.findings.study.findings`, so that ``--json`` and the page
cannot disagree.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from autointerp.journal.method import BASELINE
from autointerp.report import controls, dictionaries, explanations, paper, sharing
from autointerp.report.layout import (
    ACCENT,
    QUIET,
    Page,
    bullets,
    command_line,
    get,
    grid,
    human,
    listed,
    percent,
    percent_interval,
    plural,
    section,
)
from autointerp.report.visible import shown, visible
from sae.common.amounts import decimal, estimate, is_known, precision_in_words

Findings = Mapping[str, Any]
#: What stands for block characters where the output cannot hold them.
_ASCII = str.maketrans(
    "▁▂▃▄▅▆▇█▏▎▍▌▋▊▉▒▓░─━┴├┤┊●•·–−±«»…‰↵⇥↔",
    "..::++##.::++##%@:-=+[]|o*.--~<>.%\\>=",
)


def render(findings: Findings, console: Console) -> None:
    """Print the whole report on ``console``. ``findings`` is the object of
    :func:`autointerp.findings.study.findings`."""
    page = Page.of(console)
    parts = [head(findings, page), *(part(findings, page) for part in parts_of_report().values())]
    emit(Group(*(part for part in parts if part is not None), Text()), console, page.width)


def parts_of_report() -> dict[str, Callable[[Findings, Page], RenderableType | None]]:
    """What follows the head, in the order in which one would ask; ``None`` from a part that has nothing to say."""
    return {
        "findings": paper.findings,
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


def emit(body: RenderableType, console: Console, width: int) -> None:
    """Print ``body`` at ``width``. Without colour as plain lines, with nothing behind their last character.

    Where the console's encoding is not Unicode, in the characters that it has.
    """
    if console.color_system is not None and not console.options.ascii_only:
        console.print(body, width=width)
        return
    page = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False)
    with page.capture() as captured:
        page.print(body)
    plain = "\n".join(line.rstrip() for line in captured.get().splitlines())
    if console.options.ascii_only:
        plain = plain.translate(_ASCII).encode(console.encoding, "replace").decode(console.encoding)
    console.out(plain, highlight=False)


# --- head -------------------------------------------------------------------------------------------------


def head(found: Findings, page: Page) -> RenderableType:
    title = Text.assemble(
        (visible(found["study"]), f"bold {ACCENT}"),
        (f"   {dictionaries.runs_in_words(found)}", "bold"),
    )
    table = grid(("", "left"), ("", "fold"), head=False)
    for name, words in head_in_words(found).items():
        nobody = name in ("explainer", "judge") and found["methods"][name] is None
        table.add_row(Text(name, QUIET), shown(words, QUIET if nobody else ""))
    short = in_short(found)
    rule = Text("━" * page.width, ACCENT, no_wrap=True)
    answers: list[RenderableType] = [Text(), bullets(short)] if short else []
    warnings: list[RenderableType] = []
    for entry in found["stale"]:
        warnings += [Text(), Text(f"Out of date: {visible(entry['says'])}", "bold"), command_line(entry["command"])]
    return Group(title, rule, table, *warnings, *answers)


def _corpus_in_words(corpus: Mapping[str, Any], found: Findings) -> str:
    name = " ".join([corpus["kind"], *corpus["source"]])
    words = f"{name} · {human(corpus['tokens'])} tokens" if corpus["tokens"] else name
    trained = next(iter((get(found, "training", "tokens") or {}).values()), None)
    harvested = get(found, "firing", "tokens")
    words += f", {human(trained)} trained on" if trained else ""
    return words + (f", {human(harvested)} harvested" if harvested else "")


def head_in_words(found: Findings) -> dict[str, str]:
    """What is reported on, line by line: subject, text, runs, who explained and judged."""
    subject, runs = found["subject"], found["runs"]
    words = {
        "subject": f"{subject['model']} · {subject['hookpoint']} (width {subject['width']})",
        "text": _corpus_in_words(found["corpus"], found),
        "runs": ", ".join(f"{run['name']} ({dictionaries.seed_in_words(run)}{_unfinished(run)})" for run in runs),
    }
    if aligned := _aligned_in_words(found):
        words["aligned"] = aligned
    if len(runs) > 1:
        words["looked at"] = f"{found['focus']}: the run whose latents are counted and explained below"
    words["explainer"] = _agent(found["methods"]["explainer"], "nothing has been explained yet")
    words["judge"] = _agent(found["methods"]["judge"], "nothing has been scored yet")
    return words


def _unfinished(run: Mapping[str, Any]) -> str:
    """What a run of a study part-way lacks: ``, not harvested``; empty where it is trained and harvested."""
    if "trained" not in run["stages"]:
        return ", not imported to the end" if run["seed"] is None else ", not trained to the end"
    return "" if "harvested" in run["stages"] else ", not harvested"


def _aligned_in_words(found: Findings) -> str:
    """Which runs the figures about sharing are of, where these are not all, and what aligns the others."""
    names, compared = [run["name"] for run in found["runs"]], found["compared"]
    apart = [name for name in names if name not in compared or len(compared) < 2]
    if len(names) < 2 or not apart:
        return ""
    waiting = {entry["stage"]: entry["command"] for entry in found["missing"]}
    command = waiting.get("overlap") or waiting.get("train", "")
    words = f"{listed(compared)}; not {listed(apart)}" if len(compared) > 1 else "none"
    return f"{words} (next: {command})" if command else words


def _agent(agent: Mapping[str, Any] | None, otherwise: str) -> str:
    """Who explained or judged, called what it is."""
    if agent is None:
        return otherwise
    if agent["name"] == BASELINE:
        return "n-gram baseline: token patterns, no language model"
    return f"{agent['name']}: {agent['model'] or 'no language model'}"


def in_short(found: Findings) -> list[str]:
    """The answers in plain sentences, for the head of a report (and of its HTML sibling)."""
    return [*_returns_in_short(found), *_scores_in_short(found), *_relation_in_short(found)]


def _returns_in_short(found: Findings) -> Iterator[str]:
    tree = found["overlap"]
    if tree is None:
        return
    row, definition = tree[tree["definition"]], tree["definition"]
    yield (
        f"{percent(row['value'])} of the alive latents come back {dictionaries.what_changes(found)} "
        f"({definition}, mean of {plural(len(row['pairs']), 'pair')}, 95 % {percent_interval(row['interval'])})"
        f"{_by_chance(max, row['null'])}."
    )
    if found["membership"] is not None and len(found["compared"]) > 2:
        alone = next((p for p in found["membership"]["parts"] if p["shared_class"] == "one"), None)
        if alone is not None:
            yield (
                f"{percent(alone['fraction'])} of the latents of {visible(found['focus'])} are in no other SAE"
                f"{_by_chance(min, alone['null'])}."
            )


def _by_chance(most: Callable[[Iterable[float]], float], by_null: Mapping[str, float | None]) -> str:
    """What the null says that is nearest to the finding; nothing where there is none."""
    values = [value for value in by_null.values() if value is not None]
    return f"; by chance {percent(most(values))}" if values else ""


def _scores_in_short(found: Findings) -> Iterator[str]:
    tree = found["scores"]
    if tree is None or not tree["n_scored"]:
        return
    words = (
        f"Explanations score {estimate(tree['mean'], tree['interval'])} on average over "
        f"{plural(tree['n_scored'], 'latent')}; .5 is guessing"
    )
    if tree["control"] is not None:
        words += f", another latent's explanation scores {decimal(tree['control']['mean'])}"
    yield words + "."
    if told := [f"{_apart(x)} the {name}" for name, x in controls.above(tree)]:
        yield f"That is, {listed(told)}."
    if tree["control"] is not None and tree["control"]["leaks"]:
        yield "The swapped control is not at .5: the judge or the sampling leaks (see below)."


def _apart(difference: Mapping[str, Any]) -> str:
    """``.080 [.045, .120] above``: a difference in words, its interval read in the same direction."""
    value, bounds = difference["mean"], difference["interval"]
    if value >= 0:
        return f"{estimate(value, bounds)} above"
    return f"{estimate(-value, [-b for b in reversed(bounds)] if bounds else None)} below"


def _relation_in_short(found: Findings) -> Iterator[str]:
    tree = found["relation"]
    if tree is None or not is_known(tree["spearman"]):
        return
    pooled = tree["pooled"]
    told = tree if pooled is None else pooled  # as the finding below: over all runs that were scored alike
    over = "" if pooled is None else f" (over {len(pooled['runs'])} runs)"
    held = told["partial"]
    yield (
        f"{_verdict(told)}: Spearman {estimate(told['spearman'], told['interval'], sign=True)}, with the firing "
        f"frequency held fixed {estimate(held['value'], held['interval'], sign=True)}{over}."
    )


def _verdict(tree: Mapping[str, Any]) -> str:
    """What the two intervals allow one to say, and no more."""
    signs = []
    for bounds in (tree["interval"], tree["partial"]["interval"]):
        signs.append(0 if not bounds or bounds[0] <= 0 <= bounds[1] else 1 if bounds[0] > 0 else -1)
    if signs[0] and signs[0] == signs[1]:
        return f"Latents that are alike in other seeds explain {'better' if signs[0] > 0 else 'worse'}"
    if signs[1]:
        return (
            f"At equal frequency, latents that are alike in other seeds explain {'better' if signs[1] > 0 else 'worse'}"
        )
    if signs[0]:
        how = "better" if signs[0] > 0 else "worse"
        return f"Latents that are alike in other seeds explain {how}, but not clearly so at equal frequency"
    return "No clear relation between being alike in other seeds and being explained"


# --- methods ----------------------------------------------------------------------------------------------


def methods(found: Findings, page: Page) -> RenderableType:
    tree = found["methods"]
    table = grid(("", "left"), ("", "fold"), head=False)

    def line(name: str, words: str | None) -> None:
        if words:
            table.add_row(Text(name, QUIET), shown(words))

    line(
        "shared",
        f"{tree['definition']} at cosine {decimal(tree['threshold'], 2)}; unshared: alive and shared with no other run",
    )
    line("similarity", tree["similarity"])
    line("dead", tree["dead"])
    line("contexts", tree["contexts"])
    line("one text", tree["near_duplicates"])
    line("score", tree["score"])
    line("negatives", tree["negatives"])
    line("control", tree["control"])
    line("control SAEs", tree["control_saes"] if found["scores"] and found["scores"]["control_saes"] else None)
    line("baseline", tree["baseline"] if found["scores"] and found["scores"]["baseline"] else None)
    for what, how in tree["intervals"].items():
        line(f"95 %, {what}", how)
    for what, hashes in tree["prompt_hashes"].items():
        line(f"{what} prompt", ", ".join(value[:12] for value in hashes))
    for words in explanations.cost(found):
        line("asked", words)
    for words in setups_in_words(tree["other_setups"]):
        line("also scored", words)
    line("made with", tree["made_with"])
    says = (
        "How the numbers above are defined, after Paulo & Belrose (arXiv 2501.16615) and, for the scores, Paulo et al. "
        "(arXiv 2410.13928)."
    )
    return section(page, "Methods", says, table)


def setups_in_words(setups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each set-up of scores: who explained and judged, how, how many latents.

    Where two would read alike, what tells them apart: the beginning of a hash.
    """
    told = [_setup_in_words(setup) for setup in setups]
    found = []
    for words, setup in zip(told, setups, strict=True):
        alike = [other for other, theirs in zip(setups, told, strict=True) if theirs == words]
        differing = [key for key in setup if any(other.get(key) != setup[key] for other in alike)]
        apart = [f"{key.removesuffix('_hash').replace('_', ' ')} {str(setup[key])[:8]}" for key in differing]
        found.append(", ".join([words, *apart]))
    return found


def _setup_in_words(setup: Mapping[str, Any]) -> str:
    def agent(role: str, model: str) -> str:
        name = str(setup.get(role) or "unknown")
        return f"{name} ({setup[model]})" if setup.get(model) else name

    return (
        f"{plural(setup['n_scored'], 'latent')}: explained by {agent('explainer', 'explainer_model')}, judged by "
        f"{agent('judge', 'model')}, {setup['scorer']}, {precision_in_words(setup['precision'])}"
    )
