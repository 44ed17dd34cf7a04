"""The commands: parse, call one function, render. Nothing is imported before it is needed, so `--help` is quick."""

from __future__ import annotations

import enum
import errno
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autointerp.backends import LlmOptions
    from sae.run import Run
    from sae.study import Compute

ROOT = Path("eval_runs")
SOME_FAILED = 3
INTERRUPTED = 130
_UsageError: Any = typer.BadParameter.__base__  # typer's own copy of click's class, which has no public name
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC}

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


class Backend(enum.StrEnum):
    auto = "auto"
    llm = "llm"
    ngram = "ngram"


class Definition(enum.StrEnum):
    strict = "strict"
    both = "both"
    decoder = "decoder"
    lenient = "lenient"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of tables.")]
RootOption = Annotated[Path, typer.Option("--root", help="The folder that holds all runs.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="CPU threads for torch. Default: all cores.")]
SaeOption = Annotated[
    list[str] | None, typer.Option("--sae", help="A run, such as run_a. Default: the newest study's first.")
]


# --- demo ------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    root: RootOption = ROOT,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The whole study, offline, on the bundled subject model. Run again, it shows its report at once.

    Trains three TopK SAEs on one stream of activations of a small language model of Python source, aligns their
    latents, explains and scores a few hundred with the n-gram baseline (which needs no model), and reports.
    """
    from autointerp.demo import run_demo

    runs, failed = run_demo(root, _compute("cpu", threads))
    _report(runs[0], runs, as_json)
    _exit_if(failed)


# --- train, harvest, align ---------------------------------------------------------------------------------------


@app.command()
def train(
    name: Annotated[str, typer.Option("--name", help="The study's name; its runs become NAME_a, NAME_b, …")] = "run",
    seeds: Annotated[
        list[int] | None, typer.Option("--seeds", help="One SAE per seed, all on the same batches: --seeds 0 1 2.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A TOML file of settings (see eval_runs/recipes/).")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Hugging Face name or directory; 'bundled' is the model in this package."),
    ] = None,
    hookpoint: Annotated[
        str | None, typer.Option("--hookpoint", help="The module whose output is studied, such as layers.2.mlp.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text file, or a folder of them. May be given several times.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="A `datasets` directory or hub name (with --split, --column, --config)."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="The dataset's split.")] = None,
    column: Annotated[str | None, typer.Option("--column", help="The dataset's column that holds the text.")] = None,
    config: Annotated[str | None, typer.Option("--config", help="The dataset's configuration.")] = None,
    context: Annotated[int | None, typer.Option("--context", help="Tokens in a packed sequence.")] = None,
    num_latents: Annotated[int | None, typer.Option("--num-latents", "-M", help="Width of the dictionary.")] = None,
    k: Annotated[int | None, typer.Option("--k", "-k", help="Active latents per token.")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Tokens to train on, such as 10M.")] = None,
    batch_tokens: Annotated[str | None, typer.Option("--batch-tokens", help="Tokens in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Adam's peak rate.")] = None,
    root: RootOption = ROOT,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Precision of the subject's forward pass: float32, bfloat16, float16.")
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train TopK SAEs that differ in their seed alone, on one stream of a language model's activations.

    Example: python cli.py train --name run --seeds 0 1 2 --model EleutherAI/pythia-160m --hookpoint layers.6.mlp
    --text corpus.txt --num-latents 4096 --k 32 --tokens 50M

    --seeds may grow later: the seeds that exist are not touched.
    """
    from sae.errors import BadInput
    from sae.settings import settings_from
    from sae.study import train_study

    if text and dataset:
        raise BadInput("--text and --dataset both name the corpus; give one of them")
    corpus: dict[str, Any] = {"context": context, "split": split, "column": column, "config": config}
    if text:
        corpus |= {"kind": "text", "source": tuple(_absolute(t) for t in text)}
    if dataset:
        corpus |= {"kind": "dataset", "source": (_absolute(dataset),)}
    settings = settings_from(
        recipe,
        subject={"model": _absolute(model) if model else None, "hookpoint": hookpoint, "dtype": dtype},
        corpus=corpus,
        training={
            "num_latents": num_latents,
            "k": k,
            "tokens": _amount("--tokens", tokens),
            "batch_tokens": _amount("--batch-tokens", batch_tokens),
            "learning_rate": learning_rate,
        },
    )
    runs = train_study(name, seeds or [0, 1, 2], settings, root, _compute(device, threads))
    _finish(as_json, "train", lambda: _runs_object(runs), lambda: _print_runs(runs))


@app.command()
def harvest(
    sae: SaeOption = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="How many tokens to record, such as 2M.")] = None,
    root: RootOption = ROOT,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record which latent fires where, for all seeds in one pass over the subject model."""
    from sae.study import harvest_runs

    runs = _opened(sae, root, whole_study=True)
    harvest_runs(runs, _compute(device, threads), tokens=_amount("--tokens", tokens))
    _finish(as_json, "harvest", lambda: _runs_object(runs), lambda: _print_runs(runs))


@app.command()
def align(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="RUN RUN…", help="Default: the newest study's runs.")
    ] = None,
    root: RootOption = ROOT,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Match the latents of every pair of runs one to one, exactly, by encoder and by decoder; say what is shared."""
    from autointerp.report import alignment_findings, render_alignment
    from sae.study import align_runs, overlap_of

    runs = _opened(names, root, whole_study=True)
    align_runs(runs, _compute(device, threads))
    found = alignment_findings(overlap_of(runs))
    _finish(as_json, "align", lambda: found, lambda: render_alignment(found))


# --- explain, score ----------------------------------------------------------------------------------------------

LlmUrl = Annotated[
    str | None, typer.Option("--llm-url", help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
]
LlmModel = Annotated[str | None, typer.Option("--llm-model", help="The model there. Default: the only one it serves.")]
JudgeUrl = Annotated[str | None, typer.Option("--judge-url", help="Another endpoint for the judge.")]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="Another model for the judge.")]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="A file that holds the key. Default: $AUTOINTERP_API_KEY or $OPENAI_API_KEY."),
]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="Requests in flight at once.")]
Rate = Annotated[float | None, typer.Option("--requests-per-second", help="At most so many requests a second.")]
Protocol = Annotated[
    str,
    typer.Option(
        "--protocol",
        help="How the judge is asked: batch (several contexts a request), single (one, with log-probabilities), auto.",
    ),
]


@app.command()
def explain(
    sae: SaeOption = None,
    unshared_only: Annotated[
        bool, typer.Option("--unshared-only", help="Only latents found in no other run of the study.")
    ] = False,
    shared_only: Annotated[bool, typer.Option("--shared-only", help="Only latents found in some other run.")] = False,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="The other runs that count. Default: all.")
    ] = None,
    definition: Annotated[Definition, typer.Option("--definition", help="What counts as shared.")] = Definition.strict,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=1, help="Cosine above which a latent is shared.")
    ] = 0.7,
    latents: Annotated[int, typer.Option("--latents", min=1, help="Explain a seeded sample of so many.")] = 200,
    indices: Annotated[str | None, typer.Option("--indices", help="These latents: 3,17,40-60.")] = None,
    with_partners: Annotated[
        bool, typer.Option("--with-partners", help="Also each latent's partner in the sibling run.")
    ] = False,
    explainer: Annotated[
        Backend, typer.Option("--explainer", help="auto: an LLM where one is given, else the n-gram baseline.")
    ] = Backend.auto,
    llm_url: LlmUrl = None,
    llm_model: LlmModel = None,
    api_key_file: KeyFile = None,
    concurrency: Concurrency = 32,
    requests_per_second: Rate = None,
    root: RootOption = ROOT,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say in one sentence what makes a latent fire, from contexts in which it does.

    Example: python cli.py explain --sae run_a --unshared-only --latents 300
    """
    from autointerp.explain import explain_runs
    from autointerp.selection import Choice
    from sae.errors import BadInput

    if unshared_only and shared_only:
        raise BadInput("--unshared-only and --shared-only exclude each other; give one of them")
    choice = Choice(
        sharing="unshared" if unshared_only else "shared" if shared_only else "any",
        n=latents,
        indices=_indices(indices),
        against=tuple(against or ()),
        definition=definition.value,
        threshold=threshold,
        with_partners=with_partners,
    )
    options = _llm(llm_url, llm_model, None, None, api_key_file, concurrency, requests_per_second, "auto")
    runs = _opened(sae, root)
    outcome = explain_runs(runs, choice, explainer.value, options, _compute(device, threads))
    _finish(as_json, "explain", outcome.as_dict, outcome.render)
    _exit_if(outcome.n_failed)


@app.command()
def score(
    sae: Annotated[
        list[str] | None,
        typer.Option("--sae", help="A run. Default: every stored explanation that has no score yet, in all runs."),
    ] = None,
    scorer: Annotated[list[str] | None, typer.Option("--scorer", help="detection.")] = None,
    judge: Annotated[
        Backend, typer.Option("--judge", help="auto: an LLM where one is given, else the n-gram baseline.")
    ] = Backend.auto,
    control_latents: Annotated[
        int | None,
        typer.Option(
            "--control-latents",
            min=0,
            help="Latents also judged by a dissimilar latent's explanation. Default: all (ngram), 50 (llm).",
        ),
    ] = None,
    llm_url: LlmUrl = None,
    llm_model: LlmModel = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    api_key_file: KeyFile = None,
    concurrency: Concurrency = 32,
    requests_per_second: Rate = None,
    protocol: Protocol = "auto",
    root: RootOption = ROOT,
    as_json: JsonOption = False,
) -> None:
    """Test explanations: a judge reads only the explanation and says in which contexts the latent fires.

    Balanced accuracy and AUROC with 95 % intervals, and the same with explanations swapped between dissimilar latents,
    which says what a meaningless explanation would have scored.
    """
    from autointerp.score import score_runs

    options = _llm(llm_url, llm_model, judge_url, judge_model, api_key_file, concurrency, requests_per_second, protocol)
    runs = _opened(sae, root) if sae else None
    outcome = score_runs(runs, root, tuple(scorer or ("detection",)), judge.value, options, control_latents)
    _finish(as_json, "score", outcome.as_dict, outcome.render)
    _exit_if(outcome.n_failed)


# --- report, show, runs --------------------------------------------------------------------------------------------


@app.command()
def report(
    sae: Annotated[
        str | None,
        typer.Option("--sae", help="The run in the middle of the report. Default: the newest study's first."),
    ] = None,
    definition: Annotated[Definition, typer.Option("--definition", help="What counts as shared.")] = Definition.strict,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=1, help="Cosine above which a latent is shared.")
    ] = 0.7,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="The other runs that count. Default: all.")
    ] = None,
    root: RootOption = ROOT,
    as_json: JsonOption = False,
) -> None:
    """What is shared between the seeds, what the latents mean, how well that can be told, and how the two relate."""
    from sae.run import study_runs

    run = _opened([sae] if sae else None, root)[0]
    _report(run, study_runs(run.study, root), as_json, definition.value, threshold, against or ())


@app.command()
def show(
    latent: Annotated[int, typer.Option("--latent", help="The latent's number.")],
    sae: Annotated[str | None, typer.Option("--sae", help="The run. Default: the newest study's first.")] = None,
    contexts: Annotated[int, typer.Option("--contexts", min=1, help="Contexts to show.")] = 8,
    root: RootOption = ROOT,
    as_json: JsonOption = False,
) -> None:
    """One latent: contexts highlighted, explanation, scores, its match in each sibling run."""
    from autointerp.report import latent_findings, render_latent

    run = _opened([sae] if sae else None, root)[0]
    found = latent_findings(run, latent, n_contexts=contexts)
    _finish(as_json, "show", lambda: found, lambda: render_latent(found))


@app.command()
def runs(root: RootOption = ROOT, as_json: JsonOption = False) -> None:
    """What runs there are, and how far each has come."""
    from sae.run import all_runs

    found = all_runs(root)
    _finish(as_json, "runs", lambda: _runs_object(found), lambda: _print_runs(found))


# --- shared by the commands ------------------------------------------------------------------------------------------


def _compute(device: str, threads: int | None) -> Compute:
    from sae.study import Compute

    return Compute(device, threads)


def _opened(names: list[str] | None, root: Path, whole_study: bool = False) -> list[Run]:
    from sae.run import Run, newest_study

    if names:
        return [Run.open(name, root) for name in dict.fromkeys(names)]
    study = newest_study(root)
    return study if whole_study else study[:1]


def _llm(
    url: str | None,
    model: str | None,
    judge_url: str | None,
    judge_model: str | None,
    key_file: Path | None,
    concurrency: int,
    rate: float | None,
    protocol: str,
) -> LlmOptions:
    from autointerp.backends import LlmOptions

    return LlmOptions(
        url=url,
        model=model,
        judge_url=judge_url,
        judge_model=judge_model,
        api_key_file=key_file,
        concurrency=concurrency,
        requests_per_second=rate,
        protocol=protocol,
    )


def _absolute(name: str) -> str:
    """A path that exists, from the root on, so that later stages find it from any folder; other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _amount(option: str, text: str | None) -> int | None:
    """``2M``, ``500k``, ``1e6`` or ``123``, as a whole number."""
    from decimal import Decimal

    from sae.errors import BadInput

    if text is None:
        return None
    scale = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        value = Decimal(text[:-1] if scale > 1 else text) * scale  # not as a float: 1.001M would be no whole number
        if not 1 <= value <= 10**15 or value != int(value):
            raise ValueError
        return int(value)
    except (ValueError, ArithmeticError):
        raise BadInput(f"{option} {text!r} is not an amount; write it like 500k, 2M or 1000000") from None


def _indices(text: str | None) -> tuple[int, ...]:
    """``3,17,40-60`` as numbers."""
    from sae.errors import BadInput

    found: list[int] = []
    if text is not None and not text.strip(" ,"):
        raise BadInput(f"--indices {text!r} names no latent; write it like 3,17,40-60")
    for part in (text or "").replace(" ", ",").split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        try:
            span = range(int(first), (int(last) if dash else int(first)) + 1)
            if not 1 <= len(span) <= 10**7:
                raise ValueError
            found += span
        except (ValueError, OverflowError):
            raise BadInput(f"--indices {part!r} is not a latent or a range; write it like 3,17,40-60") from None
    return tuple(dict.fromkeys(found))


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
    _finish(as_json, "report", lambda: found, lambda: render_report(found))


def _runs_object(found: list[Run]) -> dict[str, Any]:
    from sae.study import progress_of

    return {"runs": [progress_of(run) for run in found]}


def _print_runs(found: list[Run]) -> None:
    from autointerp.report import render_runs
    from sae.study import progress_of

    render_runs([progress_of(run) for run in found])


def _finish(as_json: bool, command: str, to_object: Callable[[], dict[str, Any]], render: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps({"schema": 1, "command": command, **to_object()}))
    else:
        render()


def _exit_if(failed: int) -> None:
    if failed:
        raise typer.Exit(SOME_FAILED)


def _spread_lists(arguments: list[str]) -> list[str]:
    """``--seeds 0 1 2`` as ``--seeds 0 --seeds 1 --seeds 2``, which is how click takes lists."""
    spread: list[str] = []
    inside = None
    for argument in arguments:
        if argument in {"--seeds", "--text", "--against"}:
            inside = argument
        elif inside and not argument.startswith("-"):
            spread += [inside, argument]
        else:
            inside = None
            spread.append(argument)
    return spread


@contextmanager
def _one_line_errors(as_json: bool) -> Iterator[None]:
    """Errors that are the user's to mend as one line and an exit code; others keep their traceback."""
    from sae.errors import UserError, printable

    try:
        yield
        return
    except UserError as error:
        line, code = printable(" ".join(str(error).split())), error.exit_code
    except _UsageError as error:
        asked = error.ctx.command_path if error.ctx is not None else "python cli.py"
        line, code = f"{' '.join(error.format_message().split())} (see `{asked} --help`)", error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in _NOT_OURS or error.filename is None:
            raise
        line, code = f"{str(error.filename)!r} cannot be used: {(error.strerror or '').lower()}", 1
    print(f"error: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"schema": 1, "error": line}))
    sys.exit(code)


def main() -> None:
    arguments = sys.argv[1:] or ["--help"]
    with _one_line_errors("--json" in arguments):
        prog_name = "python cli.py" if sys.argv[0].endswith("cli.py") else None
        code = app(args=_spread_lists(arguments), prog_name=prog_name, standalone_mode=False)
    if code == INTERRUPTED:
        print("\ninterrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
