"""Explaining and scoring by a language model that a real vLLM server serves, through the commands themselves.

The server answers with the bundled model, four million parameters trained on Python source. Of its answers nothing is
expected but that every one of them ends as a result or as a failure with its reason: such a model may well write white
space until it is cut off. What *is* expected is what does not depend on how clever it is: that probabilities are the
model's own, that tokens are counted, that a repeated prefix is read once, that too long a prompt says so.

Our prompts are longer than the 1,024 tokens that it was trained on. Its positions are rotary, so it reads them all the
same, if badly, and that is enough here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from vllm_server import REPOSITORY, VllmServer

from autointerp.contexts.material import Material
from autointerp.journal.journal import Journal
from autointerp.llm.client import LlmClient, ResponseCache
from autointerp.llm.exchange import Answer, Request
from autointerp.scoring.judges.llm import _AROUND_LABELS, LlmJudge
from autointerp.scoring.scorers.base import HARDER
from sae.common.files import read_table
from sae.study.run import Run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

BUNDLED = REPOSITORY / "sae" / "activations" / "bundled" / "pystdlib-4m"
FEW = 512
"""Tokens: fewer than any of our prompts has."""
N_LATENTS = 8
TEXTS = [str(Path(argparse.__file__).with_name(f"{name}.py")) for name in ("argparse", "inspect", "subprocess", "ast")]
RECIPE = """
[contexts]
n_explain = 12
n_active = 6
n_inactive = 6
n_hard = 4
n_same_token = 4
"""
LOGPROB_TOLERANCE = 0.15
"""Of a log-probability: the server computes in bfloat16, the reference in float32. Measured: .06 at most."""
P_TOLERANCE = 0.03
"""Of P(active). Measured: .009 at most."""


def limited(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint that takes ``FEW`` tokens."""
    copy = Path(shutil.copytree(model, folder / f"{model.name}-{FEW}"))
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**values, key: FEW}, indent=2))
    return copy


@dataclass(frozen=True)
class Served:
    """A server and the checkpoint it serves."""

    server: VllmServer
    model: Path

    @property
    def url(self) -> str:
        return self.server.url


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with VllmServer(BUNDLED, folder / "vllm.log") as server:
        yield Served(server, BUNDLED)


def command(root: Path, name: str, *arguments: object) -> tuple[int, dict[str, Any], str]:
    """``python cli.py name arguments``: exit code, the object on standard output, standard error."""
    keys = ("OPENAI_API_KEY", "AUTOINTERP_API_KEY", "OPENAI_BASE_URL")
    done = subprocess.run(
        [sys.executable, REPOSITORY / "cli.py", name, *map(str, arguments), "--root", root, "--json"],
        cwd=root.parent,
        env={key: value for key, value in os.environ.items() if key not in keys} | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "Traceback" not in done.stderr, done.stderr[-5000:]
    assert done.stdout, f"{name} printed no object and ended with code {done.returncode}: {done.stderr[-2000:]}"
    return done.returncode, json.loads(done.stdout), done.stderr


def trained(root: Path) -> Run:
    """A tiny SAE on a few files of the standard library, not yet explained."""
    recipe = root.parent / "recipe.toml"
    recipe.write_text(RECIPE)
    code, found, said = command(
        root,
        "train",
        *(
            "--recipe",
            recipe,
            "--no-controls",
            "--seeds",
            0,
            "--tokens",
            "60k",
            "--num-latents",
            64,
            "--k",
            4,
            "--context",
            128,
        ),
        *("--text", *TEXTS),
    )
    assert code == 0, said
    assert [run["name"] for run in found["runs"]] == ["run_a"]
    return Run.open("run_a", root)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("study") / "runs")


@pytest.fixture(scope="module")
def told(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the run, whose latents the served model explains."""
    return Run.open("run_a", Path(shutil.copytree(run.root, tmp_path_factory.mktemp("told") / "runs")))


@pytest.fixture(scope="module")
def explained(told: Run, served: Served) -> dict[str, Any]:
    """What ``explain`` said."""
    chosen = ("--sae", "run_a", "--latents", N_LATENTS, "--llm-url", served.url)
    code, found, said = command(told.root, "explain", *chosen)
    assert code == (3 if found["n_failed"] else 0), said
    return {str(column): value for column, value in found.items()}


@pytest.fixture(scope="module")
def by_ngrams(run: Run, told: Run) -> None:  # noqa: ARG001
    """The latents of ``run`` are explained by n-grams alone: a small model's explanations may all fail, and where a
    model was asked for some, n-grams are only judged as the baseline."""
    code, _, said = command(run.root, "explain", "--sae", "run_a", "--latents", N_LATENTS, "--explainer", "ngram")
    assert code == 0, said


@pytest.fixture(scope="module", params=["single", "batch"])
def scored(request: pytest.FixtureRequest, run: Run, served: Served, by_ngrams: None) -> dict[str, Any]:  # noqa: ARG001
    """What ``score`` said under one protocol."""
    code, found, said = command(run.root, "score", "--llm-url", served.url, "--protocol", request.param)
    assert code == (3 if found["n_failed"] else 0), said
    return {**found, "protocol": request.param}


def judge_of(served: Served, protocol: str) -> LlmJudge:
    return LlmJudge(LlmClient(served.url, served.model.name), protocol)  # type: ignore[arg-type]


def verdicts_of(run: Run, served: Served, protocol: str) -> pd.DataFrame:
    with Journal(run.journal_path) as journal:
        return journal.verdicts(judge="llm", prompt_hash=judge_of(served, protocol).prompt_hash)


def usage_of(run: Run, stage: str) -> dict[str, Any]:
    with Journal(run.journal_path) as journal:
        found = journal.usage().set_index("stage").loc[stage].to_dict()
    return {str(column): value for column, value in found.items()}


def test_every_latent_is_explained_or_says_why_not(told: Run, served: Served, explained: dict[str, Any]) -> None:
    assert explained["n_done"] + explained["n_failed"] == N_LATENTS
    assert explained["backend"] == f"llm ({served.model.name})"
    with Journal(told.journal_path) as journal:
        rows = journal.explanations(explainer="llm")
    assert len(rows) == N_LATENTS
    assert (rows["status"] == "ok").sum() == explained["n_done"]
    failed = rows[rows["status"] == "failed"]
    assert failed["failure"].str.len().gt(0).all()
    assert sum(explained["failures"].values()) == len(failed)
    usage = usage_of(told, "explain")
    assert usage["requests"] >= N_LATENTS
    assert usage["prompt_tokens"] >= 1000 * usage["requests"]
    assert usage["completion_tokens"] > 0


def test_every_explanation_is_scored_or_says_why_not(run: Run, served: Served, scored: dict[str, Any]) -> None:
    with Journal(run.journal_path) as journal:
        explanations = journal.explanations()
    assert scored["n_done"] + scored["n_failed"] == len(explanations) == N_LATENTS
    good = explanations[explanations["status"] == "ok"]
    verdicts = verdicts_of(run, served, scored["protocol"])
    own = verdicts[verdicts["control"] == "none"]
    assert set(own["explanation_id"]) == set(good["id"])
    scored_on = own[~own["negative_kind"].isin(HARDER)]
    assert (scored_on.groupby("explanation_id").size() == 12).all(), "every context has its verdict, or its failure"
    assert (verdicts["label"].isna() == verdicts["failure"].notna()).all()
    assert verdicts.loc[verdicts["failure"].notna(), "p"].isna().all()

    table = read_table(run.stage_path("scores"))
    mine = table[(table["judge_prompt_hash"] == judge_of(served, scored["protocol"]).prompt_hash)]
    assert set(mine.loc[mine["control"] == "none", "explanation_id"]) == set(good["id"])
    for row in mine.to_dict("records"):
        if row["status"] == "ok":
            assert 0 <= row["balanced_accuracy"] <= 1
            assert row["n_active"] + row["n_inactive"] + row["n_failed"] == 12
        else:
            assert row["status"].startswith("failed: ")
            assert math.isnan(row["balanced_accuracy"]), "a failure is no zero"


def test_what_was_answered_is_not_asked_again(run: Run, served: Served, scored: dict[str, Any]) -> None:
    before = verdicts_of(run, served, scored["protocol"]).set_index("id")
    code, found, said = command(run.root, "score", "--llm-url", served.url, "--protocol", scored["protocol"])
    assert code == (3 if found["n_failed"] else 0), said
    after = verdicts_of(run, served, scored["protocol"]).set_index("id")
    answered = before.index[before["failure"].isna()]
    pd.testing.assert_frame_equal(before.loc[answered], after.loc[answered])
    assert found["n_done"] >= scored["n_done"]
    if before["failure"].isna().all():
        assert found["n_new"] == 0
        assert len(after) == len(before)


@pytest.mark.usefixtures("scored")
def test_the_common_prefix_is_read_once(run: Run, served: Served) -> None:
    asked, hits = (served.server.metric(f"vllm:prefix_cache_{what}_total") for what in ("queries", "hits"))
    assert hits > 0.5 * asked, "the examples before each question are most of it"
    for stage in ("score", "control"):
        usage = usage_of(run, stage)
        assert 0.5 * usage["prompt_tokens"] < usage["cached_tokens"] <= usage["prompt_tokens"]


# P(active) against the same model in transformers


class Reference:
    """The served checkpoint in float32, asked what it gives to each token after a request's messages."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def prompt(self, request: Request) -> list[int]:
        text = self.tokenizer.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def logprobs(self, request: Request) -> dict[str, float]:
        """By the token's text."""
        torch = self._torch
        with torch.inference_mode():
            logits = self._model(torch.tensor([self.prompt(request)])).logits[0, -1]
        values = torch.log_softmax(logits.double(), -1).tolist()
        return {self.tokenizer.decode([i]): value for i, value in enumerate(values)}


def first_answers(run: Run, served: Served) -> Iterator[tuple[Request, Answer, float]]:
    """Requests of the ``single`` protocol with the server's answer (as it was kept) and the verdict's P(active).

    Only those answered by their very first token.
    """
    judge = judge_of(served, "single")
    sampler = Material.of(run).sampler
    with Journal(run.journal_path) as journal:
        texts = journal.explanations(status="ok").set_index("id")["text"]
    kept = ResponseCache(run.root / "cache.sqlite")
    verdicts = verdicts_of(run, served, "single")
    for latent, rows in verdicts[verdicts["p"].notna()].groupby("latent"):
        both = sampler.testing(int(str(latent)))
        every = (*both.active, *both.inactive, *both.hard, *both.same_token)
        contexts = {context.window: context for context in every}
        for row in rows.to_dict("records"):
            request = judge.request(texts[row["explanation_id"]], [contexts[row["context"]]])
            answer = kept.get(request.key(served.model.name))
            assert answer is not None, "a verdict whose answer was not kept"
            assert answer.tokens is not None
            if answer.tokens[0].strip(_AROUND_LABELS):
                yield request, answer, row["p"]
    kept.close()


@pytest.mark.parametrize("scored", ["single"], indirect=True)
@pytest.mark.usefixtures("scored")
def test_p_active_is_the_models_own(run: Run, served: Served) -> None:
    verdicts = verdicts_of(run, served, "single")
    assert verdicts["p"].notna().any(), "no verdict has a probability"
    assert verdicts["p"].dropna().between(0, 1).all()
    assert (verdicts["p"].dropna().ge(0.5) == verdicts.loc[verdicts["p"].notna(), "label"].astype(bool)).all()

    reference = Reference(served.model)
    compared = 0
    for request, answer, p in list(first_answers(run, served))[::4]:
        own = reference.logprobs(request)
        assert answer.top_logprobs is not None
        served_values = answer.top_logprobs[0]
        label_of = {token: token.strip(_AROUND_LABELS) for token in own}
        labels = [token for token in served_values if label_of.get(token) in ("0", "1")]
        for token in labels:
            assert served_values[token] == pytest.approx(own[token], abs=LOGPROB_TOLERANCE), token
        one, zero = (sum(math.exp(v) for t, v in own.items() if label_of[t] == label) for label in "10")
        expected = one / (one + zero)
        if {label_of[token] for token in labels} == {"0", "1"}:
            assert p == pytest.approx(expected, abs=P_TOLERANCE)
        else:  # the label that is not among the likeliest had at most so much: P may err towards one half, and only so
            assert min(0.5, expected) - P_TOLERANCE <= p <= max(0.5, expected) + P_TOLERANCE
        compared += 1
    assert compared >= 3


# too long a prompt


def test_a_prompt_beyond_the_context_is_one_line(tmp_path: Path) -> None:
    """A model of 512 tokens: not one of our prompts fits."""
    run = trained(tmp_path / "runs")
    chosen = ("--sae", "run_a", "--latents", 4)
    assert command(run.root, "explain", *chosen, "--explainer", "ngram")[0] == 0
    with VllmServer(limited(BUNDLED, tmp_path), tmp_path / "vllm.log") as server:
        asked = {
            "score": command(run.root, "score", "--llm-url", server.url, "--protocol", "single"),
            "explain": command(run.root, "explain", *chosen, "--llm-url", server.url),
        }
    code, found, said = asked["score"]
    assert code == 1
    assert said.rstrip().splitlines()[-1] == f"error: {found['error']}"
    assert "HTTP 400: This model's maximum context length is 512 tokens" in found["error"]
    # By now the context's length and how many tokens such text has are known, and nothing is sent that cannot fit.
    code, found, said = asked["explain"]
    assert code == 1
    assert said.rstrip().splitlines()[-1] == f"error: {found['error']}"
    assert re.search(r"the prompt is too long for the model: about \d+ tokens.*512; not sent", found["error"])
    with Journal(run.journal_path) as journal:
        assert (journal.explanations(explainer="llm")["status"] == "failed").all()
        assert journal.verdicts()["failure"].notna().all()
