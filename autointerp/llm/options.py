"""The flags about language models, as values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.common.errors import BadInput

if TYPE_CHECKING:
    from autointerp.llm.additions import Header
    from autointerp.llm.limits import Budget

KEY_VARIABLES = ("AUTOINTERP_API_KEY", "OPENAI_API_KEY")  # that may hold a key; the first that is set wins
VLLM_TIMEOUT = 1800.0  # seconds until a server must be ready: a large model takes minutes to load and to compile


@dataclass(frozen=True)
class LlmOptions:
    """The flags about language models. By default there is none."""

    url: str | Sequence[str] | None = None  # an address, or several that share the load
    model: str | None = None
    judge_url: str | Sequence[str] | None = None
    judge_model: str | Sequence[str] | None = None  # several are several judges, as with ``judge_vllm``
    body: Mapping[str, Any] | None = None  # merged into every request; ``None`` as a value removes a parameter
    judge_body: Mapping[str, Any] | None = None
    headers: tuple[Header, ...] = ()  # of every request to ``url``
    judge_headers: tuple[Header, ...] = ()
    api_key_file: Path | None = None
    concurrency: int = 32
    requests_per_second: float | None = None
    tokens_per_minute: float | None = None
    protocol: str = "auto"
    vllm: str | None = None  # the model to serve: a folder, a hub name or ``bundled``; ``model`` is then its name
    judge_vllm: str | Sequence[str] | None = None
    vllm_python: Path | None = None
    vllm_args: str = ""
    vllm_timeout: float = VLLM_TIMEOUT
    contexts_per_request: int | None = None  # of the batch protocol; ``None`` leaves it to the judge
    budget: Budget | None = None  # shared by explainer and judge
    temperature: float = 0.7  # of draws and replicates after the first, which has 0

    def __post_init__(self) -> None:
        for flag, vllm, url in (("", self.vllm, self.url), ("judge-", self.judge_vllm, self.judge_url)):
            if vllm and url:
                raise BadInput(f"--{flag}vllm starts a server, --{flag or 'llm-'}url names one; give one of the two")
        if self.vllm is not None and self.judge_model and not self.judge_is_elsewhere:
            raise BadInput(
                f"--judge-model {self.judge_model!r}: the server of --vllm {self.vllm!r} has one model alone; "
                "give --judge-vllm or --judge-url"
            )
        judge_vllm = self.judge_vllm or (None if self.judge_url else self.vllm)
        has_judge = self.is_named or self.judge_is_elsewhere
        for who, body, headers, vllm, is_named in (
            ("llm", self.body, self.headers, self.vllm, self.is_named),
            ("judge", self.judge_body, self.judge_headers, judge_vllm, has_judge),
        ):
            if body and not is_named:
                raise BadInput(f"--{who}-body has no effect without a language model; give --{who}-url too")
            if headers and (vllm or not is_named):
                raise BadInput(f"--{who}-header has no effect without a running server; give --{who}-url too")
        if not 0 < self.temperature <= 2:
            raise BadInput(
                f"--temperature {self.temperature:g}: give a number above 0, at which answers differ, up to 2"
            )
        if self.protocol == "single" and (self.contexts_per_request or 1) > 1:
            raise BadInput(
                "--protocol single asks about one context at a time, --contexts-per-request "
                f"{self.contexts_per_request} about several; give one of the two"
            )

    @property
    def is_named(self) -> bool:
        """Whether a flag named a language model."""
        return bool(self.url) or self.model is not None or self.vllm is not None

    @property
    def judge_is_elsewhere(self) -> bool:
        """Whether the judge has an endpoint of its own."""
        return bool(self.judge_url or self.judge_vllm)

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses; none if only a model was named."""
        return _several(self.url)

    def list_words(self) -> list[str]:
        """Return the flags that name the models again, for a command to print; without addresses that hold a key."""
        names = ["url", "model", "judge_url", "judge_model", "api_key_file"]
        serves = bool(self.vllm or self.judge_vllm)
        names += ["vllm", "judge_vllm", "vllm_python", "vllm_args"] if serves else []
        pairs = [(_write_flag(name), str(value)) for name in names for value in _several(getattr(self, name)) if value]
        if serves and self.vllm_timeout != VLLM_TIMEOUT:
            pairs.append(("--vllm-timeout", f"{self.vllm_timeout:g}"))
        # An address may hold a password before an @; in a hub name an @ is harmless.
        words = [word for flag, value in pairs if "@" not in value or "vllm" in flag for word in (flag, value)]
        for name in ("body", "judge_body"):
            if (body := getattr(self, name)) is not None:
                words += [_write_flag(name), json.dumps(body)]
        for name in ("headers", "judge_headers"):
            words += [word for header in getattr(self, name) for word in (_write_flag(name), header.shown)]
        return words

    def list_server_flags(self) -> list[str]:
        """Return the flags that named a language model for any part of a command."""
        return [_write_flag(name) for name in ("url", "model", "vllm", "body", "headers") if getattr(self, name)]

    def list_judge_flags(self) -> list[str]:
        """Return the flags that concern only a judge that is a language model."""
        names = ["judge_url", "judge_model", "judge_vllm", "judge_body", "judge_headers"]
        names += ["protocol"] if self.protocol != "auto" else []
        return [_write_flag(name) for name in (*names, "contexts_per_request") if getattr(self, name)]

    def split_judges(self) -> list[LlmOptions]:
        """Return the options for each of several judges; of one judge, these.

        The n-th judge asks its ``judge_model`` at the n-th ``judge_url``, or all ask at the same one.
        """
        given = {name: _several(getattr(self, name)) for name in ("judge_model", "judge_vllm", "judge_url")}
        n = max(1, len(given["judge_model"]), len(given["judge_vllm"]))
        for name, values in given.items():
            if n > 1 and len(values) not in ((0, 1, n) if name == "judge_url" else (0, n)):
                raise BadInput(
                    f"{_write_flag(name)} is given {len(values)} times for {n} judges; give it once for each judge"
                )
        if self.judge_headers and len(set(given["judge_url"])) > 1 and n > 1:
            raise BadInput(
                "--judge-header would go to several servers, and its value may be a secret of one; score with one "
                "--judge-url at a time"
            )
        own = [{name: values[min(i, len(values) - 1)] for name, values in given.items() if values} for i in range(n)]
        return [self] if n == 1 else [replace(self, **of_judge) for of_judge in own]

    def for_judge(self) -> LlmOptions:
        """Return the options of the only judge, with its own endpoint, model, body and headers if it has them.

        On the explainer's endpoint it inherits the others; another endpoint never gets the explainer's headers.
        """
        model, vllm = (next(iter(_several(given)), None) for given in (self.judge_model, self.judge_vllm))
        own: dict[str, Any] = {"model": model, "body": self.judge_body, "headers": self.judge_headers}
        if self.judge_is_elsewhere:
            own |= {"url": self.judge_url, "vllm": vllm}
        else:
            own |= {"model": model or self.model, "headers": self.judge_headers or self.headers}
            own["body"] = self.body if self.judge_body is None else self.judge_body
        own |= {f.name: f.default for f in fields(self) if f.name.startswith("judge_")}
        return replace(self, **own)


def _several(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, str | Path) else tuple(given or ())


def _write_flag(name: str) -> str:
    prefix = "llm-" if name in ("url", "model", "body", "headers") else ""
    return f"--{prefix}{name.replace('_', '-').replace('headers', 'header')}"
