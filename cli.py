"""The commands: parse, call one function, render. Nothing is imported before it is needed, so `--help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from autointerp.command_line import options as opt
from autointerp.command_line.ending import INTERRUPTED, end, exit_if, finish, one_line_errors
from autointerp.command_line.options import ROOT, Definition
from autointerp.command_line.values import absolute, amount, spread_lists
from autointerp.command_line.values import indices as latent_numbers
from sae import launch
from sae.errors import BadInput

if TYPE_CHECKING:
    from sae.run import Run
    from sae.stage import Compute
    from sae.tracking import Tracker

app = typer.Typer(
    name="autointerp",
    help=(
        "Which latents of a sparse autoencoder come back when it is trained again, and can anyone say what they mean?"
        "\n\n"
        "Begin with `demo`. On your own model: `train`, then `explain`, `score`, `report`; a command that needs an "
        "earlier stage runs it and says so. Every command can be killed and run again: it goes on where it stopped.\n\n"
        "Exit codes: 0 done; 1 error; 2 wrong usage; 3 finished, but some latents failed (the report says which)."
    ),
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


# --- demo ------------------------------------------------------------------------------------------------------


@app.command()
def demo(root: opt.Root = ROOT, threads: opt.Threads = None, as_json: opt.Json = False) -> None:
    """The whole study, offline, on the bundled subject model. Run again, it shows its report at once.

    Trains three TopK SAEs on one stream of activations of a small language model of Python source, aligns their
    latents, explains and scores a few hundred with the n-gram baseline (which needs no model), and reports.
    """
    from autointerp.demo import run_demo

    runs, failed = run_demo(root, _compute("cpu", threads))
    _report(runs[0], runs, as_json)
    exit_if(failed)


# --- train, harvest, align ---------------------------------------------------------------------------------------


@app.command()
def train(
    name: opt.Name = "run",
    seeds: opt.Seeds = None,
    recipe: opt.Recipe = None,
    model: opt.Model = None,
    hookpoint: opt.Hookpoints = None,
    text: opt.Texts = None,
    dataset: opt.Dataset = None,
    split: opt.Split = None,
    column: opt.Column = None,
    config: opt.Configuration = None,
    context: opt.Context = None,
    architecture: opt.Architecture = None,
    precision: opt.TrainPrecision = None,
    num_latents: opt.NumLatents = None,
    k: opt.K = None,
    tokens: opt.TrainTokens = None,
    batch_tokens: opt.BatchTokens = None,
    learning_rate: opt.LearningRate = None,
    activation_cache: opt.ActivationCache = None,
    root: opt.Root = ROOT,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    threads: opt.Threads = None,
    parallel: opt.Parallel = None,
    controls: opt.Controls = True,
    wandb: opt.Wandb = None,
    as_json: opt.Json = False,
) -> None:
    """Train SAEs that differ in their seed alone, on one stream of a language model's activations.

    Example: python cli.py train --name run --seeds 0 1 2 --model EleutherAI/pythia-160m --hookpoint layers.6.mlp
    --text corpus.txt --num-latents 4096 --k 32 --tokens 50M

    --seeds may grow later: the seeds that exist are not touched. On several GPUs or machines:
    torchrun --nproc-per-node 2 cli.py train …
    """
    from sae.settings import settings_from
    from sae.train_stage import studies_of, train_studies

    settings = settings_from(
        recipe,
        **_subject_and_corpus(model, None, dtype, text, dataset, split, column, config, context),
        training={
            "architecture": architecture,
            "precision": precision,
            "num_latents": num_latents,
            "k": k,
            "tokens": amount("--tokens", tokens),
            "batch_tokens": amount("--batch-tokens", batch_tokens),
            "learning_rate": learning_rate,
            "activation_cache": amount("--activation-cache", activation_cache, least=0),
        },
    )
    studies = studies_of(name, settings, hookpoint or [], seeds or [0, 1, 2])
    tracker = _tracker(wandb)
    trained = train_studies(studies, root, _compute(device, threads), parallel, tracker, controls)
    runs = [run for of_study in trained for run in of_study]
    finish(as_json, "train", lambda: _runs_object(runs), lambda: _print_runs(runs))


@app.command()
def harvest(
    sae: opt.Saes = None,
    tokens: opt.HarvestTokens = None,
    root: opt.Root = ROOT,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Record which latent fires where, for all seeds in one pass over the subject model."""
    from sae.harvest_stage import harvest_runs

    runs = _opened(sae, root, whole_study=True)
    harvest_runs(runs, _compute(device, threads), tokens=amount("--tokens", tokens))
    finish(as_json, "harvest", lambda: _runs_object(runs), lambda: _print_runs(runs))


@app.command()
def align(
    names: opt.RunNames = None,
    definition: opt.Shared = Definition.strict,
    threshold: opt.Threshold = 0.7,
    nulls: opt.Nulls = True,
    force: opt.ForceAlign = False,
    root: opt.Root = ROOT,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Match the latents of every pair of runs one to one, exactly, by encoder and by decoder; say what is shared.

    Beside it: what chance alone would share, where the latents of both fire together, and what became of those that
    do not return (split, absorbed, part of a wider one, or rebuilt from several).

    The files hold cosines: --definition and --threshold change what is printed, and nothing is matched again.

    Example: python cli.py align run_a run_b run_c
    """
    from autointerp.report import alignment_findings, render_alignment
    from sae.align_stage import align_runs, compared_of

    runs = _opened(names, root, whole_study=True)
    align_runs(runs, _compute(device, threads), nulls, force)
    found = alignment_findings(compared_of(runs, threshold), definition.value)
    finish(as_json, "align", lambda: found, lambda: render_alignment(found))


@app.command()
def sweep(
    recipe: opt.SweepRecipe,
    name: opt.SweepName = None,
    seeds: opt.SweepSeeds = None,
    score: opt.SweepScore = None,
    explainer: opt.Explainer = "auto",
    judge: opt.SweepJudge = None,
    llm_url: opt.LlmUrl = None,
    llm_model: opt.LlmModel = None,
    judge_url: opt.JudgeUrl = None,
    judge_model: opt.JudgeModel = None,
    vllm: opt.Vllm = None,
    judge_vllm: opt.JudgeVllm = None,
    vllm_python: opt.VllmPython = None,
    vllm_args: opt.VllmArgs = "",
    vllm_timeout: opt.VllmTimeout = 1800.0,
    api_key_file: opt.KeyFile = None,
    concurrency: opt.Concurrency = 32,
    nulls: opt.Nulls = True,
    dry_run: opt.SweepDryRun = False,
    root: opt.Root = ROOT,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """A study for every point of a grid: width, k, training tokens, architecture, hookpoint; all on one stream.

    Stopped, it goes on where it was; finished, it shows its table at once.

    Example: python cli.py sweep eval_runs/recipes/widths.toml
    """
    from autointerp.backends import LlmOptions
    from autointerp.report import render_forecast, render_sweep
    from autointerp.sweep import forecast, run_sweep, scoring_of, sweep_findings
    from sae.sweep import read_sweep

    swept = read_sweep(recipe, name, seeds or ())
    options = LlmOptions(
        url=tuple(llm_url or ()),
        model=llm_model,
        judge_url=tuple(judge_url or ()),
        judge_model=judge_model,
        api_key_file=api_key_file,
        concurrency=concurrency,
        vllm=vllm,
        judge_vllm=judge_vllm,
        vllm_python=vllm_python,
        vllm_args=vllm_args,
        vllm_timeout=vllm_timeout,
    )
    scoring = scoring_of(swept, score, explainer, options, judge)
    if dry_run:
        expected = forecast(swept, root, _compute(device, threads))
        finish(as_json, "sweep", lambda: expected, lambda: render_forecast(expected))
        return
    summary, failed = run_sweep(swept, root, _compute(device, threads), scoring, nulls)
    found = sweep_findings(summary)
    finish(as_json, "sweep", lambda: found, lambda: render_sweep(found))
    exit_if(failed)


# --- import, export ----------------------------------------------------------------------------------------------


@app.command("import")
def import_(
    source: opt.ImportedFrom,
    name: opt.ImportedName,
    study: opt.ImportedStudy,
    recipe: opt.Recipe = None,
    model: opt.Model = None,
    hookpoint: opt.Hookpoint = None,
    text: opt.Texts = None,
    dataset: opt.Dataset = None,
    split: opt.Split = None,
    column: opt.Column = None,
    config: opt.Configuration = None,
    context: opt.Context = None,
    root: opt.Root = ROOT,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Take in an SAE that somebody else trained (sparsify, SAELens, dictionary_learning), as a run of a study.

    Example: python cli.py import --from EleutherAI/sae-pythia-70m-32k/layers.3.mlp --name theirs --study pythia
    --model EleutherAI/pythia-70m --hookpoint layers.3.mlp --text corpus.txt

    A second import into the study takes model, hookpoint and text from the first. Then align, explain and score.
    """
    from sae.importing import import_sae, import_settings

    given = _subject_and_corpus(model, hookpoint, dtype, text, dataset, split, column, config, context)
    settings = import_settings(study, root, recipe, **given)
    run = import_sae(source, name, study, settings, root, _compute(device, threads))
    finish(as_json, "import", lambda: _runs_object([run]), lambda: _print_runs([run]))


@app.command()
def export(
    to: opt.ExportTo,
    format_: opt.ExportFormat,
    sae: opt.OneSae = None,
    root: opt.Root = ROOT,
    as_json: opt.Json = False,
) -> None:
    """Write a run's SAE so that another program opens it: sparsify (TopK only), saelens or dictionary_learning."""
    from sae.importing import export_sae

    (run,) = _opened([sae] if sae else None, root)
    written = export_sae(run, format_.value, to)
    finish(as_json, "export", lambda: written, lambda: None)


# --- explain, score ----------------------------------------------------------------------------------------------


@app.command()
def explain(
    sae: opt.Saes = None,
    unshared_only: opt.UnsharedOnly = False,
    shared_only: opt.SharedOnly = False,
    against: opt.Against = None,
    definition: opt.Shared = Definition.strict,
    threshold: opt.Threshold = 0.7,
    latents: opt.Latents = 200,
    indices: opt.Indices = None,
    with_partners: opt.WithPartners = False,
    control_sae_latents: opt.ControlSaeLatents = None,
    explainer: opt.Explainer = "auto",
    llm_url: opt.LlmUrl = None,
    llm_model: opt.LlmModel = None,
    vllm: opt.Vllm = None,
    vllm_python: opt.VllmPython = None,
    vllm_args: opt.VllmArgs = "",
    vllm_timeout: opt.VllmTimeout = 1800.0,
    api_key_file: opt.KeyFile = None,
    concurrency: opt.Concurrency = 32,
    requests_per_second: opt.Rate = None,
    tokens_per_minute: opt.TokenRate = None,
    dry_run: opt.DryRun = False,
    budget: opt.Budget = None,
    price_in: opt.PriceIn = None,
    price_cached: opt.PriceCached = None,
    price_out: opt.PriceOut = None,
    root: opt.Root = ROOT,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Say in one sentence what makes a latent fire, from contexts in which it does.

    Example: python cli.py explain --sae run_a --unshared-only --latents 300

    By a language model: --llm-url names a server that runs, --vllm starts one:
    python cli.py explain --sae run_a --vllm Qwen/Qwen2.5-7B-Instruct --vllm-args '--max-model-len 8192'
    """
    from autointerp.backends import LlmOptions
    from autointerp.cost import parse_budget, prices_of
    from autointerp.explain import explain_runs
    from autointerp.selection import Choice

    if unshared_only and shared_only:
        raise BadInput("--unshared-only and --shared-only exclude each other; give one of them")
    choice = Choice(
        sharing="unshared" if unshared_only else "shared" if shared_only else "any",
        n=latents,
        indices=latent_numbers(indices),
        against=tuple(against or ()),
        definition=definition.value,
        threshold=threshold,
        with_partners=with_partners,
    )
    prices = prices_of(price_in, price_cached, price_out)
    options = LlmOptions(
        url=tuple(llm_url or ()),
        model=llm_model,
        api_key_file=api_key_file,
        concurrency=concurrency,
        requests_per_second=requests_per_second,
        vllm=vllm,
        vllm_python=vllm_python,
        vllm_args=vllm_args,
        vllm_timeout=vllm_timeout,
        tokens_per_minute=tokens_per_minute,
        budget=parse_budget(budget, prices),
    )
    runs = _opened(sae, root)
    if dry_run:
        from autointerp.dry_run import forecast_explain

        forecast = forecast_explain(runs, choice, explainer, options, prices, control_sae_latents)
        finish(as_json, "explain", forecast.as_dict, forecast.render)
        return
    outcome = explain_runs(runs, choice, explainer, options, _compute(device, threads), control_sae_latents)
    finish(as_json, "explain", outcome.as_dict, outcome.render)
    exit_if(outcome.n_failed)


@app.command()
def score(
    sae: opt.ScoredSaes = None,
    scorer: opt.Scorers = None,
    judge: opt.Judge = "auto",
    control_latents: opt.ControlLatents = None,
    control_sae_latents: opt.ScoredControlSaeLatents = None,
    llm_url: opt.LlmUrl = None,
    llm_model: opt.LlmModel = None,
    judge_url: opt.JudgeUrl = None,
    judge_model: opt.JudgeModel = None,
    vllm: opt.Vllm = None,
    judge_vllm: opt.JudgeVllm = None,
    vllm_python: opt.VllmPython = None,
    vllm_args: opt.VllmArgs = "",
    vllm_timeout: opt.VllmTimeout = 1800.0,
    api_key_file: opt.KeyFile = None,
    concurrency: opt.Concurrency = 32,
    requests_per_second: opt.Rate = None,
    tokens_per_minute: opt.TokenRate = None,
    protocol: opt.Protocol = "auto",
    contexts_per_request: opt.ContextsPerRequest = None,
    precision: opt.Precision = None,
    max_contexts: opt.MaxContexts = None,
    dry_run: opt.DryRun = False,
    budget: opt.Budget = None,
    price_in: opt.PriceIn = None,
    price_cached: opt.PriceCached = None,
    price_out: opt.PriceOut = None,
    root: opt.Root = ROOT,
    as_json: opt.Json = False,
) -> None:
    """Test explanations: a judge reads only the explanation and says in which contexts the latent fires.

    Balanced accuracy and AUROC with 95 % intervals, and the same with explanations swapped between dissimilar latents,
    which says what a meaningless explanation would have scored.

    Example: python cli.py score --sae run_a --precision 0.065 --max-contexts 200
    """
    from autointerp.adaptive import Precision
    from autointerp.backends import LlmOptions
    from autointerp.cost import parse_budget, prices_of
    from autointerp.score import score_runs

    prices = prices_of(price_in, price_cached, price_out)
    options = LlmOptions(
        url=tuple(llm_url or ()),
        model=llm_model,
        judge_url=tuple(judge_url or ()),
        judge_model=judge_model,
        api_key_file=api_key_file,
        concurrency=concurrency,
        requests_per_second=requests_per_second,
        tokens_per_minute=tokens_per_minute,
        protocol=protocol,
        vllm=vllm,
        judge_vllm=judge_vllm,
        vllm_python=vllm_python,
        vllm_args=vllm_args,
        vllm_timeout=vllm_timeout,
        contexts_per_request=contexts_per_request,
        budget=parse_budget(budget, prices),
    )
    if max_contexts is not None and precision is None:
        raise BadInput("--max-contexts bounds adaptive scoring; give --precision too, such as --precision 0.065")
    rule = None if precision is None else Precision(precision, max_contexts)
    runs = _opened(sae, root) if sae else None
    if dry_run:
        from autointerp.dry_run import forecast_score

        names = tuple(scorer or ("detection",))
        forecast = forecast_score(runs, root, names, judge, options, prices, control_latents, rule, control_sae_latents)
        finish(as_json, "score", forecast.as_dict, forecast.render)
        return
    scorers = tuple(scorer or ("detection",))
    outcome = score_runs(runs, root, scorers, judge, options, control_latents, rule, control_sae_latents)
    finish(as_json, "score", outcome.as_dict, outcome.render)
    exit_if(outcome.n_failed)


# --- report, show, runs --------------------------------------------------------------------------------------------


@app.command()
def report(
    sae: opt.ReportedSae = None,
    definition: opt.Shared = Definition.strict,
    threshold: opt.Threshold = 0.7,
    against: opt.Against = None,
    html: opt.Html = False,
    to: opt.HtmlTo = None,
    root: opt.Root = ROOT,
    as_json: opt.Json = False,
) -> None:
    """What is shared between the seeds, what the latents mean, how well that can be told, and how the two relate.

    With --html as one file that any browser opens without a network: figures, and every latent to look at.
    """
    from sae.run import study_runs

    run = _opened([sae] if sae else None, root)[0]
    if html or to:
        from autointerp.report import render_written
        from autointerp.report.html import write_report

        written = write_report(
            run,
            study_runs(run.study, root),
            to,
            definition=definition.value,
            threshold=threshold,
            against=against or (),
        )
        finish(as_json, "report", written.as_dict, lambda: render_written(written))
        return
    _report(run, study_runs(run.study, root), as_json, definition.value, threshold, against or ())


@app.command()
def show(
    latent: opt.LatentNumber,
    sae: opt.OneSae = None,
    contexts: opt.ShownContexts = 8,
    root: opt.Root = ROOT,
    as_json: opt.Json = False,
) -> None:
    """One latent: contexts highlighted, explanation, scores, its match in each sibling run."""
    from autointerp.report import latent_findings, render_latent

    run = _opened([sae] if sae else None, root)[0]
    found = latent_findings(run, latent, n_contexts=contexts)
    finish(as_json, "show", lambda: found, lambda: render_latent(found))


@app.command()
def runs(root: opt.Root = ROOT, as_json: opt.Json = False) -> None:
    """What runs there are, and how far each has come."""
    from sae.run import all_runs

    found = all_runs(root)
    finish(as_json, "runs", lambda: _runs_object(found), lambda: _print_runs(found))


# --- shared by the commands ------------------------------------------------------------------------------------------


def _subject_and_corpus(
    model: str | None,
    hookpoint: str | None,
    dtype: str | None,
    text: list[str] | None,
    dataset: str | None,
    split: str | None,
    column: str | None,
    config: str | None,
    context: int | None,
) -> dict[str, dict[str, Any]]:
    """What the options say of the subject model and the text, as tables of settings."""
    if text and dataset:
        raise BadInput("--text and --dataset both name the corpus; give one of them")
    corpus: dict[str, Any] = {"context": context, "split": split, "column": column, "config": config}
    if text:
        corpus |= {"kind": "text", "source": tuple(absolute(t) for t in text)}
    if dataset:
        corpus |= {"kind": "dataset", "source": (absolute(dataset),)}
    subject = {"model": absolute(model) if model else None, "hookpoint": hookpoint, "dtype": dtype}
    return {"subject": subject, "corpus": corpus}


def _tracker(project: str | None) -> Tracker | None:
    from sae.tracking import Tracker

    return None if project is None else Tracker(project)


def _compute(device: str, threads: int | None) -> Compute:
    from sae.stage import Compute

    return Compute(device, threads)


def _opened(names: list[str] | None, root: Path, whole_study: bool = False) -> list[Run]:
    from sae.run import Run, newest_study

    if names:
        return [Run.open(name, root) for name in dict.fromkeys(names)]
    study = newest_study(root)
    return study if whole_study else study[:1]


def _report(
    run: Run,
    study: list[Run],
    as_json: bool,
    definition: str = "strict",
    threshold: float = 0.7,
    against: Sequence[str] = (),
) -> None:
    from autointerp.report import findings_of, render_report

    found = findings_of(run, study, definition=definition, threshold=threshold, against=against)
    finish(as_json, "report", lambda: found, lambda: render_report(found))


def _runs_object(found: list[Run]) -> dict[str, Any]:
    from sae.run import progress_of

    return {"runs": [progress_of(run) for run in found]}


def _print_runs(found: list[Run]) -> None:
    from autointerp.report import render_runs
    from sae.run import progress_of

    render_runs([progress_of(run) for run in found])


def main() -> None:
    arguments = sys.argv[1:] or ["--help"]
    with one_line_errors("--json" in arguments):
        if launch.launched() and arguments[0] not in ("train", "harvest"):
            raise BadInput(f"torchrun is for `train` and `harvest`; run `python cli.py {arguments[0]}` without it")
        prog_name = "python cli.py" if sys.argv[0].endswith("cli.py") else None
        code = app(args=spread_lists(arguments), prog_name=prog_name, standalone_mode=False)
    if code == INTERRUPTED:
        end(code, "\ninterrupted; what is finished is kept, and the same command goes on from there")
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
