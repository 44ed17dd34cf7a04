"""The commands that make and match dictionaries: train, harvest, align, sweep, import, export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autointerp.command_line import options as opt
from autointerp.command_line.ending import exit_if, finish
from autointerp.command_line.groups import JudgeServer, Machine, Output, Server, Text, llm_options, takes_groups
from autointerp.command_line.options import Definition, OtherFormat
from autointerp.command_line.shared import finish_with_runs, opened
from autointerp.command_line.values import absolute, amount, new_file
from sae.common.errors import BadInput

if TYPE_CHECKING:
    from sae.study.tracking import Tracker


@takes_groups
def train(
    *,
    name: opt.Name = "run",
    seeds: opt.Seeds = None,
    recipe: opt.Recipe = None,
    model: opt.Model = None,
    hookpoint: opt.Hookpoints = None,
    dtype: opt.Dtype = None,
    text: Text,
    architecture: opt.Architecture = None,
    precision: opt.TrainPrecision = None,
    num_latents: opt.NumLatents = None,
    k: opt.K = None,
    tokens: opt.TrainTokens = None,
    batch_tokens: opt.BatchTokens = None,
    learning_rate: opt.LearningRate = None,
    activation_cache: opt.ActivationCache = None,
    parallel: opt.Parallel = None,
    controls: opt.Controls = True,
    wandb: opt.Wandb = None,
    machine: Machine,
    output: Output,
) -> None:
    """Train SAEs that differ in their seed alone, on one stream of a language model's activations.

    \b
    python cli.py train --name run --seeds 0 1 2 --text corpus.txt \\
        --model EleutherAI/pythia-160m --hookpoint layers.6.mlp \\
        --num-latents 4096 --k 32 --tokens 50M

    --seeds may grow later: the seeds that exist are not touched, and what is not said is as the study has it. On
    several GPUs or machines:

    \b
    torchrun --nproc-per-node 2 cli.py train …
    """
    from sae.study.controls import find_controls
    from sae.study.recipes import settings_from
    from sae.study.run import make_studies, name_studies, study_runs
    from sae.study.train import train_studies

    there = next((runs for of in name_studies(name, hookpoint or []) if (runs := study_runs(of, output.root))), [])
    own_seeds = [run.seed for run in there if run.seed is not None]
    settings = settings_from(
        recipe,
        there[0].settings if there else None,
        subject={"model": absolute(model) if model else None, "dtype": dtype},
        corpus=text.settings(),
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
    studies = make_studies(name, settings, hookpoint or [], seeds or own_seeds or [0, 1, 2])
    trained = train_studies(studies, output.root, machine.compute(), parallel, _tracker(wandb), controls)
    found = [run for of_study in trained for run in of_study]
    beside = [control for of_study in trained for control in find_controls(of_study[0]).values()]
    finish_with_runs(output.as_json, "train", [*found, *beside], output.root)


@takes_groups
def harvest(*, sae: opt.Saes = None, tokens: opt.HarvestTokens = None, machine: Machine, output: Output) -> None:
    """Record which latent fires where, for all seeds in one pass over the subject model.

    Runs of one study are harvested together. --tokens may grow later: what is recorded is kept.

    \b
    python cli.py harvest --sae run_a --sae run_b --tokens 10M
    """
    from sae.study.harvest import harvest_runs

    runs = opened(sae, output.root, whole_study=True)
    harvest_runs(runs, machine.compute(), tokens=amount("--tokens", tokens))
    finish_with_runs(output.as_json, "harvest", runs, output.root)


@takes_groups
def align(
    *,
    names: opt.RunNames = None,
    definition: opt.Shared = Definition.strict,
    threshold: opt.Threshold = 0.7,
    nulls: opt.Nulls = True,
    force: opt.ForceAlign = False,
    machine: Machine,
    output: Output,
) -> None:
    """Match the latents of every pair of runs one to one, exactly, by encoder and by decoder; say what is shared.

    Beside it: what chance alone would share, where the latents of both fire together, and what became of those that
    do not return (split, absorbed, part of a wider one, or rebuilt from several).

    The files hold cosines: --definition and --threshold change what is printed, and nothing is matched again.

    \b
    python cli.py align run_a run_b run_c
    """
    from autointerp.findings.returning import alignment_findings
    from autointerp.report.rendering import render_alignment
    from sae.study.align import align_runs, read_comparison

    runs = opened(names, output.root, whole_study=True)
    align_runs(runs, machine.compute(), nulls, force)
    found = alignment_findings(read_comparison(runs, threshold), definition.value)
    finish(output.as_json, "align", lambda: found, lambda: render_alignment(found))


@takes_groups
def sweep(
    *,
    recipe: opt.SweepRecipe,
    name: opt.SweepName = None,
    seeds: opt.SweepSeeds = None,
    score: opt.SweepScore = None,
    explainer: opt.Explainer = "auto",
    server: Server,
    judge: opt.SweepJudge = None,
    judge_server: JudgeServer,
    nulls: opt.Nulls = True,
    dry_run: opt.SweepDryRun = False,
    machine: Machine,
    output: Output,
) -> None:
    """A study for every point of a grid: width, k, training tokens, architecture, hookpoint; all on one stream.

    Stopped, it goes on where it was; finished, it shows its table at once.

    \b
    python cli.py sweep widths
    """
    from autointerp.command_line.sweeping import forecast, run_sweep, scoring_of, sweep_findings
    from autointerp.report.rendering import render_forecast, render_sweep
    from sae.study.sweep import read_sweep

    swept = read_sweep(recipe, name, seeds or ())
    scoring = scoring_of(swept, score, explainer, llm_options(server, judge_server), judge)
    if dry_run:
        expected = forecast(swept, output.root, machine.compute())
        finish(output.as_json, "sweep", lambda: expected, lambda: render_forecast(expected))
        return
    summary, failed = run_sweep(swept, output.root, machine.compute(), scoring, nulls)
    found = sweep_findings(summary)
    finish(output.as_json, "sweep", lambda: found, lambda: render_sweep(found))
    exit_if(failed)


@takes_groups
def import_(
    *,
    source: opt.ImportedFrom,
    name: opt.ImportedName,
    study: opt.ImportedStudy,
    recipe: opt.Recipe = None,
    model: opt.Model = None,
    hookpoint: opt.Hookpoint = None,
    dtype: opt.Dtype = None,
    text: Text,
    machine: Machine,
    output: Output,
) -> None:
    """Take in an SAE that somebody else trained (sparsify, SAELens, dictionary_learning), as a run of a study.

    \b
    python cli.py import --from EleutherAI/sae-pythia-70m-32k/layers.3.mlp \\
        --name theirs --study pythia --model EleutherAI/pythia-70m \\
        --hookpoint layers.3.mlp --text corpus.txt

    A second import into the study takes model, hookpoint and text from the first. Then align, explain and score.
    """
    from sae.study.importing import import_sae, import_settings

    subject = {"model": absolute(model) if model else None, "hookpoint": hookpoint, "dtype": dtype}
    settings = import_settings(study, output.root, recipe, subject=subject, corpus=text.settings())
    run = import_sae(source, name, study, settings, output.root, machine.compute())
    finish_with_runs(output.as_json, "import", [run], output.root)


@takes_groups
def export(
    *,
    to: opt.ExportTo,
    format_: opt.ExportFormat,
    table: opt.ExportedTable = None,
    sae: opt.ExportedSaes = None,
    model_id: opt.ModelId = None,
    source_id: opt.SourceId = None,
    author_id: opt.AuthorId = None,
    output: Output,
) -> None:
    """Write what other programs open: a run's SAE, any of its tables, or its explanations for Neuronpedia.

    The SAE: --format sparsify (TopK only), saelens or dictionary_learning, --to a folder.

    A table: --format csv or parquet, --to a file; --format neuronpedia writes explanations as its exports have them.

    \b
    python cli.py export --sae run_a --table scores --format csv --to scores.csv
    python cli.py export --sae run_a --format saelens --to exported
    """
    runs = opened(sae, output.root)
    if table is None and format_ in _OF_SAES:
        from sae.study.importing import export_sae

        if len(runs) > 1:
            raise BadInput(f"--format {format_.value} writes one run's SAE; give --sae once")
        saved = export_sae(runs[0], format_.value, to)
        finish(output.as_json, "export", lambda: saved, lambda: None)
        return
    from autointerp.report.export.export import check_request, export_neuronpedia, export_table
    from autointerp.report.export.neuronpedia import Ids
    from autointerp.report.rendering import render_exported

    name = check_request(format_.value, table, runs)
    to = new_file("--to", to)
    if format_ == OtherFormat.neuronpedia:
        written = export_neuronpedia(runs[0], to, Ids.of(runs[0], model_id, source_id, author_id))
    else:
        written = export_table(runs, name, format_.value, to)
    finish(output.as_json, "export", lambda: written, lambda: render_exported(written))


_OF_SAES = (OtherFormat.sparsify, OtherFormat.saelens, OtherFormat.dictionary_learning)


def _tracker(project: str | None) -> Tracker | None:
    from sae.study.tracking import Tracker

    return None if project is None else Tracker(project)
