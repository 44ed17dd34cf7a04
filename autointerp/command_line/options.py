"""The options of the commands, each a type with its flag and its help: a flag means the same wherever it stands."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from autointerp.command_line.values import known
from autointerp.explaining.explainers import EXPLAINERS
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.scorers import SCORERS
from sae.dictionaries.architectures import ARCHITECTURES


class OtherFormat(enum.StrEnum):
    """A format that another program opens: three of SAEs, three of tables."""

    sparsify = "sparsify"
    saelens = "saelens"
    dictionary_learning = "dictionary_learning"
    csv = "csv"
    parquet = "parquet"
    neuronpedia = "neuronpedia"


class PairOrder(enum.StrEnum):
    """By what pairs of latents are ordered (see :mod:`autointerp.findings.pair`)."""

    similarity = "similarity"
    score = "score"
    gap = "gap"
    firing = "firing"


class Definition(enum.StrEnum):
    """What counts as shared (see :data:`sae.alignment.overlap.DEFINITIONS`)."""

    strict = "strict"
    both = "both"
    decoder = "decoder"
    lenient = "lenient"


# --- every command -----------------------------------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of tables.")]
Root = Annotated[Path, typer.Option("--root", help="The folder that holds all runs.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads for torch. Default: all cores.")]
Saes = Annotated[
    list[str] | None, typer.Option("--sae", help="A run, such as run_a. Default: the newest study's first.")
]
OneSae = Annotated[str | None, typer.Option("--sae", help="The run. Default: the newest study's first.")]

# --- train, harvest, align ---------------------------------------------------------------------------------------

Name = Annotated[str, typer.Option("--name", help="The study's name; its runs become NAME_a, NAME_b, …")]
Seeds = Annotated[
    list[int] | None, typer.Option("--seeds", help="One SAE per seed, all on the same batches. Default: 0 1 2.")
]
Nulls = Annotated[
    bool,
    typer.Option(
        "--nulls/--no-nulls",
        help="Also match each SAE with its sibling rotated at random, and compare firings moved along the text, to "
        "show the chance level. Doubles the work.",
    ),
]
ForceAlign = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Also align runs of different studies or hookpoints, whose differences are not the seed's alone.",
    ),
]
Parallel = Annotated[
    str | None,
    typer.Option(
        "--parallel",
        help="Under torchrun, what the ranks split: seeds, or the data of every step. "
        "Default: seeds where there are as many as ranks.",
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option("--recipe", help="A TOML file of settings, or a bundled one: demo. Flags override it."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Hugging Face name or directory. Default: bundled, the model in this package."),
]
Hookpoint = Annotated[
    str | None, typer.Option("--hookpoint", help="The module whose output is studied. Default: layers.2.mlp.")
]
Hookpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--hookpoint",
        help="The module whose output is studied. Several, in one pass over the model, become a study each: "
        "NAME-layers.2.mlp and so on. Default: layers.2.mlp.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Precision of the subject's forward pass: float32, bfloat16, float16, or auto (bfloat16 where the machine "
        "has instructions for it, else float32; a study keeps what it began with). Default: auto.",
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Text files, or folders of them. Default: the sources of Python's library."),
]
Dataset = Annotated[
    str | None,
    typer.Option("--dataset", help="A `datasets` directory or hub name (with --split, --column, --config)."),
]
Split = Annotated[str | None, typer.Option("--split", help="The dataset's split. Default: train.")]
Column = Annotated[
    str | None, typer.Option("--column", help="The dataset's column that holds the text. Default: text.")
]
Configuration = Annotated[
    str | None, typer.Option("--config", help="The dataset's configuration, where it has several.")
]
Context = Annotated[int | None, typer.Option("--context", help="Tokens in a packed sequence. Default: 256.")]
Architecture = Annotated[
    str | None, typer.Option("--architecture", help=f"{ARCHITECTURES.join_names()}. Default: topk.")
]
TrainPrecision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="Of the product that chooses latents: float32, bfloat16, int8 (CPUs), or auto (the fewest bits that "
        "the machine has instructions for). Activations, gradients and weights are float32 in any case. Default: auto.",
    ),
]
NumLatents = Annotated[int | None, typer.Option("--num-latents", "-M", help="Width of the dictionary. Default: 1024.")]
K = Annotated[int | None, typer.Option("--k", "-k", help="Active latents per token. Default: 8.")]
TrainTokens = Annotated[str | None, typer.Option("--tokens", help="Tokens to train on. Default: 10M.")]
BatchTokens = Annotated[str | None, typer.Option("--batch-tokens", help="Tokens in a step. Default: 4096.")]
LearningRate = Annotated[
    float | None,
    typer.Option("--learning-rate", "--lr", help="Adam's peak rate. Default: 2e-4 / sqrt(width / 16384)."),
]
ActivationCache = Annotated[
    str | None,
    typer.Option(
        "--activation-cache", help="Bytes of activations kept on disk until the harvest. Default: 8G; 0: none."
    ),
]
Controls = Annotated[
    bool,
    typer.Option(
        "--controls/--no-controls",
        help="Also train what scores are held against: an SAE whose random decoder is never trained (NAME-frozen_a), "
        "about as long as one more seed, and one that is not trained at all (NAME-untrained_a).",
    ),
]
Wandb = Annotated[
    str | None, typer.Option("--wandb", metavar="PROJECT", help="Also log to this project of Weights & Biases.")
]
HarvestTokens = Annotated[str | None, typer.Option("--tokens", help="How many tokens to record. Default: 2M.")]
RunNames = Annotated[list[str] | None, typer.Argument(metavar="RUN RUN…", help="Default: the newest study's runs.")]

# --- import, export ----------------------------------------------------------------------------------------------

ImportedFrom = Annotated[
    str,
    typer.Option("--from", help="The folder of an SAE, or its name on the hub: OWNER/REPOSITORY[@REVISION][/FOLDER]."),
]
ImportedName = Annotated[str, typer.Option("--name", help="The run that it becomes.")]
ImportedStudy = Annotated[str, typer.Option("--study", help="The study that the run joins, new or not.")]
ExportTo = Annotated[
    Path, typer.Option("--to", help="The folder to write, new or empty; of a table the file (.gz: compressed).")
]
ExportFormat = Annotated[
    OtherFormat,
    typer.Option(
        "--format", help="Of an SAE: sparsify, saelens, dictionary_learning. Of a table: csv, parquet, neuronpedia."
    ),
]
ExportedSaes = Annotated[
    list[str] | None,
    typer.Option(
        "--sae",
        help="The run. Default: the newest study's first. Several, for tables of pairs: the first against the others.",
    ),
]
ExportedTable = Annotated[
    str | None,
    typer.Option(
        "--table",
        metavar="NAME",
        help="latents, explanations, scores, verdicts, pairs, findings, …; a wrong name lists all.",
    ),
]
ModelId = Annotated[
    str | None, typer.Option("--model-id", help="neuronpedia: its id of the model. Default: the model's name.")
]
SourceId = Annotated[
    str | None, typer.Option("--source-id", help="neuronpedia: its id of the SAE. Default: LAYER-RUN, such as 6-run_a.")
]
AuthorId = Annotated[
    str | None, typer.Option("--author-id", help="neuronpedia: the author's id there. Default: that of its own tools.")
]

# --- what counts as shared ---------------------------------------------------------------------------------------

Shared = Annotated[Definition, typer.Option("--definition", help="What counts as shared.")]
Threshold = Annotated[float, typer.Option("--threshold", min=0, max=1, help="Cosine above which a latent is shared.")]
Against = Annotated[list[str] | None, typer.Option("--against", help="The other runs that count. Default: all.")]

# --- explain, score ----------------------------------------------------------------------------------------------

UnsharedOnly = Annotated[bool, typer.Option("--unshared-only", help="Only latents found in no other run of the study.")]
SharedOnly = Annotated[bool, typer.Option("--shared-only", help="Only latents found in some other run.")]
Latents = Annotated[
    int,
    typer.Option(
        "--latents",
        min=1,
        help="Explain a sample of so many, stratified by similarity and firing frequency; its figures are weighted to "
        "stand for all eligible latents. More later keep those that there are.",
    ),
]
Indices = Annotated[str | None, typer.Option("--indices", help="These latents: 3,17,40-60.")]
WithPartners = Annotated[bool, typer.Option("--with-partners", help="Also each latent's partner in the sibling run.")]
Explainer = Annotated[
    str,
    typer.Option(
        "--explainer",
        callback=known(EXPLAINERS, "auto"),
        help=f"{EXPLAINERS.join_names('auto')}. auto: llm where a language model is given, else ngram, the baseline.",
    ),
]
ScoredSaes = Annotated[
    list[str] | None,
    typer.Option("--sae", help="A run. Default: every stored explanation that has no score yet, in all runs."),
]
Scorers = Annotated[
    list[str] | None,
    typer.Option(
        "--scorer", callback=known(SCORERS), help=f"{SCORERS.join_names()}; may be repeated. Default: detection."
    ),
]
Judge = Annotated[
    str,
    typer.Option(
        "--judge",
        callback=known(JUDGES, "auto"),
        help=f"{JUDGES.join_names('auto')}. auto: llm where a language model is given, else ngram, the baseline.",
    ),
]
SweepJudge = Annotated[
    str | None,
    typer.Option(
        "--judge",
        callback=known(JUDGES, "auto"),
        help=f"{JUDGES.join_names('auto')}. Default: called as the explainer, else auto.",
    ),
]
ControlLatents = Annotated[
    int | None,
    typer.Option(
        "--control-latents",
        min=0,
        help="Latents also judged by a dissimilar latent's explanation. Default: all, or 50 where a model is asked.",
    ),
]
ControlSaeLatents = Annotated[
    int | None,
    typer.Option(
        "--control-sae-latents",
        min=0,
        help="Also explain so many latents of each control SAE of the study (one with a frozen random decoder, one "
        "that is not trained; `train` makes them), for `score` to compare with; 0: none. Default: as many as of the "
        "run, at most 200, or 50 where a model is asked (half as many requests again for 200 latents); none with "
        "--indices.",
    ),
]
ScoredControlSaeLatents = Annotated[
    int | None,
    typer.Option(
        "--control-sae-latents",
        min=0,
        help="Score at most so many latents of each control SAE; 0: none. Default: all that `explain` explained there "
        "(llm: two fifths as many requests again for 200 latents and two times 50).",
    ),
]
LlmUrl = Annotated[
    list[str] | None,
    typer.Option(
        "--llm-url",
        help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1. Several of one model share the load.",
    ),
]
LlmModel = Annotated[
    str | None,
    typer.Option("--llm-model", help="The model there. Default: the only one it serves. With --vllm: what to call it."),
]
JudgeUrl = Annotated[list[str] | None, typer.Option("--judge-url", help="Other endpoints for the judge.")]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="Another model for the judge.")]
Vllm = Annotated[
    str | None,
    typer.Option(
        "--vllm",
        metavar="MODEL",
        help="Start a vLLM server for this command, on this machine alone, and stop it at the end: a model's folder, a "
        "Hugging Face name, or 'bundled'. It starts with the first question that is not answered yet. Its log is in "
        "ROOT/logs. In a checkout `make vllm` installs vLLM.",
    ),
]
JudgeVllm = Annotated[
    str | None,
    typer.Option(
        "--judge-vllm",
        metavar="MODEL",
        help="The same for the judge. With the model of --vllm one server serves both.",
    ),
]
VllmPython = Annotated[
    Path | None,
    typer.Option(
        "--vllm-python",
        help="The Python that has vLLM. Default: $AUTOINTERP_VLLM_PYTHON, else that of `make vllm`, else this one.",
    ),
]
VllmArgs = Annotated[
    str,
    typer.Option(
        "--vllm-args", help="Further arguments of the vLLM server, in quotes: --vllm-args '--max-model-len 4096'."
    ),
]
VllmTimeout = Annotated[float, typer.Option("--vllm-timeout", help="Seconds until the vLLM server has to be ready.")]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="A file that holds the key. Default: $AUTOINTERP_API_KEY or $OPENAI_API_KEY."),
]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="Requests in flight at once.")]
Rate = Annotated[float | None, typer.Option("--requests-per-second", help="At most so many requests a second.")]
TokenRate = Annotated[
    float | None,
    typer.Option("--tokens-per-minute", help="At most so many tokens a minute, of prompts and answers together."),
]
Protocol = Annotated[
    str,
    typer.Option(
        "--protocol",
        help="How the judge is asked: batch (several contexts a request), single (one, with log-probabilities), auto.",
    ),
]
ContextsPerRequest = Annotated[
    int | None,
    typer.Option(
        "--contexts-per-request",
        min=1,
        max=50,
        help="Of the batch protocol, which this asks for. Default: 5. More cost fewer prompt tokens, and ask more of "
        "the model in one answer.",
    ),
]
CiHalfWidth = Annotated[
    float | None,
    typer.Option(
        "--ci-half-width",
        help="Judge each explanation in rounds until the 95 % interval of its balanced accuracy is ± this wide, for "
        "example 0.065. Default: judge every context of the test set.",
    ),
]
ScorePrecision = Annotated[float | None, typer.Option("--precision", hidden=True, help="Old name of --ci-half-width.")]
MaxContexts = Annotated[
    int | None,
    typer.Option(
        "--max-contexts",
        help="With --ci-half-width: judge at most this many contexts of each latent. Default: the test set's size.",
    ),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say what it would cost: requests, tokens, time and price. Asks nothing.")
]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="Stop cleanly before this is overdrawn: tokens (2M) or dollars ('$5', with prices)."),
]
PriceIn = Annotated[float | None, typer.Option("--price-in", help="Dollars for a million prompt tokens.")]
PriceCached = Annotated[
    float | None,
    typer.Option("--price-cached", help="The same, for those that the server has cached. Default: --price-in."),
]
PriceOut = Annotated[float | None, typer.Option("--price-out", help="Dollars for a million written tokens.")]

# --- sweep -----------------------------------------------------------------------------------------------------------

SweepRecipe = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A TOML file with a [sweep] table, or a bundled one: architectures, ks, pythia-160m, tokens or widths.",
    ),
]
SweepName = Annotated[
    str | None, typer.Option("--name", help="What its studies are called after. Default: the recipe's file name.")
]
SweepSeeds = Annotated[list[int] | None, typer.Option("--seeds", help="Seeds of every point. Default: the recipe's.")]
SweepScore = Annotated[
    bool | None,
    typer.Option(
        "--score/--no-score",
        help="Also explain and score latents of every point. Default: where the recipe has an [explain] table.",
    ),
]
SweepDryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only list the points, their tokens, and how long training would take by a few timed steps."
    ),
]

# --- report, show ------------------------------------------------------------------------------------------------

ReportedSae = Annotated[
    str | None,
    typer.Option("--sae", help="The run in the middle of the report. Default: the newest study's first."),
]
ShownExplainer = Annotated[
    str | None,
    typer.Option(
        "--explainer",
        metavar="NAME",
        help="Show the newest scores of explanations by this explainer: llm, ngram, … Default: the newest of all, any "
        "other before the n-gram baseline.",
    ),
]
Html = Annotated[
    bool, typer.Option("--html", help="Write it as one HTML file, ROOT/reports/RUN.html, and print its path and size.")
]
HtmlTo = Annotated[Path | None, typer.Option("--to", help="Where the HTML file goes instead.")]
LatentNumber = Annotated[int, typer.Option("--latent", help="The latent's number.")]
ShownContexts = Annotated[int, typer.Option("--contexts", min=1, help="Contexts to show.")]

# --- runs --------------------------------------------------------------------------------------------------------

DeletedName = Annotated[
    str | None,
    typer.Option(
        "--delete",
        metavar="NAME",
        help="Delete a run, or a whole study with its controls; their alignments and HTML reports go too.",
    ),
]
Prune = Annotated[
    bool,
    typer.Option(
        "--prune",
        help="Delete what no run uses any more: corpora, kept activations, alignments and HTML reports. "
        "Never language models' answers.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Delete without asking.")]
ListOnly = Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted, with sizes.")]

# --- compare -----------------------------------------------------------------------------------------------------

ComparedNames = Annotated[list[str] | None, typer.Argument(metavar="RUN RUN", help="The two runs.")]
ComparedSaes = Annotated[list[str] | None, typer.Option("--sae", help="The same: a run; given twice, for two.")]
ShownPairs = Annotated[int, typer.Option("--latents", min=1, help="Pairs to show; --json has all.")]
SortPairs = Annotated[
    PairOrder | None,
    typer.Option("--sort", help="Show the first by this. Default: spread from the most alike to the least alike."),
]
SharedPairs = Annotated[bool, typer.Option("--shared-only", help="Show only pairs that are shared.")]
UnsharedPairs = Annotated[bool, typer.Option("--unshared-only", help="Show only pairs that are not shared.")]
