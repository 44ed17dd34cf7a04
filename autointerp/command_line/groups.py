"""Options that go together, written down once: a command takes the group as one parameter, and its fields are flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

from autointerp.command_line import options as opt
from autointerp.command_line.values import absolute
from sae.common.commands import DEFAULT_ROOT, replace_program_name
from sae.common.errors import BadInput

if TYPE_CHECKING:
    from autointerp.llm.limits import Prices
    from autointerp.llm.options import LlmOptions
    from sae.study.stage import Compute


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, of whose parameters those that are groups stand as the options that are their fields.

    Typer reads flags from a signature; this gives it one in which every group is spread out where it stands. The
    examples in its help start the program as the user has started it.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    spread: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            groups[parameter.name] = kind
            of_fields = get_type_hints(kind, include_extras=True)
            spread += [
                inspect.Parameter(
                    field.name, parameter.KEYWORD_ONLY, default=field.default, annotation=of_fields[field.name]
                )
                for field in fields(kind)
            ]
        else:
            spread.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=kind))

    @wraps(command)
    def with_groups(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    with_groups.__doc__ = replace_program_name(command.__doc__ or "")
    with_groups.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    return with_groups


@dataclass(frozen=True)
class Output:
    """Of every command."""

    root: opt.Root = DEFAULT_ROOT
    as_json: opt.Json = False


@dataclass(frozen=True)
class Machine:
    """Of the commands that run a model."""

    device: opt.Device = "auto"
    threads: opt.Threads = None

    def compute(self) -> Compute:
        from sae.study.stage import Compute

        return Compute(self.device, self.threads)


@dataclass(frozen=True)
class Text:
    """The text that the subject model reads."""

    text: opt.Texts = None
    dataset: opt.Dataset = None
    split: opt.Split = None
    column: opt.Column = None
    config: opt.Configuration = None
    context: opt.Context = None

    def settings(self) -> dict[str, Any]:
        """As the settings' table ``corpus``; ``None`` for what was not said."""
        if self.text and self.dataset:
            raise BadInput("--text and --dataset both name the corpus; give one of them")
        corpus: dict[str, Any] = {
            "context": self.context,
            "split": self.split,
            "column": self.column,
            "config": self.config,
        }
        if self.text:
            corpus |= {"kind": "text", "source": tuple(absolute(t) for t in self.text)}
        if self.dataset:
            corpus |= {"kind": "dataset", "source": (absolute(self.dataset),)}
        return corpus


@dataclass(frozen=True)
class Server:
    """The language model, where one is asked."""

    llm_url: opt.LlmUrl = None
    llm_model: opt.LlmModel = None
    vllm: opt.Vllm = None
    vllm_python: opt.VllmPython = None
    vllm_args: opt.VllmArgs = ""
    vllm_timeout: opt.VllmTimeout = 1800.0
    api_key_file: opt.KeyFile = None
    concurrency: opt.Concurrency = 32


@dataclass(frozen=True)
class JudgeServer:
    """Another language model for the judge."""

    judge_url: opt.JudgeUrl = None
    judge_model: opt.JudgeModel = None
    judge_vllm: opt.JudgeVllm = None


@dataclass(frozen=True)
class Spending:
    """How fast and how much may be asked."""

    requests_per_second: opt.Rate = None
    tokens_per_minute: opt.TokenRate = None
    dry_run: opt.DryRun = False
    budget: opt.Budget = None
    price_in: opt.PriceIn = None
    price_cached: opt.PriceCached = None
    price_out: opt.PriceOut = None

    def prices(self) -> Prices | None:
        from autointerp.llm.limits import read_prices

        return read_prices(self.price_in, self.price_cached, self.price_out)


def llm_options(
    server: Server, judge: JudgeServer | None = None, spending: Spending | None = None, **asking: Any
) -> LlmOptions:
    """What was said of language models, in one. ``asking`` is how the judge is asked."""
    from autointerp.llm.limits import parse_budget
    from autointerp.llm.options import LlmOptions

    judge, spending = judge or JudgeServer(), spending or Spending()
    return LlmOptions(
        url=tuple(server.llm_url or ()),
        model=server.llm_model,
        judge_url=tuple(judge.judge_url or ()),
        judge_model=judge.judge_model,
        api_key_file=server.api_key_file,
        concurrency=server.concurrency,
        requests_per_second=spending.requests_per_second,
        tokens_per_minute=spending.tokens_per_minute,
        vllm=server.vllm,
        judge_vllm=judge.judge_vllm,
        vllm_python=server.vllm_python,
        vllm_args=server.vllm_args,
        vllm_timeout=server.vllm_timeout,
        budget=parse_budget(spending.budget, spending.prices()),
        **asking,
    )
