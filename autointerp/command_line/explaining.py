"""The commands explain and score."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp.command_line import options as opt
from autointerp.command_line.ending import exit_if, finish, open_runs
from autointerp.command_line.options import JudgeServer, Machine, Output, Server, Spending, llm_options, takes_groups
from autointerp.command_line.values import indices as latent_numbers
from sae.common.commands import command
from sae.common.errors import BadInput

if TYPE_CHECKING:
    from autointerp.explaining.explain import Outcome
    from autointerp.llm.options import LlmOptions


@takes_groups
def explain(
    *,
    sae: opt.Saes = None,
    unshared_only: opt.UnsharedOnly = False,
    shared_only: opt.SharedOnly = False,
    against: opt.Against = None,
    definition: opt.Shared = "strict",
    threshold: opt.Threshold = 0.7,
    latents: opt.Latents = 200,
    indices: opt.Indices = None,
    with_partners: opt.WithPartners = False,
    control_sae_latents: opt.ControlSaeLatents = None,
    draws: opt.Draws = 1,
    temperature: opt.Temperature = None,
    explainer: opt.Explainer = "auto",
    server: Server,
    spending: Spending,
    machine: Machine,
    output: Output,
) -> None:
    """Explain in one sentence what makes each latent fire, from contexts in which it fires.

    \b
    python cli.py explain --sae run_a --unshared-only --latents 300

    With a language model: --llm-url names a running server, --vllm starts one.

    \b
    python cli.py explain --sae run_a --llm-url http://127.0.0.1:8000/v1 --dry-run
    python cli.py explain --sae run_a --vllm Qwen/Qwen2.5-7B-Instruct
    """
    from autointerp.contexts.selection import Choice
    from autointerp.explaining.explainers import EXPLAINERS
    from autointerp.llm.opening import check_flags, resolve_name
    from autointerp.report.stages import cost_page, outcome_page
    from autointerp.report.terminal import print_page

    if unshared_only and shared_only:
        raise BadInput("--unshared-only and --shared-only exclude each other; give one of them")
    choice = Choice(
        sharing="unshared" if unshared_only else "shared" if shared_only else "any",
        n=latents,
        indices=latent_numbers(indices),
        against=tuple(against or ()),
        definition=definition,
        threshold=threshold,
        with_partners=with_partners,
    )
    if choice.indices and latents != Choice().n:
        raise BadInput("--indices names latents outright, --latents draws a sample; give one of the two")
    if temperature is not None and draws == 1:
        raise BadInput("--temperature is of further draws; give --draws too, such as --draws 3")
    options = llm_options(server, spending=spending, temperature=temperature)
    check_flags(EXPLAINERS, resolve_name(EXPLAINERS, explainer, options), options.list_server_flags())
    runs = open_runs(sae, output.root)
    if spending.dry_run:
        from autointerp.scoring.dry_run import forecast_explain

        forecast = forecast_explain(runs, choice, explainer, options, spending.prices(), control_sae_latents, draws)
        finish(output.as_json, "explain", forecast.as_dict, lambda: print_page(cost_page(forecast.as_dict())))
        return
    from autointerp.explaining.explain import explain_runs

    outcome = explain_runs(runs, choice, explainer, options, machine.compute(), control_sae_latents, draws=draws)
    outcome.next = _score_command(outcome, resolve_name(EXPLAINERS, explainer, options), options, output.root, draws)
    finish(output.as_json, "explain", outcome.as_dict, lambda: print_page(outcome_page(outcome.as_dict(), "explain")))
    exit_if(outcome.n_failed)


def _score_command(outcome: Outcome, explainer: str, options: LlmOptions, root: Path, draws: int) -> str:
    """Return the command that scores what was explained, with a judge that can read it."""
    from autointerp.explaining.explainers import EXPLAINERS
    from autointerp.journal.method import BASELINE
    from autointerp.scoring.judges import JUDGES

    words = [word for name in outcome.explained for word in ("--sae", name)]
    if explainer != BASELINE and not EXPLAINERS[explainer].asks_model:
        for name in JUDGES:
            with suppress(BadInput):  # skip a judge whose file cannot be imported
                if not JUDGES[name].asks_model and JUDGES[name].reads in (None, explainer):
                    words += ["--judge", name]
                    break
    words += ["--draws", str(draws)] if draws > 1 else []
    return command(root, "score", *words, *options.list_words())


@takes_groups
def score(
    *,
    sae: opt.ScoredSaes = None,
    scorer: opt.Scorers = None,
    judge: opt.Judges = None,
    draws: opt.ScoredDraws = 1,
    replicates: opt.Replicates = 1,
    temperature: opt.Temperature = None,
    control_latents: opt.ControlLatents = None,
    control_sae_latents: opt.ScoredControlSaeLatents = None,
    server: Server,
    judge_server: JudgeServer,
    protocol: opt.Protocol = "auto",
    contexts_per_request: opt.ContextsPerRequest = None,
    ci_half_width: opt.CiHalfWidth = None,
    precision: opt.ScorePrecision = None,
    max_contexts: opt.MaxContexts = None,
    spending: Spending,
    output: Output,
) -> None:
    """Score explanations: a judge reads only the explanation and predicts in which contexts the latent fires.

    Computes balanced accuracy and AUROC with 95 % intervals, also for another latent's explanation: the score of a
    meaningless one.

    \b
    python cli.py score --sae run_a
    python cli.py score --sae run_a --ci-half-width 0.065 --max-contexts 200
    """
    from autointerp.report.stages import cost_page, outcome_page
    from autointerp.report.terminal import print_page
    from autointerp.scoring.adaptive import StoppingRule

    if temperature is not None and replicates == 1:
        raise BadInput("--temperature is of further replicates; give --replicates too, such as --replicates 2")
    asking: dict[str, Any] = {"protocol": protocol, "contexts_per_request": contexts_per_request}
    options = llm_options(server, judge_server, spending, **asking, temperature=temperature)
    half_width = precision if ci_half_width is None else ci_half_width
    if max_contexts is not None and half_width is None:
        raise BadInput("--max-contexts needs --ci-half-width too, such as --ci-half-width 0.065")
    rule = None if half_width is None else StoppingRule(half_width, max_contexts)
    runs = open_runs(sae, output.root) if sae else None
    scorers = tuple(scorer or ("detection",))
    asked = (runs, output.root, scorers, tuple(judge or ("auto",)), options)
    rest: dict[str, Any] = {"control_latents": control_latents, "rule": rule}
    rest |= {"control_sae_latents": control_sae_latents, "draws": draws, "replicates": replicates}
    if spending.dry_run:
        from autointerp.scoring.dry_run import forecast_score

        forecast = forecast_score(*asked, spending.prices(), **rest)
        finish(output.as_json, "score", forecast.as_dict, lambda: print_page(cost_page(forecast.as_dict())))
        return
    from autointerp.scoring.score import score_runs

    outcome = score_runs(*asked, **rest)
    finish(output.as_json, "score", outcome.as_dict, lambda: print_page(outcome_page(outcome.as_dict(), "score")))
    exit_if(outcome.n_failed)
