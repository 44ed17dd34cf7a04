"""Groups of options: a command takes a group as one parameter, and each field of the group is a flag."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option
from typer.core import TyperCommand

from autointerp.command_line import options as opt
from autointerp.command_line.values import absolute, check_value, check_words
from sae.common.commands import DEFAULT_ROOT, replace_program_name
from sae.common.errors import BadInput

if TYPE_CHECKING:
    from autointerp.llm.limits import Prices
    from autointerp.llm.options import LlmOptions
    from sae.study.stage import Compute


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
        rest = super().parse_args(ctx, args)
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

    root: Annotated[Path, Option("--root", help="Folder that holds all runs.")] = DEFAULT_ROOT
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of tables.")] = False


@dataclass(frozen=True)
class Machine:
    """Options of the commands that run a model."""

    device: Annotated[str, Option("--device", help="cpu, cuda, cuda:1, …; auto uses a GPU if there is one.")] = "auto"
    threads: opt.Threads = None
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
        list[str] | None, Option("--text", help="Text files or folders. Default: the sources of Python's library.")
    ] = None
    dataset: Annotated[str | None, Option("--dataset", help="Folder or hub name of a Hugging Face dataset.")] = None
    split: Annotated[str | None, Option("--split", help="Split of the dataset. Default: {corpus.split}.")] = None
    column: Annotated[
        str | None, Option("--column", help="Column of the dataset with the text. Default: {corpus.column}.")
    ] = None
    config: Annotated[str | None, Option("--config", help="Configuration of the dataset, if it has several.")] = None
    context: Annotated[
        int | None, Option("--context", help="Tokens in a packed sequence. Default: {corpus.context}.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings' table ``corpus``, with ``None`` for each value not given."""
        if self.text and self.dataset:
            raise BadInput("--text and --dataset both name the corpus; give one of them")
        corpus: dict[str, Any] = {name: getattr(self, name) for name in ("context", "split", "column", "config")}
        if self.text:
            corpus |= {"kind": "text", "source": tuple(absolute(t) for t in self.text)}
        if self.dataset:
            corpus |= {"kind": "dataset", "source": (absolute(self.dataset),)}
        return corpus


@dataclass(frozen=True)
class Server:
    """The language model and how it is reached."""

    llm_url: Annotated[
        list[str] | None,
        Option(
            "--llm-url",
            help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; several share the load of one model.",
        ),
    ] = None
    llm_model: Annotated[
        str | None, Option("--llm-model", help="Model name. Default: the only one served; with --vllm, its own name.")
    ] = None
    vllm: Annotated[
        str | None,
        Option(
            "--vllm",
            metavar="MODEL",
            help="Start a local vLLM server for this command: a model folder, a Hugging Face name, or 'bundled'. "
            "`make vllm` installs vLLM in a checkout; logs go to ROOT/logs.",
        ),
    ] = None
    vllm_python: Annotated[
        Path | None,
        Option(
            "--vllm-python",
            help="Python that has vLLM. Default: $AUTOINTERP_VLLM_PYTHON, else that of `make vllm`, else this one.",
        ),
    ] = None
    vllm_args: Annotated[
        str, Option("--vllm-args", help="Arguments of the vLLM server, in quotes: --vllm-args '--max-model-len 4096'.")
    ] = ""
    vllm_timeout: Annotated[float, Option("--vllm-timeout", help="Seconds to wait for the vLLM server.")] = 1800.0
    api_key_file: Annotated[
        Path | None,
        Option("--api-key-file", help="File with the API key. Default: $AUTOINTERP_API_KEY or $OPENAI_API_KEY."),
    ] = None
    concurrency: Annotated[int, Option("--concurrency", min=1, help="Requests in flight at once.")] = 32


@dataclass(frozen=True)
class JudgeServer:
    """A separate language model for the judge."""

    judge_url: Annotated[list[str] | None, Option("--judge-url", help="Separate endpoint for the judge.")] = None
    judge_model: Annotated[str | None, Option("--judge-model", help="Separate model for the judge.")] = None
    judge_vllm: Annotated[
        str | None,
        Option("--judge-vllm", metavar="MODEL", help="Local vLLM model for the judge. Shares the server of --vllm."),
    ] = None


@dataclass(frozen=True)
class Spending:
    """Limits on requests and on their cost."""

    requests_per_second: Annotated[
        float | None, Option("--requests-per-second", help="Requests per second, at most.")
    ] = None
    tokens_per_minute: Annotated[
        float | None, Option("--tokens-per-minute", help="Prompt and completion tokens per minute, at most.")
    ] = None
    dry_run: Annotated[
        bool, Option("--dry-run", help="Estimate requests, tokens, time and price. Sends no request to the model.")
    ] = False
    budget: Annotated[
        str | None, Option("--budget", help="Limit in tokens (2M) or dollars ('$5', with prices); stops before it.")
    ] = None
    price_in: Annotated[float | None, Option("--price-in", help="Dollars per million prompt tokens.")] = None
    price_cached: Annotated[
        float | None, Option("--price-cached", help="Dollars per million cached prompt tokens. Default: --price-in.")
    ] = None
    price_out: Annotated[float | None, Option("--price-out", help="Dollars per million completion tokens.")] = None

    def prices(self) -> Prices | None:
        from autointerp.llm.limits import read_prices

        return read_prices(self.price_in, self.price_cached, self.price_out)


def llm_options(
    server: Server, judge: JudgeServer | None = None, spending: Spending | None = None, **asking: Any
) -> LlmOptions:
    """Combine the groups; ``asking`` is how the judge is asked."""
    from autointerp.llm.limits import parse_budget
    from autointerp.llm.options import LlmOptions

    judge, spending = judge or JudgeServer(), spending or Spending()
    same_names = {k: v for k, v in {**vars(server), **vars(judge)}.items() if not k.startswith("llm_")}
    return LlmOptions(
        **{**same_names, "judge_url": tuple(judge.judge_url or ())},
        url=tuple(server.llm_url or ()),
        model=server.llm_model,
        requests_per_second=spending.requests_per_second,
        tokens_per_minute=spending.tokens_per_minute,
        budget=parse_budget(spending.budget, spending.prices()),
        **asking,
    )
