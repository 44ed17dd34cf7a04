"""The commands train, harvest, align, sweep, import and export."""

from __future__ import annotations

from autointerp.command_line import options as opt
from autointerp.command_line.ending import exit_if, finish, finish_with_runs, open_runs
from autointerp.command_line.options import (
    JudgeServer,
    Machine,
    Output,
    Server,
    Skipping,
    Text,
    llm_options,
    takes_groups,
)
from autointerp.command_line.values import absolute, amount, new_file
from sae.common.errors import BadInput

SAE_FORMATS = ("sparsify", "saelens", "dictionary_learning")


@takes_groups
def train(
    *,
    name: opt.Name = "run",
    seeds: opt.Seeds = None,
    recipe: opt.Recipe = None,
    model: opt.Model = None,
    hookpoint: opt.Hookpoints = None,
    target: opt.Target = None,
    skip: opt.Skip = None,
    dtype: opt.Dtype = None,
    text: Text,
    skipping: Skipping,
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
    """Train SAEs that differ only in their seed, on the same activations of a language model.

    \b
    python cli.py train --name run --seeds 0 1 2 --text corpus.txt \\
        --model EleutherAI/pythia-160m --hookpoint layers.6.mlp \\
        --num-latents 4096 --k 32 --tokens 50M

    Run it again with more --seeds to add SAEs to an existing study, which keeps its settings. On several GPUs:

    \b
    torchrun --nproc-per-node 2 cli.py train …
    """
    from sae.study.controls import find_controls
    from sae.study.recipes import settings_from
    from sae.study.run import make_studies, name_studies, study_runs
    from sae.study.tracking import Tracker
    from sae.study.train import train_studies

    existing = next((runs for of in name_studies(name, hookpoint or []) if (runs := study_runs(of, output.root))), [])
    own_seeds = [run.seed for run in existing if run.seed is not None]
    settings = settings_from(
        recipe,
        existing[0].settings if existing else None,
        subject={"model": absolute(model) if model else None, "dtype": dtype, "target": target},
        corpus=text.settings(),
        skip=skipping.settings(),
        training={
            "architecture": architecture,
            "precision": precision,
            "skip": skip or None,
            "num_latents": num_latents,
            "k": k,
            "tokens": amount("--tokens", tokens),
            "batch_tokens": amount("--batch-tokens", batch_tokens),
            "learning_rate": learning_rate,
            "activation_cache": amount("--activation-cache", activation_cache, least=0),
        },
    )
    studies = make_studies(name, settings, hookpoint or [], seeds or own_seeds or [0, 1, 2])
    tracker = None if wandb is None else Tracker(wandb)
    trained = train_studies(studies, output.root, machine.compute(), parallel, tracker, controls)
    found = [run for of_study in trained for run in of_study]
    control_runs = [control for of_study in trained for control in find_controls(of_study[0]).values()]
    finish_with_runs(output.as_json, "train", [*found, *control_runs], output.root)


@takes_groups
def harvest(*, sae: opt.Saes = None, tokens: opt.HarvestTokens = None, machine: Machine, output: Output) -> None:
    """Record which latents fire on which tokens, for all seeds in one pass over the subject model.

    A later harvest with more --tokens adds to the recorded ones. Also records which tokens each latent promotes and
    suppresses, if the hookpoint writes into the residual stream.

    \b
    python cli.py harvest --sae run_a --sae run_b --tokens 10M
    """
    from sae.common.launch import rank
    from sae.study.harvest import harvest_runs
    from sae.study.logits import ensure_logits

    runs = open_runs(sae, output.root, whole_study=True)
    harvest_runs(runs, machine.compute(), tokens=amount("--tokens", tokens))
    if rank() == 0:
        ensure_logits(runs, machine.compute())
    finish_with_runs(output.as_json, "harvest", runs, output.root)


@takes_groups
def align(
    *,
    names: opt.RunNames = None,
    definition: opt.Shared = "strict",
    threshold: opt.Threshold = 0.7,
    nulls: opt.Nulls = True,
    force: opt.ForceAlign = False,
    machine: Machine,
    output: Output,
) -> None:
    """Match the latents of every pair of runs one to one, by encoder and by decoder, and report which are shared.

    Also reports the chance level, which latents fire together, and what became of latents that do not return (split,
    absorbed, part of a wider one, or rebuilt from several). --definition and --threshold only change the report.

    \b
    python cli.py align run_a run_b run_c
    """
    from autointerp.findings.evidence import Study, View
    from autointerp.findings.json_values import to_json
    from autointerp.findings.returning import alignment_findings
    from autointerp.report.sharing import alignment_page
    from autointerp.report.terminal import print_page
    from sae.study.align import align_runs

    runs = open_runs(names, output.root, whole_study=True)
    align_runs(runs, machine.compute(), nulls, force)
    view = View(definition=definition, threshold=threshold)
    found = alignment_findings(Study.open(output.root, [run.name for run in runs], view))
    finish(output.as_json, "align", lambda: to_json(found), lambda: print_page(alignment_page(found)))


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
    """Train a study for every point of a grid (width, k, tokens, architecture, hookpoint) on the same activations.

    Run it again to resume, or to show the table of a finished sweep.

    \b
    python cli.py sweep widths
    """
    from autointerp.command_line.sweeping import forecast, run_sweep, scoring_of, sweep_findings
    from autointerp.findings.json_values import to_json
    from autointerp.report.sweep import forecast_page, sweep_page
    from autointerp.report.terminal import print_page
    from sae.study.recipes import read_sweep

    swept = read_sweep(recipe, name, seeds or ())
    scoring = scoring_of(swept, score, explainer, llm_options(server, judge_server), judge)
    if dry_run:
        expected = forecast(swept, output.root, machine.compute())
        finish(output.as_json, "sweep", lambda: expected, lambda: print_page(forecast_page(expected)))
        return
    summary, failed = run_sweep(swept, output.root, machine.compute(), scoring, nulls)
    found = sweep_findings(summary)
    finish(output.as_json, "sweep", lambda: to_json(found), lambda: print_page(sweep_page(found)))
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
    target: opt.Target = None,
    dtype: opt.Dtype = None,
    text: Text,
    skipping: Skipping,
    machine: Machine,
    output: Output,
) -> None:
    """Import an SAE of sparsify, SAELens or dictionary_learning as a run of a study.

    \b
    python cli.py import --from EleutherAI/sae-pythia-70m-32k/layers.3.mlp \\
        --name theirs --study pythia --model EleutherAI/pythia-70m \\
        --hookpoint layers.3.mlp --text corpus.txt

    Later imports into the study reuse its model, hookpoint and text. Continue with align, explain and score.
    """
    from sae.study.importing import import_sae, import_settings

    subject = {"model": absolute(model) if model else None, "hookpoint": hookpoint, "target": target, "dtype": dtype}
    tables = {"subject": subject, "corpus": text.settings(), "skip": skipping.settings()}
    settings = import_settings(study, output.root, recipe, **tables)
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
    """Export a run's SAE, one of its tables, or its explanations for Neuronpedia.

    SAE: --format sparsify (TopK only), saelens or dictionary_learning, and --to a folder. Table: --format csv, parquet
    or neuronpedia (explanations in the form of its exports), and --to a file.

    \b
    python cli.py export --sae run_a --table scores --format csv --to scores.csv
    python cli.py export --sae run_a --format saelens --to exported
    """
    runs = open_runs(sae, output.root)
    if table is None and format_ in SAE_FORMATS:
        from sae.study.importing import export_sae

        if len(runs) > 1:
            raise BadInput(f"--format {format_} exports the SAE of one run; give --sae once")
        saved = export_sae(runs[0], format_, to)
        finish(output.as_json, "export", lambda: saved, lambda: None)
        return
    from autointerp.report.export import check_request, export_neuronpedia, export_table
    from autointerp.report.neuronpedia import Ids
    from autointerp.report.stages import exported_line

    name = check_request(format_, table, runs)
    to = new_file("--to", to)
    if format_ == "neuronpedia":
        written = export_neuronpedia(runs[0], to, Ids.of(runs[0], model_id, source_id, author_id))
    else:
        written = export_table(runs, name, format_, to)
    finish(output.as_json, "export", lambda: written, lambda: print(exported_line(written)))
