"""The flags of the commands, each a type with its help, and groups of them that a command takes as one parameter.

A flag is named after its parameter, and ``{training.k}`` in a help text stands for that setting's default.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from typer import Argument, Option
from typer.core import TyperCommand

from autointerp.command_line.values import UsageError, absolute, check_value, check_words, hide_secrets, known
from autointerp.explaining.explainers import EXPLAINERS
from autointerp.llm.options import LlmOptions
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.scorers import SCORERS
from sae.common.commands import DEFAULT_ROOT, replace_program_name
from sae.common.errors import BadInput
from sae.dictionaries.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from autointerp.llm.limits import Prices
    from sae.study.stage import Compute

OtherFormat = Literal["sparsify", "saelens", "dictionary_learning", "csv", "parquet", "neuronpedia"]
PairOrder = Literal["similarity", "score", "gap", "firing"]
Definition = Literal["strict", "both", "decoder", "lenient"]
_AUTO = "auto: llm if a language model is given, else ngram, the baseline."

# --- flags of several commands ------------------------------------------------------------------------------------

Threads = Annotated[int | None, Option(help="CPU threads for torch. Default: all cores.")]
Saes = Annotated[list[str] | None, Option(help="A run, such as run_a. Default: the newest study's first.")]
OneSae = Annotated[str | None, Option(help="The run. Default: the newest study's first.")]
CheckedSaes = Annotated[list[str] | None, Option(help="A run, such as run_a. Default: all runs under --root.")]
Nulls = Annotated[
    bool, Option("--nulls/--no-nulls", help="Also measure the chance level (sibling rotated, firings shifted).")
]
Recipe = Annotated[Path | None, Option(help="TOML file of settings, or a bundled one: demo. Flags override it.")]
Model = Annotated[
    str | None, Option(help="Hugging Face name or folder. Default: {subject.model}, the model in this package.")
]
Dtype = Annotated[
    str | None,
    Option(
        help="Precision of the subject model: float32, bfloat16, float16, or auto (bfloat16 if the machine has "
        "instructions for it, else float32). Default: {subject.dtype}."
    ),
]
Shared = Annotated[Definition, Option(help="Definition of a shared latent.")]
Threshold = Annotated[float, Option(min=0, max=1, help="Cosine above which latents are shared.")]
Against = Annotated[list[str] | None, Option(help="Runs to compare with. Default: all of the study.")]
Explainer = Annotated[
    str,
    Option(callback=known(EXPLAINERS, "auto"), help=f"{EXPLAINERS.join_names('auto')}. {_AUTO}"),
]
ShownExplainer = Annotated[
    str | None,
    Option(
        metavar="NAME",
        callback=lambda name: name and EXPLAINERS.spell(name),
        help="Explainer whose newest scores are shown: llm, ngram, … Default: others before ngram.",
    ),
]


# --- groups


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameters of ``command`` that are groups by the options that are their fields.

    Typer reads flags from the signature, so the new one lists every field. Examples in the help start the program
    as the user started it.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    spread: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            types = get_type_hints(hints[name], include_extras=True)
            spread += [
                inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name])
                for f in fields(hints[name])
            ]
        else:
            spread.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def with_groups(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    with_groups.__doc__ = replace_program_name(command.__doc__ or "")
    with_groups.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    return with_groups


class Command(TyperCommand):
    """A command that checks its values, and whose help reads defaults from the settings only if it is shown."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        check_words(args)
        try:
            rest = super().parse_args(ctx, list(args))
        except UsageError as error:
            error.message = hide_secrets(error.message, args)
            raise
        for parameter in self.params:
            check_value(max(parameter.opts, key=len), parameter.name or "", ctx.params.get(parameter.name))
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            if text := getattr(parameter, "help", None):
                parameter.help = re.sub(r"\{(\w+)\.(\w+)\}", lambda found: _default(*found.groups()), text)  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)


def _default(table: str, name: str) -> str:
    from sae.common.amounts import human
    from sae.settings import Settings

    value = getattr(getattr(Settings(), table), name)
    return human(value) if isinstance(value, int) and value >= 10**5 else str(value)


@dataclass(frozen=True)
class Output:
    """Options of every command."""

    root: Annotated[Path, Option(help="Folder that holds all runs.")] = DEFAULT_ROOT
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of tables.")] = False


@dataclass(frozen=True)
class Machine:
    """Options of the commands that run a model."""

    device: Annotated[str, Option(help="cpu, cuda, cuda:1, …; auto uses a GPU if there is one.")] = "auto"
    threads: Threads = None
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run Python code that comes with the subject model; read it first.")
    ] = False

    def compute(self) -> Compute:
        from sae.study.stage import Compute

        return Compute(self.device, self.threads, self.trust_remote_code)


@dataclass(frozen=True)
class Text:
    """The text that the subject model reads."""

    text: Annotated[
        list[str] | None, Option(help="Text files or folders. Default: the sources of Python's library.")
    ] = None
    dataset: Annotated[
        list[str] | None,
        Option(help="Folder, data file or hub name of a Hugging Face dataset; several are interleaved."),
    ] = None
    weights: Annotated[
        list[float] | None, Option(help="Share of the documents of each of several datasets. Default: equal shares.")
    ] = None
    split: Annotated[str | None, Option(help="Split of the dataset. Default: {corpus.split}.")] = None
    column: Annotated[
        list[str] | None,
        Option(
            help="Column of the dataset: text, chat messages or token ids. Default: {corpus.column}. "
            "For several datasets one for all or one each."
        ),
    ] = None
    shuffle_buffer: Annotated[
        int | None, Option(help="Shuffle the dataset through a buffer of this many documents, seeded.")
    ] = None
    shuffle_seed: Annotated[int | None, Option(help="Seed of --shuffle-buffer. Default: {corpus.shuffle_seed}.")] = None
    end_token: Annotated[
        bool | None, Option("--end-token/--no-end-token", help="End-of-text token after each document, or none.")
    ] = None
    config: Annotated[str | None, Option(help="Configuration of the dataset, if it has several.")] = None
    context: Annotated[int | None, Option(help="Tokens in a packed sequence. Default: {corpus.context}.")] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings' table ``corpus``, with ``None`` for each value not given."""
        if self.text and self.dataset:
            raise BadInput("--text and --dataset both name the corpus; give one of them")
        given = ("context", "split", "config", "shuffle_buffer", "shuffle_seed", "end_token")
        corpus: dict[str, Any] = {name: getattr(self, name) for name in given}
        if self.column:
            corpus |= {"column": self.column[0], "columns": tuple(self.column) if self.column[1:] else ()}
        if self.weights:
            corpus["weights"] = tuple(self.weights)
        if self.text:
            corpus |= {"kind": "text", "source": tuple(absolute(t) for t in self.text)}
        if self.dataset:
            corpus |= {"kind": "dataset", "source": tuple(absolute(name) for name in self.dataset)}
        return corpus


@dataclass(frozen=True)
class Skipping:
    """Tokens that no dictionary sees, from training to contexts; a study's runs share them."""

    skip_positions: Annotated[
        int | None,
        Option(
            min=0,
            help="Tokens at the start of each sequence that are not trained on or harvested, such as 1 for the "
            "attention sink of GPT-2, Llama or Qwen. Default: {skip.positions}.",
        ),
    ] = None
    max_norm: Annotated[
        float | None,
        Option(help="Skip tokens whose activation has a norm over this many times the median. Default: no limit."),
    ] = None
    exclude_tokens: Annotated[
        list[str] | None, Option(help="Skip these tokens: bos, eos, an id, or text that is one token. Default: none.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings' table ``skip``, with ``None`` for each value not given."""
        tokens = None if self.exclude_tokens is None else tuple(self.exclude_tokens)
        return {"positions": self.skip_positions, "max_norm": self.max_norm, "tokens": tokens}


@dataclass(frozen=True)
class Server:
    """The language model and how it is reached."""

    llm_url: Annotated[
        list[str] | None,
        Option(help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; several serve one model together."),
    ] = None
    llm_model: Annotated[
        str | None, Option(help="Model name. Default: the only one served; with --vllm, its own name.")
    ] = None
    llm_body: Annotated[
        str | None,
        Option(
            metavar="JSON",
            help='Object merged into every request: {"reasoning_effort": "none"}. null removes a parameter.',
        ),
    ] = None
    llm_header: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=VALUE",
            help="Header of every request, such as 'api-key=$AZURE_KEY', read from the environment; may be repeated. "
            "Its value is never stored or shown.",
        ),
    ] = None
    vllm: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            help="Start a local vLLM server for this command: a model folder, a Hugging Face name, or 'bundled'. "
            "`make vllm` installs vLLM in a checkout; logs go to ROOT/logs.",
        ),
    ] = None
    vllm_python: Annotated[
        Path | None,
        Option(help="Python that has vLLM. Default: $AUTOINTERP_VLLM_PYTHON, else that of `make vllm`, else this one."),
    ] = None
    vllm_args: Annotated[
        str, Option(help="Arguments of the vLLM server, in quotes: --vllm-args '--max-model-len 4096'.")
    ] = ""
    vllm_timeout: Annotated[float, Option(help="Seconds to wait for the vLLM server.")] = LlmOptions.vllm_timeout
    api_key_file: Annotated[
        Path | None, Option(help="File with the API key. Default: $AUTOINTERP_API_KEY or $OPENAI_API_KEY.")
    ] = None
    concurrency: Annotated[int, Option(min=1, help="Requests in flight at once.")] = LlmOptions.concurrency


@dataclass(frozen=True)
class JudgeServer:
    """A separate language model for the judge."""

    judge_url: Annotated[
        list[str] | None, Option(help="Separate endpoint for the judge; of several judges, one for all or one each.")
    ] = None
    judge_model: Annotated[
        list[str] | None, Option(help="Separate model for the judge; several are several judges, one after the other.")
    ] = None
    judge_body: Annotated[
        str | None, Option(metavar="JSON", help="--llm-body of the judge. Default: --llm-body on the same endpoint.")
    ] = None
    judge_header: Annotated[
        list[str] | None,
        Option(metavar="NAME=VALUE", help="--llm-header of the judge. Default: --llm-header on the same endpoint."),
    ] = None
    judge_vllm: Annotated[
        list[str] | None,
        Option(metavar="MODEL", help="Local vLLM model for the judge; may be repeated. Shares the server of --vllm."),
    ] = None


@dataclass(frozen=True)
class ShownScores:
    """Which scores are shown, if there are several."""

    explainer: ShownExplainer = None
    judge: Annotated[
        str | None, Option(metavar="NAME", help="Judge whose scores are shown: llm, ngram, … or the name of its model.")
    ] = None
    draw: Annotated[int, Option(min=0, help="Draw of the explanations that are shown.")] = 0
    replicate: Annotated[int, Option(min=0, help="Replicate of the judgements that are shown.")] = 0


@dataclass(frozen=True)
class Spending:
    """Limits on requests and on their cost."""

    requests_per_second: Annotated[float | None, Option(help="Requests per second, at most.")] = None
    tokens_per_minute: Annotated[float | None, Option(help="Prompt and completion tokens per minute, at most.")] = None
    dry_run: Annotated[
        bool, Option("--dry-run", help="Estimate requests, tokens, time and price. Sends no request to the model.")
    ] = False
    budget: Annotated[
        str | None, Option(help="Limit in tokens (2M) or dollars ('$5', with prices); stops before it.")
    ] = None
    price_in: Annotated[float | None, Option(help="Dollars per million prompt tokens.")] = None
    price_cached: Annotated[
        float | None, Option(help="Dollars per million cached prompt tokens. Default: --price-in.")
    ] = None
    price_out: Annotated[float | None, Option(help="Dollars per million completion tokens.")] = None

    def prices(self) -> Prices | None:
        from autointerp.llm.limits import read_prices

        return read_prices(self.price_in, self.price_cached, self.price_out)


def llm_options(
    server: Server, judge: JudgeServer | None = None, spending: Spending | None = None, **asking: Any
) -> LlmOptions:
    """Combine the groups; ``asking`` is how models are asked, with ``None`` for each value not given."""
    from autointerp.llm.additions import read_body, read_headers
    from autointerp.llm.limits import parse_budget

    judge, spending = judge or JudgeServer(), spending or Spending()
    read = {**vars(server), **vars(judge)}
    read |= {name: tuple(read[name] or ()) for name in ("judge_url", "judge_model", "judge_vllm")}
    read["judge_body"] = read_body("--judge-body", judge.judge_body)
    read["judge_headers"] = read_headers("--judge-header", read.pop("judge_header"))
    return LlmOptions(
        **{k: v for k, v in read.items() if not k.startswith("llm_")},
        url=tuple(server.llm_url or ()),
        body=read_body("--llm-body", server.llm_body),
        headers=read_headers("--llm-header", server.llm_header),
        model=server.llm_model,
        requests_per_second=spending.requests_per_second,
        tokens_per_minute=spending.tokens_per_minute,
        budget=parse_budget(spending.budget, spending.prices()),
        **{name: value for name, value in asking.items() if value is not None},
    )


# --- train, harvest, align ---------------------------------------------------------------------------------------

Name = Annotated[str, Option(help="Name of the study; its runs become NAME_a, NAME_b, …")]
Seeds = Annotated[list[int] | None, Option(help="Seeds: one SAE each, on the same batches. Default: 0 1 2.")]
ForceAlign = Annotated[
    bool, Option("--force", help="Also align runs of different studies or hookpoints, which differ in more than seed.")
]
Parallel = Annotated[
    str | None,
    Option(help="Split seeds or data (tokens) over torchrun's ranks. Default: seeds, if they are at least as many."),
]
Hookpoint = Annotated[
    str | None, Option(help="Module whose output, or input (NAME:in), is studied. Default: {subject.hookpoint}.")
]
Hookpoints = Annotated[
    list[str] | None,
    Option(
        help="Module whose output, or input (NAME:in), is studied; several: a study each. Default: {subject.hookpoint}."
    ),
]
Target = Annotated[
    str | None,
    Option(help="Train a transcoder, which predicts this hookpoint from --hookpoint. Default: an autoencoder."),
]
Skip = Annotated[bool | None, Option("--skip", help="Give a transcoder a linear skip connection.")]
Architecture = Annotated[str | None, Option(help=f"{ARCHITECTURES.join_names()}. Default: {{training.architecture}}.")]
TrainPrecision = Annotated[
    str | None,
    Option(
        help="Precision of the product that chooses latents: float32, bfloat16, int8 (CPU only), or auto "
        "(the fewest bits that the machine has instructions for). Default: {training.precision}."
    ),
]
NumLatents = Annotated[
    int | None, Option("--num-latents", "-M", help="Latents of each SAE. Default: {training.num_latents}.")
]
K = Annotated[int | None, Option("--k", "-k", help="Active latents per token. Default: {training.k}.")]
TrainTokens = Annotated[str | None, Option(help="Tokens to train on. Default: {training.tokens}.")]
BatchTokens = Annotated[str | None, Option(help="Tokens per step. Default: {training.batch_tokens}.")]
LearningRate = Annotated[
    float | None, Option("--learning-rate", "--lr", help="Peak rate. Default: 2e-4 / sqrt(num-latents / 16384).")
]
ActivationCache = Annotated[
    str | None,
    Option(help="Bytes of activations kept on disk until the harvest. Default: {training.activation_cache}."),
]
Controls = Annotated[
    bool,
    Option("--controls/--no-controls", help="Also train two control SAEs: random frozen decoder, and untrained."),
]
Wandb = Annotated[str | None, Option(metavar="PROJECT", help="Weights & Biases project to also log to.")]
HarvestTokens = Annotated[str | None, Option(help="Tokens to record. Default: {harvest.tokens}.")]
RunNames = Annotated[list[str] | None, Argument(metavar="RUN RUN…", help="Default: the newest study's runs.")]

# --- import, export ----------------------------------------------------------------------------------------------

ImportedFrom = Annotated[
    str, Option("--from", help="Folder of an SAE, or its name on the hub: OWNER/REPOSITORY[@REVISION][/FOLDER].")
]
ImportedName = Annotated[str, Option(help="Name of the new run.")]
ImportedStudy = Annotated[str, Option(help="Study that the run joins, existing or new.")]
ExportTo = Annotated[Path, Option(help="Folder (new or empty) for an SAE, file for a table; .gz compresses the file.")]
ExportFormat = Annotated[
    OtherFormat,
    Option("--format", help="SAE: sparsify, saelens, dictionary_learning. Table: csv, parquet, neuronpedia."),
]
ExportedSaes = Annotated[
    list[str] | None,
    Option(help="The run; of several, the first is paired with the others. Default: the newest study's first."),
]
ExportedTable = Annotated[
    str | None,
    Option(metavar="NAME", help="latents, explanations, scores, verdicts, pairs, findings, …; a wrong name lists all."),
]
ModelId = Annotated[str | None, Option(help="Neuronpedia's id of the model. Default: the model's name.")]
SourceId = Annotated[str | None, Option(help="Neuronpedia's id of the SAE. Default: LAYER-RUN, such as 6-run_a.")]
AuthorId = Annotated[str | None, Option(help="Neuronpedia's id of the author. Default: that of its own tools.")]

# --- explain, score ----------------------------------------------------------------------------------------------

UnsharedOnly = Annotated[bool, Option("--unshared-only", help="Explain only latents found in no other run.")]
SharedOnly = Annotated[bool, Option("--shared-only", help="Explain only latents found in at least one other run.")]
Latents = Annotated[
    int,
    Option(
        min=1,
        help="Latents to explain, sampled by similarity and firing frequency and weighted to represent all eligible "
        "ones. Asking for more later keeps the latents already drawn.",
    ),
]
Indices = Annotated[str | None, Option(help="Explain exactly these latents: 3,17,40-60.")]
WithPartners = Annotated[bool, Option("--with-partners", help="Also explain each latent's partner in the other run.")]
ControlSaeLatents = Annotated[
    int | None,
    Option(
        min=0,
        help="Latents to explain in each control SAE, for `score` to compare with; 0 explains none. "
        "Default: the number explained in the run, up to 200 (50 with a language model); none with --indices.",
    ),
]
Draws = Annotated[
    int, Option(min=1, help="Independent explanations of each latent: draw 0 at temperature 0, the others sampled.")
]
Temperature = Annotated[float | None, Option(help="Temperature of answers after the first. Default: 0.7.")]
ScoredSaes = Annotated[
    list[str] | None, Option(help="A run. Default: all runs with explanations that have no score yet.")
]
Scorers = Annotated[
    list[str] | None,
    Option(callback=known(SCORERS), help=f"{SCORERS.join_names()}; may be repeated. Default: detection."),
]
Judges = Annotated[
    list[str] | None,
    Option(callback=known(JUDGES, "auto"), help=f"{JUDGES.join_names('auto')}; may be repeated. {_AUTO}"),
]
ScoredDraws = Annotated[int, Option(min=1, help="Draws of the explanations to score, from draw 0.")]
Replicates = Annotated[
    int,
    Option(min=1, help="Independent judgements of the same contexts: number 0 at temperature 0, the others sampled."),
]
ControlLatents = Annotated[
    int | None,
    Option(min=0, help="Latents also judged with another's explanation. Default: all, or 50 with a language model."),
]
ScoredControlSaeLatents = Annotated[
    int | None,
    Option(min=0, help="Latents to score in each control SAE, at most; 0 scores none. Default: all explained ones."),
]
Protocol = Annotated[
    str,
    Option(help="Form of the judge's requests: batch (several contexts), single (one, by log-probabilities) or auto."),
]
ContextsPerRequest = Annotated[
    int | None,
    Option(min=1, max=50, help="Contexts per request of --protocol batch; more are cheaper but harder. Default: 5."),
]
CiHalfWidth = Annotated[
    float | None,
    Option(
        help="Judge in rounds until the score's 95 % interval is ± this, such as 0.065. Default: the whole test set."
    ),
]
ScorePrecision = Annotated[float | None, Option("--precision", hidden=True, help="Old name of --ci-half-width.")]
MaxContexts = Annotated[
    int | None, Option(help="Contexts per latent, at most, with --ci-half-width. Default: the test set's size.")
]

# --- sweep -------------------------------------------------------------------------------------------------------

SweepRecipe = Annotated[
    Path,
    Argument(
        metavar="RECIPE",
        help="TOML file with a [sweep] table, or a bundled one: architectures, ks, pythia-160m, tokens, transcoders or "
        "widths.",
    ),
]
SweepName = Annotated[str | None, Option(help="Prefix of its studies' names. Default: the recipe's name.")]
SweepSeeds = Annotated[list[int] | None, Option(help="Seeds of every point. Default: the recipe's.")]
SweepScore = Annotated[
    bool | None,
    Option("--score/--no-score", help="Explain and score every point. Default: if the recipe has an [explain] table."),
]
SweepJudge = Annotated[
    str | None,
    Option(
        callback=known(JUDGES, "auto"),
        help=f"{JUDGES.join_names('auto')}. Default: the judge with the explainer's name, else auto.",
    ),
]
SweepDryRun = Annotated[
    bool, Option("--dry-run", help="List the points and estimate training times from a few steps. Trains nothing.")
]

# --- report, show, compare, runs ---------------------------------------------------------------------------------

ReportedSae = Annotated[str | None, Option(help="Focus run of the report. Default: the newest study's first.")]
Html = Annotated[bool, Option("--html", help="Write one HTML file, ROOT/reports/RUN.html; print its path and size.")]
Full = Annotated[bool, Option("--full", help="Show every section and table, not only the main ones.")]
HtmlTo = Annotated[Path | None, Option(help="Path of the HTML file. Default: ROOT/reports/RUN.html.")]
LatentNumber = Annotated[int, Option(help="Index of the latent.")]
ShownContexts = Annotated[int, Option(min=1, help="Contexts to show.")]
ComparedNames = Annotated[list[str] | None, Argument(metavar="RUN RUN", help="The two runs.")]
ComparedSaes = Annotated[list[str] | None, Option(help="One of the two runs; give it twice.")]
ShownPairs = Annotated[int, Option(min=1, help="Pairs to show; --json has all.")]
SortPairs = Annotated[
    PairOrder | None, Option(help="Order of the pairs. Default: spread from the most to the least similar.")
]
SharedPairs = Annotated[bool, Option("--shared-only", help="Show only shared pairs.")]
UnsharedPairs = Annotated[bool, Option("--unshared-only", help="Show only unshared pairs.")]
DeletedName = Annotated[
    str | None,
    Option(metavar="NAME", help="Delete a run, or a study with its controls, and their alignments and HTML reports."),
]
Prune = Annotated[
    bool,
    Option("--prune", help="Delete the caches, alignments and reports that no run uses. Keeps all LLM answers."),
]
Yes = Annotated[bool, Option("--yes", help="Delete without asking.")]
ListOnly = Annotated[bool, Option("--dry-run", help="List the files that would be deleted, with sizes. Deletes none.")]
