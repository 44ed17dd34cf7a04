"""Count what `explain` or `score` would ask, without asking: requests, tokens, time and price.

Lays out the real requests and skips those that the journal or the answer cache can answer. Counts tokens by the first
available of: the model's own tokenizer and chat template (a folder or the local hub cache), the server's ``/tokenize``
(vLLM, llama.cpp) if its counts are plausible, ``tiktoken``, and characters (the journal's mean, else four to a token),
reported as an estimate. Sends at most requests to ``/models``, ``/apply-template`` and ``/tokenize``.

Cached tokens are the leading blocks of 16 that an earlier prompt had too, as in vLLM with one request after another and
no eviction (blocks have 128 tokens on a CPU, so less is cached). Counts are the maximum with adaptive scoring. If the
judge's protocol depends on the server, counts are of the more expensive one, with the other's cost alongside.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from autointerp.contexts.material import Material
from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import get_identity, plan_controls, plan_latents
from autointerp.explaining.explainers import EXPLAINERS
from autointerp.explaining.explainers.base import Evidence, ModelExplainer
from autointerp.journal.journal import open_journal
from autointerp.journal.method import BASELINE, repeat
from autointerp.journal.usage import is_plausible_count
from autointerp.llm.client import DEFAULT_URL, LlmClient, ResponseCache
from autointerp.llm.exchange import Request, one_line
from autointerp.llm.limits import Prices
from autointerp.llm.local.model import find_model
from autointerp.llm.opening import check_repeats, resolve_name
from autointerp.llm.options import LlmOptions
from autointerp.llm.tokens import NotCounted, Tokenize, count_cached, count_characters, estimate_tokens, find_tokenizer
from autointerp.scoring.adaptive import StoppingRule, find_stop
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.judges.base import ModelJudge
from autointerp.scoring.questions import Part, TestSets, parts_of, passes_of, questions_of
from autointerp.scoring.score import list_judges
from autointerp.scoring.scorers import SCORERS
from sae.common.errors import BadInput, NotFound
from sae.study.run import Run

EXPLANATION_TOKENS = 80
"""Written for an explanation where the journal has none to go by."""
_SUMS = (
    *("requests", "requests_at_least", "answered_before", "from_cache", "prompt_tokens", "cached_tokens"),
    *("completion_tokens", "completion_at_most", "seconds", "dollars"),
)


@dataclass
class Forecast:
    """The expected cost of a command. ``None``: not known."""

    stage: str
    model: str
    counted_by: str
    exact: bool
    """Whether prompt tokens were counted by the model's own tokenizer and template."""
    protocol: str | None = None
    """Of the judge, where it has several: that of all these figures."""
    requests: int = 0
    requests_at_least: int = 0
    """Less than ``requests`` only where adaptive scoring may stop earlier."""
    answered_before: int = 0
    """Contexts or latents that the journal has answers for."""
    from_cache: int = 0
    """Requests whose answer is kept."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    completion_at_most: int = 0
    seconds: float | None = None
    dollars: float | None = None
    notes: list[str] = field(default_factory=list)
    cheaper: Forecast | None = None
    """By the other protocol, where only the server can tell which one it will be."""
    judges: list[Forecast] = field(default_factory=list)
    """Of each of several judges; the other figures are then sums."""

    def as_dict(self) -> dict[str, Any]:
        common = ("stage", "model", "counted_by", "exact", "notes", "cheaper", "judges")
        cheaper = self.cheaper and {k: v for k, v in self.cheaper.__dict__.items() if k not in common}
        found = {"dry_run": True, **self.__dict__, "cheaper": cheaper}
        del found["judges"]
        return {**found, "judges": [of.as_dict() for of in self.judges]} if self.judges else found

    @property
    def cost(self) -> tuple[float, int]:
        """Return the key by which forecasts are compared: the price, if there are prices, and the tokens."""
        return self.dollars or 0.0, self.prompt_tokens + self.completion_tokens


@dataclass
class _Asked:
    """The requests of a command, in order."""

    client: LlmClient
    cache: ResponseCache | None
    answer_like: Callable[[Request], str] | None = None
    """An answer as long as a request's; ``None``: an explanation."""
    most: list[Request] = field(default_factory=list)
    least: int = 0
    before: int = 0
    from_cache: int = 0
    notes: list[str] = field(default_factory=list)
    _keys: set[str] = field(default_factory=set)

    def add(self, requests: Iterable[Request], is_sure: bool) -> None:
        """Add requests, except those whose answer is in the cache, or will be after an earlier one of this command."""
        for request in requests:
            key = self.client.key(request)
            if key in self._keys or (self.cache is not None and self.cache.get(key) is not None):
                self.from_cache += 1
            else:
                self._keys.add(key)
                self.most.append(request)
                self.least += is_sure


def forecast_explain(
    runs: Sequence[Run],
    choice: Choice,
    backend: str,
    options: LlmOptions,
    prices: Prices | None,
    control_sae_latents: int | None = None,
    draws: int = 1,
) -> Forecast:
    """Return the expected cost of `explain`. Needs harvest and alignment: contexts are not known before."""
    name = resolve_name(EXPLAINERS, backend, options)
    check_repeats(EXPLAINERS, name, "--draws", draws)
    if not EXPLAINERS[name].asks_model:
        return _free("explain", name)

    def lay_out(client: LlmClient, cache: ResponseCache | None) -> dict[str, _Asked]:
        explainer, notes = cast("type[ModelExplainer]", EXPLAINERS[name]).plan(client, options)
        asked = _Asked(client, cache, notes=notes)
        tasks = [task for run in runs for task in plan_latents(run, choice)]
        try:
            controls = plan_controls(tasks, choice, True, control_sae_latents)
        except NotFound as error:
            controls = []
            asked.notes.append(f"control SAEs are not counted: {error}")
        for draw in range(draws):
            of_draw = repeat(explainer, draw, options.temperature)
            for task in [*tasks, *controls]:
                _of_task(task.run, task.latents, of_draw, draw, asked)
        return {"": asked}

    return asyncio.run(_forecast("explain", runs, options, prices, lay_out))


def _of_task(run: Run, latents: Sequence[int], explainer: ModelExplainer, draw: int, asked: _Asked) -> None:
    material = Material.of(run)
    done: set[int] = set()
    if run.journal_path.exists():
        same = get_identity(explainer, material)
        with open_journal(run) as journal:
            done = set(journal.explanations(status="ok", draw=draw, **same)["latent"].tolist()) & set(latents)
    asked.before += len(done)
    evidence = Evidence(explainer, material)
    for latent in sorted(set(latents) - done):
        if material.sampler.eligible(latent)[0]:
            asked.add([explainer.request(*evidence.of(latent))], is_sure=True)


def forecast_score(
    named: Sequence[Run] | None,
    root: Path,
    scorers: Sequence[str],
    backends: str | Sequence[str],
    options: LlmOptions,
    prices: Prices | None,
    control_latents: int | None = None,
    rule: StoppingRule | None = None,
    control_sae_latents: int | None = None,
    draws: int = 1,
    replicates: int = 1,
) -> Forecast:
    """Return the cost of `score` for the existing explanations; see :func:`autointerp.scoring.score.score_runs`."""
    scorers = [SCORERS.check(name, "--scorer") for name in scorers]
    judges = list_judges(backends, options, replicates)
    if not any(JUDGES[kind].asks_model for kind, _ in judges):
        return _free("score", judges[0][0])
    lacking = [run.name for run in named or () if not run.journal_path.exists()]
    if lacking:
        raise BadInput(
            f"--dry-run: run {lacking[0]!r} has no explanations yet; `explain --dry-run` says what they cost"
        )
    parts = parts_of(named, root, control_sae_latents)

    def forecast(kind: str, options: LlmOptions) -> Forecast:
        if not JUDGES[kind].asks_model:
            return _free("score", kind)

        def lay_out(client: LlmClient, cache: ResponseCache | None) -> dict[str, _Asked]:
            found = {}
            for protocol, judge in cast("type[ModelJudge]", JUDGES[kind]).plan(client, options).items():
                found[protocol] = _Asked(client, cache, judge.answer_like)
                for replicate, of_draw in passes_of(parts, judge, control_latents, draws, replicates):
                    again = repeat(judge, replicate, options.temperature)
                    for part in of_draw:
                        for name in scorers:
                            _of_part(part, name, again, replicate, rule, found[protocol])
            return found

        return asyncio.run(_forecast("score", [part.run for part in parts], options, prices, lay_out))

    return _add_up([forecast(kind, of_judge.for_judge()) for kind, of_judge in judges])


def _of_part(
    part: Part, scorer_name: str, judge: ModelJudge, replicate: int, rule: StoppingRule | None, asked: _Asked
) -> None:
    tests = TestSets(part.run, SCORERS[scorer_name](), rule)
    asked_by = judge.of_marks() if tests.scorer.marked else judge
    with open_journal(part.run) as journal:
        labels = journal.labels(**tests.set_up(asked_by)._asdict(), replicate=replicate)
        for question in questions_of(part, part.readable(journal, judge))[0]:
            answers = labels.get(question.key, {})
            done = {window for window, label in answers.items() if label is not None}
            asked.before += len(done)
            rounds = tests.draw(question.latent)
            if tests.adaptive and (stop := find_stop(rounds, answers, tests.adaptive)):
                rounds = rounds[: stop.look + 1]
            sure = True  # the first round that has something to ask is asked for certain
            for contexts in rounds:
                todo = [c for c in contexts if c.window not in done and c.window not in question.seen]
                size = asked_by.contexts_per_request
                batches = [todo[start : start + size] for start in range(0, len(todo), size)]
                asked.add((asked_by.request(question.text, batch) for batch in batches), is_sure=sure)
                sure = sure and not todo


async def _forecast(
    stage: str,
    runs: Sequence[Run],
    options: LlmOptions,
    prices: Prices | None,
    lay_out: Callable[[LlmClient, ResponseCache | None], Mapping[str, _Asked]],
) -> Forecast:
    path = runs[0].root / "cache.sqlite"
    cache = ResponseCache(path) if path.exists() else None
    served = None if options.vllm is None else find_model(options.vllm, options.vllm_args, options.model)
    model = options.model if served is None else served.name
    async with LlmClient(
        options.urls or DEFAULT_URL,
        model,
        key_file=options.api_key_file,
        headers=options.headers,
        body=options.body,
        cache=cache,
        start=None if served is None else _never,
    ) as client:
        if model is None:
            await client.check()

        client.load_capabilities()
        try:
            laid_out = lay_out(client, cache)
        finally:
            if cache is not None:
                cache.close()
        usage = _usage(runs, stage, client.model)
        per_request = usage["prompt_tokens"] / usage["requests"] if usage["requests"] else 0.0
        place = None if served is None else served.place
        forecasts = []
        for protocol, asked in laid_out.items():
            mean = statistics.fmean(count_characters(r.messages) for r in asked.most) if asked.most else 0.0
            is_measured = is_plausible_count(round(per_request), round(mean), round(mean))
            per_token = mean / per_request if per_request and mean and is_measured else 0.0
            tokenize = await find_tokenizer(client, options, per_token, place)
            try:
                found = await _counted(stage, asked, tokenize)
            except NotCounted as error:  # the server stopped counting half-way
                note = f"{tokenize.name} failed ({one_line(error, 100)}): prompt tokens are an estimate"
                tokenize = estimate_tokens(client.model, per_token, note)
                found = await _counted(stage, asked, tokenize)
            found.protocol = protocol or None
            _estimate(found, usage, options, prices, bool(client.capabilities.thinks))
            forecasts.append(found)
    cheaper, dearest = min(forecasts, key=lambda f: f.cost), max(forecasts, key=lambda f: f.cost)
    dearest.cheaper = None if cheaper is dearest else cheaper
    return dearest


def _add_up(found: Sequence[Forecast]) -> Forecast:
    """Return the sum over several judges; that of one is its own."""
    if len(found) == 1:
        return found[0]

    def add(name: str) -> Any:
        values = [getattr(of, name) for of in found]
        return None if None in values else sum(values)

    sums = {name: add(name) for name in _SUMS}
    models, counted = (list(dict.fromkeys(getattr(of, name) for of in found)) for name in ("model", "counted_by"))
    of_all = Forecast("score", ", ".join(filter(None, models)), "; ".join(counted), all(of.exact for of in found))
    return replace(of_all, judges=list(found), **sums)


def _estimate(
    found: Forecast, usage: Mapping[str, float], options: LlmOptions, prices: Prices | None, thinks: bool
) -> None:
    """Estimate time, price and output tokens from this model's earlier requests."""
    if (found.stage == "explain" or thinks) and usage["completion_tokens"]:
        found.completion_tokens = round(found.requests * usage["completion_tokens"] / usage["requests"])
    elif thinks:
        found.completion_tokens = found.completion_at_most
        found.notes.append("the model thinks before it answers; output tokens are the most that it may write")
    if usage["requests"] and usage["seconds"]:
        found.seconds = found.requests * usage["seconds"] / usage["requests"] / options.concurrency
    if options.requests_per_second:
        found.seconds = max(found.seconds or 0.0, found.requests / options.requests_per_second)
    if prices is not None:
        found.dollars = prices.of(found.prompt_tokens, found.cached_tokens, found.completion_tokens)
        if prices.cached is None and found.cached_tokens:
            found.notes.append(
                "cached prompt tokens are priced like any other; --price-cached gives them a price of their own"
            )


async def _counted(stage: str, asked: _Asked, tokenize: Tokenize) -> Forecast:
    """Return the forecast's counts of requests and tokens."""
    notes = [*asked.notes, *([tokenize.note] if tokenize.note else [])]
    found = Forecast(stage, asked.client.model, tokenize.name, tokenize.exact, notes=notes)
    found.requests, found.requests_at_least = len(asked.most), asked.least
    found.answered_before, found.from_cache = asked.before, asked.from_cache
    blocks: set[bytes] = set()
    for request in asked.most:
        tokens = await tokenize.of_messages(request.messages)
        found.prompt_tokens += len(tokens)
        found.cached_tokens += count_cached(tokens, blocks)
        found.completion_tokens += _written(asked, request, tokenize)
        found.completion_at_most += asked.client.capabilities.give_room(request).max_tokens
    return found


def _written(asked: _Asked, request: Request, tokenize: Tokenize) -> int:
    """Return the tokens of the answer. A longer answer than one label also has an end token."""
    if asked.answer_like is None:
        return EXPLANATION_TOKENS
    answer = asked.answer_like(request)
    return 1 if len(answer) == 1 else tokenize.length(answer) + 1


def _usage(runs: Sequence[Run], stage: str, model: str) -> dict[str, float]:
    """Return this model's earlier usage for this stage, over all runs of the command."""
    total = dict.fromkeys(("requests", "prompt_tokens", "completion_tokens", "seconds"), 0.0)
    for run in runs:
        if run.journal_path.exists():
            with open_journal(run) as journal:
                rows = journal.usage()
            rows = rows[(rows["stage"] == stage) & (rows["model"] == model)]
            for column in total:
                total[column] += float(rows[column].sum())
    return total


async def _never() -> str:
    raise AssertionError("a dry run starts no server")


def _free(stage: str, name: str) -> Forecast:
    who = "the n-gram baseline" if name == BASELINE else name
    return Forecast(stage, "", f"nothing: {who} asks no model", exact=True, seconds=None, dollars=0.0)
