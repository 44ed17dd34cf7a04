"""The flags of the commands, each a type with its help. ``{training.k}`` stands for that setting's default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from autointerp.command_line.values import known
from autointerp.explaining.explainers import EXPLAINERS
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.scorers import SCORERS
from sae.dictionaries.architectures import ARCHITECTURES

OtherFormat = Literal["sparsify", "saelens", "dictionary_learning", "csv", "parquet", "neuronpedia"]
PairOrder = Literal["similarity", "score", "gap", "firing"]
Definition = Literal["strict", "both", "decoder", "lenient"]

# --- several commands --------------------------------------------------------------------------------------------

Threads = Annotated[int | None, Option("--threads", help="CPU threads for torch. Default: all cores.")]
Saes = Annotated[list[str] | None, Option("--sae", help="A run, such as run_a. Default: the newest study's first.")]
OneSae = Annotated[str | None, Option("--sae", help="The run. Default: the newest study's first.")]
Nulls = Annotated[
    bool, Option("--nulls/--no-nulls", help="Also measure the chance level (sibling rotated, firings shifted).")
]
Recipe = Annotated[
    Path | None, Option("--recipe", help="TOML file of settings, or a bundled one: demo. Flags override it.")
]
Model = Annotated[
    str | None,
    Option("--model", help="Hugging Face name or folder. Default: {subject.model}, the model in this package."),
]
Dtype = Annotated[
    str | None,
    Option(
        "--dtype",
        help="Precision of the subject model: float32, bfloat16, float16, or auto (bfloat16 if the machine has "
        "instructions for it, else float32). Default: {subject.dtype}.",
    ),
]
Shared = Annotated[Definition, Option("--definition", help="Definition of a shared latent.")]
Threshold = Annotated[float, Option("--threshold", min=0, max=1, help="Cosine above which latents are shared.")]
Against = Annotated[list[str] | None, Option("--against", help="Runs to compare with. Default: all of the study.")]
Explainer = Annotated[
    str,
    Option(
        "--explainer",
        callback=known(EXPLAINERS, "auto"),
        help=f"{EXPLAINERS.join_names('auto')}. auto: llm if a language model is given, else ngram, the baseline.",
    ),
]
ShownExplainer = Annotated[
    str | None,
    Option(
        "--explainer",
        metavar="NAME",
        help="Show the newest scores of this explainer: llm, ngram, … Default: any other before ngram.",
    ),
]

# --- train, harvest, align ---------------------------------------------------------------------------------------

Name = Annotated[str, Option("--name", help="Name of the study; its runs become NAME_a, NAME_b, …")]
Seeds = Annotated[list[int] | None, Option("--seeds", help="Seeds: one SAE each, on the same batches. Default: 0 1 2.")]
ForceAlign = Annotated[
    bool, Option("--force", help="Also align runs of different studies or hookpoints, which differ in more than seed.")
]
Parallel = Annotated[
    str | None,
    Option(
        "--parallel",
        help="Split seeds or data (each step's tokens) over the ranks of torchrun. "
        "Default: seeds if there are at least as many as ranks.",
    ),
]
Hookpoint = Annotated[
    str | None, Option("--hookpoint", help="Module whose output is studied. Default: {subject.hookpoint}.")
]
Hookpoints = Annotated[
    list[str] | None,
    Option(
        "--hookpoint",
        help="Module whose output is studied; several become one study each, in one pass over the model. "
        "Default: {subject.hookpoint}.",
    ),
]
Architecture = Annotated[
    str | None, Option("--architecture", help=f"{ARCHITECTURES.join_names()}. Default: {{training.architecture}}.")
]
TrainPrecision = Annotated[
    str | None,
    Option(
        "--precision",
        help="Precision of the product that chooses latents: float32, bfloat16, int8 (CPU only), or auto "
        "(the fewest bits that the machine has instructions for). Default: {training.precision}.",
    ),
]
NumLatents = Annotated[
    int | None, Option("--num-latents", "-M", help="Latents of each SAE. Default: {training.num_latents}.")
]
K = Annotated[int | None, Option("--k", "-k", help="Active latents per token. Default: {training.k}.")]
TrainTokens = Annotated[str | None, Option("--tokens", help="Tokens to train on. Default: {training.tokens}.")]
BatchTokens = Annotated[str | None, Option("--batch-tokens", help="Tokens per step. Default: {training.batch_tokens}.")]
LearningRate = Annotated[
    float | None,
    Option("--learning-rate", "--lr", help="Peak rate. Default: 2e-4 / sqrt(num-latents / 16384)."),
]
ActivationCache = Annotated[
    str | None,
    Option(
        "--activation-cache",
        help="Bytes of activations to keep on disk until the harvest; 0 keeps none. "
        "Default: {training.activation_cache}.",
    ),
]
Controls = Annotated[
    bool,
    Option(
        "--controls/--no-controls",
        help="Also train two controls for the scores: an SAE with a frozen random decoder (about as long as one "
        "more seed) and an untrained one.",
    ),
]
Wandb = Annotated[str | None, Option("--wandb", metavar="PROJECT", help="Weights & Biases project to also log to.")]
HarvestTokens = Annotated[str | None, Option("--tokens", help="Tokens to record. Default: {harvest.tokens}.")]
RunNames = Annotated[list[str] | None, Argument(metavar="RUN RUN…", help="Default: the newest study's runs.")]

# --- import, export ----------------------------------------------------------------------------------------------

ImportedFrom = Annotated[
    str, Option("--from", help="Folder of an SAE, or its name on the hub: OWNER/REPOSITORY[@REVISION][/FOLDER].")
]
ImportedName = Annotated[str, Option("--name", help="Name of the new run.")]
ImportedStudy = Annotated[str, Option("--study", help="Study that the run joins, existing or new.")]
ExportTo = Annotated[
    Path, Option("--to", help="Folder (new or empty) for an SAE, file for a table; .gz compresses the file.")
]
ExportFormat = Annotated[
    OtherFormat,
    Option("--format", help="SAE: sparsify, saelens, dictionary_learning. Table: csv, parquet, neuronpedia."),
]
ExportedSaes = Annotated[
    list[str] | None,
    Option(
        "--sae",
        help="The run; for tables of pairs several, the first against the others. Default: the newest study's first.",
    ),
]
ExportedTable = Annotated[
    str | None,
    Option(
        "--table",
        metavar="NAME",
        help="latents, explanations, scores, verdicts, pairs, findings, …; a wrong name lists all.",
    ),
]
ModelId = Annotated[str | None, Option("--model-id", help="Neuronpedia's id of the model. Default: the model's name.")]
SourceId = Annotated[
    str | None, Option("--source-id", help="Neuronpedia's id of the SAE. Default: LAYER-RUN, such as 6-run_a.")
]
AuthorId = Annotated[
    str | None, Option("--author-id", help="Neuronpedia's id of the author. Default: that of its own tools.")
]

# --- explain, score ----------------------------------------------------------------------------------------------

UnsharedOnly = Annotated[bool, Option("--unshared-only", help="Explain only latents found in no other run.")]
SharedOnly = Annotated[bool, Option("--shared-only", help="Explain only latents found in at least one other run.")]
Latents = Annotated[
    int,
    Option(
        "--latents",
        min=1,
        help="Latents to explain, sampled by similarity and firing frequency and weighted to represent all eligible "
        "ones. Asking for more later keeps the latents already drawn.",
    ),
]
Indices = Annotated[str | None, Option("--indices", help="Explain exactly these latents: 3,17,40-60.")]
WithPartners = Annotated[bool, Option("--with-partners", help="Also explain each latent's partner in the other run.")]
ControlSaeLatents = Annotated[
    int | None,
    Option(
        "--control-sae-latents",
        min=0,
        help="Latents to explain in each control SAE, for `score` to compare with; 0 explains none. "
        "Default: the number explained in the run, up to 200 (50 with a language model); none with --indices.",
    ),
]
ScoredSaes = Annotated[
    list[str] | None, Option("--sae", help="A run. Default: all runs with explanations that have no score yet.")
]
Scorers = Annotated[
    list[str] | None,
    Option("--scorer", callback=known(SCORERS), help=f"{SCORERS.join_names()}; may be repeated. Default: detection."),
]
Judge = Annotated[
    str,
    Option(
        "--judge",
        callback=known(JUDGES, "auto"),
        help=f"{JUDGES.join_names('auto')}. auto: llm if a language model is given, else ngram, the baseline.",
    ),
]
ControlLatents = Annotated[
    int | None,
    Option(
        "--control-latents",
        min=0,
        help="Latents also judged with another latent's explanation. Default: all, or 50 with a language model.",
    ),
]
ScoredControlSaeLatents = Annotated[
    int | None,
    Option(
        "--control-sae-latents",
        min=0,
        help="Latents to score in each control SAE, at most; 0 scores none. Default: all that `explain` explained.",
    ),
]
Protocol = Annotated[
    str,
    Option(
        "--protocol",
        help="Form of the judge's requests: batch (several contexts), single (one context, read by "
        "log-probabilities) or auto.",
    ),
]
ContextsPerRequest = Annotated[
    int | None,
    Option(
        "--contexts-per-request",
        min=1,
        max=50,
        help="Contexts per request of the batch protocol. More save prompt tokens but make each answer harder. "
        "Default: 5.",
    ),
]
CiHalfWidth = Annotated[
    float | None,
    Option(
        "--ci-half-width",
        help="Judge in rounds until the 95 % interval of balanced accuracy is ± this wide, such as 0.065. "
        "Default: judge the whole test set.",
    ),
]
ScorePrecision = Annotated[float | None, Option("--precision", hidden=True, help="Old name of --ci-half-width.")]
MaxContexts = Annotated[
    int | None,
    Option("--max-contexts", help="Contexts per latent, at most, with --ci-half-width. Default: the test set's size."),
]

# --- sweep -------------------------------------------------------------------------------------------------------

SweepRecipe = Annotated[
    Path,
    Argument(
        metavar="RECIPE",
        help="TOML file with a [sweep] table, or a bundled one: architectures, ks, pythia-160m, tokens or widths.",
    ),
]
SweepName = Annotated[str | None, Option("--name", help="Prefix of its studies' names. Default: the recipe's name.")]
SweepSeeds = Annotated[list[int] | None, Option("--seeds", help="Seeds of every point. Default: the recipe's.")]
SweepScore = Annotated[
    bool | None,
    Option("--score/--no-score", help="Explain and score every point. Default: if the recipe has an [explain] table."),
]
SweepJudge = Annotated[
    str | None,
    Option(
        "--judge",
        callback=known(JUDGES, "auto"),
        help=f"{JUDGES.join_names('auto')}. Default: the judge with the explainer's name, else auto.",
    ),
]
SweepDryRun = Annotated[
    bool, Option("--dry-run", help="List the points and estimate training times from a few steps. Trains nothing.")
]

# --- report, show, compare, runs ---------------------------------------------------------------------------------

ReportedSae = Annotated[str | None, Option("--sae", help="Focus run of the report. Default: the newest study's first.")]
Html = Annotated[bool, Option("--html", help="Write one HTML file, ROOT/reports/RUN.html; print its path and size.")]
Full = Annotated[bool, Option("--full", help="Show every section and table, not only the main ones.")]
HtmlTo = Annotated[Path | None, Option("--to", help="Path of the HTML file. Default: ROOT/reports/RUN.html.")]
LatentNumber = Annotated[int, Option("--latent", help="Index of the latent.")]
ShownContexts = Annotated[int, Option("--contexts", min=1, help="Contexts to show.")]
ComparedNames = Annotated[list[str] | None, Argument(metavar="RUN RUN", help="The two runs.")]
ComparedSaes = Annotated[list[str] | None, Option("--sae", help="One of the two runs; give it twice.")]
ShownPairs = Annotated[int, Option("--latents", min=1, help="Pairs to show; --json has all.")]
SortPairs = Annotated[
    PairOrder | None, Option("--sort", help="Order of the pairs. Default: spread from the most to the least similar.")
]
SharedPairs = Annotated[bool, Option("--shared-only", help="Show only shared pairs.")]
UnsharedPairs = Annotated[bool, Option("--unshared-only", help="Show only unshared pairs.")]
DeletedName = Annotated[
    str | None,
    Option(
        "--delete",
        metavar="NAME",
        help="Delete a run, or a study with its controls, and their alignments and HTML reports.",
    ),
]
Prune = Annotated[
    bool,
    Option(
        "--prune",
        help="Delete corpora, cached activations, alignments and HTML reports that no run uses. "
        "Keeps all answers of language models.",
    ),
]
Yes = Annotated[bool, Option("--yes", help="Delete without asking.")]
ListOnly = Annotated[bool, Option("--dry-run", help="List the files that would be deleted, with sizes. Deletes none.")]
