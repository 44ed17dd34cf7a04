"""The commands demo, report, show, compare and runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from autointerp.command_line import options as opt
from autointerp.command_line.ending import exit_if, finish, finish_with_runs, open_runs, reading
from autointerp.command_line.options import Machine, Output, ShownScores, takes_groups
from autointerp.command_line.values import new_file
from sae.common.errors import BadInput, UserError

if TYPE_CHECKING:
    from autointerp.findings.pair import Sharing
    from sae.study.run import Run


@takes_groups
def demo(*, threads: opt.Threads = None, full: opt.Full = False, output: Output) -> None:
    """Run a whole study offline on the bundled subject model, or show its report if it is finished.

    Trains three TopK SAEs on a small language model of Python source, aligns their latents, explains and scores a few
    hundred of them with the n-gram baseline, and shows the report.
    """
    from autointerp.command_line.demo import run_demo

    found, failed = run_demo(output.root, threads)
    from autointerp.findings.json_values import to_json
    from autointerp.report.report import report_page
    from autointerp.report.terminal import print_page

    finish(output.as_json, "report", lambda: to_json(found), lambda: print_page(report_page(found, is_full=full)))
    exit_if(failed)


@takes_groups
def report(
    *,
    sae: opt.ReportedSae = None,
    definition: opt.Shared = "strict",
    threshold: opt.Threshold = 0.7,
    against: opt.Against = None,
    scores: ShownScores,
    full: opt.Full = False,
    html: opt.Html = False,
    to: opt.HtmlTo = None,
    output: Output,
) -> None:
    """Show which latents the seeds share, how well they can be explained, and how the two are related.

    --html writes one file for a browser, which needs no network: figures, and every latent to search and open.

    \b
    python cli.py report --sae run_a
    python cli.py report --sae run_a --html --to run_a.html
    """
    from sae.study.run import study_runs

    run = open_runs([sae] if sae else None, output.root)[0]
    study = study_runs(run.study, output.root)
    chosen: dict[str, Any] = {"definition": definition, "threshold": threshold, **vars(scores)}
    view = {**chosen, "against": tuple(against or ())}
    if not (html or to):
        from autointerp.findings.json_values import to_json
        from autointerp.findings.study import findings_of
        from autointerp.report.report import report_page
        from autointerp.report.terminal import print_page

        with reading(run):
            found = findings_of(run, study, **view)
        finish(output.as_json, "report", lambda: to_json(found), lambda: print_page(report_page(found, is_full=full)))
        return
    if to is not None:
        to = new_file("--to", to)
    from autointerp.report.html.page import write_report
    from autointerp.report.stages import written_line

    with reading(run):
        written = write_report(run, study, to, **view)
    finish(output.as_json, "report", lambda: written, lambda: print(written_line(written)))


@takes_groups
def show(*, latent: opt.LatentNumber, sae: opt.OneSae = None, contexts: opt.ShownContexts = 8, output: Output) -> None:
    """Show one latent: contexts, explanation, scores and its match in each other run.

    \b
    python cli.py show --sae run_a --latent 131
    """
    from autointerp.findings.latent import latent_findings
    from autointerp.report.latent import latent_page
    from autointerp.report.terminal import print_page

    run = open_runs([sae] if sae else None, output.root)[0]
    with reading(run):
        found = latent_findings(run, latent, n_contexts=contexts)
    finish(output.as_json, "show", lambda: found, lambda: print_page(latent_page(found)))


@takes_groups
def compare(
    *,
    names: opt.ComparedNames = None,
    sae: opt.ComparedSaes = None,
    latents: opt.ShownPairs = 8,
    sort: opt.SortPairs = None,
    shared_only: opt.SharedPairs = False,
    unshared_only: opt.UnsharedPairs = False,
    definition: opt.Shared = "strict",
    threshold: opt.Threshold = 0.7,
    scores: ShownScores,
    machine: Machine,
    output: Output,
) -> None:
    """Compare two runs: how far they agree, and pairs of latents with both explanations and scores side by side.

    `explain --with-partners` explains both sides of a pair.

    \b
    python cli.py compare run_a run_b --sort gap --latents 20
    """
    from autointerp.findings.json_values import to_json
    from autointerp.findings.pair import PairChoice, chosen, compare_runs, ensure_pair_aligned, the_two
    from autointerp.report.compare import comparison_page
    from autointerp.report.terminal import print_page

    if shared_only and unshared_only:
        raise BadInput("--unshared-only and --shared-only exclude each other; give one of them")
    a, b = the_two([*(names or []), *(sae or [])], output.root)
    ensure_pair_aligned(a, b, machine.compute())
    with reading(a):
        found = compare_runs(a, b, definition, threshold, **vars(scores))
    sharing: Sharing = "shared" if shared_only else "unshared" if unshared_only else "any"
    shown = chosen(found.pairs, PairChoice(latents, sort, sharing))
    listed = {"shown": {"says": shown.says, "n_of": shown.n_of, "latents": shown.latents}}
    finish(
        output.as_json,
        "compare",
        lambda: {**to_json(found), **listed},
        lambda: print_page(comparison_page(found, shown)),
    )


@takes_groups
def runs(
    *,
    delete: opt.DeletedName = None,
    prune: opt.Prune = False,
    yes: opt.Yes = False,
    dry_run: opt.ListOnly = False,
    output: Output,
) -> None:
    """List the runs and their progress, or delete some. --delete and --prune list files with sizes and ask first.

    \b
    python cli.py runs
    python cli.py runs --prune --dry-run
    """
    from sae.study.run import all_runs, split_readable

    if delete is not None or prune:
        _delete(delete, prune, yes, dry_run, output)
        return
    if yes or dry_run:
        raise BadInput(f"{'--yes' if yes else '--dry-run'} has no effect without --delete NAME or --prune")

    def place(run: Run) -> tuple[str, bool, int, str]:
        return run.parent_study, run.is_control, len(run.name), run.name

    found, damaged = split_readable(all_runs(output.root))
    finish_with_runs(output.as_json, "runs", sorted(found, key=place), output.root, damaged)


def _delete(name: str | None, prune: bool, yes: bool, dry_run: bool, output: Output) -> None:
    """Show and delete a run or study, or (without ``name``) the files that no run uses."""
    from autointerp.report.stages import deletion_page
    from autointerp.report.terminal import print_page
    from sae.common.amounts import human
    from sae.common.commands import command
    from sae.study.deletion import delete, lock_runs, plan_deletion, plan_pruning

    if name is not None and prune:
        raise BadInput("--delete and --prune exclude each other; give one of them")
    if yes and dry_run:
        raise BadInput("--yes and --dry-run exclude each other; give one of them")
    with lock_runs(output.root, name):
        plan = plan_pruning(output.root) if name is None else plan_deletion(name, output.root)
        found = {**plan.as_dict(), "dry_run": dry_run}
        if not output.as_json:
            print_page(deletion_page(found))
        if plan.parts and not dry_run:
            if not yes:
                _confirm(output.as_json)
            delete(plan)
    if output.as_json:
        finish(True, "runs", lambda: found, lambda: None)
    elif plan.parts and not dry_run:
        print("deleted")
        rest = plan_pruning(output.root)
        if name is not None and rest.parts:
            print(f"{human(rest.n_bytes)}B are no longer used by any run: {command(output.root, 'runs', '--prune')}")


def _confirm(as_json: bool) -> None:
    """Ask at a terminal whether to delete the listed files. Raises UserError if the answer is no."""
    if as_json or not sys.stdin.isatty():
        raise BadInput("nothing was deleted: no terminal to ask at; add --yes to delete or --dry-run to list")
    try:
        answer = input("Delete these? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("nothing was deleted")
