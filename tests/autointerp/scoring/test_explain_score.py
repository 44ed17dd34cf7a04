"""Explaining and scoring over a real, tiny study, with explainers and judges that misbehave on purpose."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_study import findings
from tiny_study import change_record, journal, records

from autointerp.contexts.material import Material
from autointerp.contexts.sampler import Context
from autointerp.contexts.sampling import Sample, load_sample
from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import Outcome, explain_runs
from autointerp.explaining.explainers import EXPLAINERS
from autointerp.explaining.explainers.base import Explanation
from autointerp.findings.evidence import View
from autointerp.findings.latent import latent_findings
from autointerp.journal.journal import Journal
from autointerp.journal.usage import Usage
from autointerp.llm.limits import run_in_flight
from autointerp.llm.opening import resolve_name
from autointerp.llm.options import LlmOptions
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.judges.base import Judgement
from autointerp.scoring.score import open_judge, score_runs
from autointerp.scoring.swapping import swap_partners
from sae.common.errors import BadInput, Unavailable
from sae.common.files import read_table, table_metadata
from sae.common.progress import track
from sae.study.run import Run, all_runs
from sae.study.stage import Compute

NONE = LlmOptions(concurrency=4)


@dataclass
class FakeExplainer:
    """Explains by number; ``fails`` says which latents it fails on, ``breaks`` on which it stops everything."""

    asks_model: ClassVar[bool] = False
    name: str = "fake"
    settings_hash: str = "s"
    prompt_hash: str = "p"
    model: str = "m"
    needs_background: int = 3
    fails: frozenset[int] = frozenset()
    breaks: frozenset[int] = frozenset()
    asked: list[int] = field(default_factory=list)
    shown: dict[int, set[int]] = field(default_factory=dict)

    async def explain(self, latent: int, contexts: Sequence[Context], background: Sequence[Context]) -> Explanation:
        self.asked.append(latent)
        self.shown[latent] = {context.window for context in contexts}
        assert all(context.active for context in contexts)
        assert not any(context.active for context in background)
        await asyncio.sleep(0)
        if latent in self.breaks:
            raise Unavailable("gone")
        if latent in self.fails:
            return Explanation(None, "no idea", Usage(requests=1))
        return Explanation(f"statement {latent}", usage=Usage(requests=1))


Verdict = Callable[[str, Context, int], Judgement]


def right(_: str, context: Context, __: int) -> Judgement:
    return Judgement(0.9 if context.active else 0.1, context.active)


@dataclass
class FakeJudge:
    """Answers as ``verdict`` says, given the statement, the context and how many it has judged before."""

    asks_model: ClassVar[bool] = False
    reads: ClassVar[str | None] = None
    verdict: Verdict = right
    name: str = "fakejudge"
    settings_hash: str = "js"
    prompt_hash: str = "jp"
    model: str = "jm"
    contexts_per_request: int = 3
    judged: list[tuple[str, int]] = field(default_factory=list)

    def of_marks(self) -> FakeJudge:
        return replace(self, settings_hash="marked", judged=self.judged)

    async def judge(self, explanation_text: str, contexts: Sequence[Context]) -> list[Judgement]:
        assert 1 <= len(contexts) <= self.contexts_per_request
        await asyncio.sleep(0)
        found = []
        for context in contexts:
            found.append(self.verdict(explanation_text, context, len(self.judged)))
            self.judged.append((explanation_text, context.window))
        return found


@pytest.fixture
def run(tiny_root: Path) -> Run:
    """Harvested and aligned, and not yet explained."""
    return Run.open("run_b", tiny_root)


@pytest.fixture
def explain(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    def go(explainer: FakeExplainer, n: int = 8, **choice: Any) -> Outcome:
        @asynccontextmanager
        async def opened(*_: object) -> AsyncIterator[FakeExplainer]:
            yield explainer

        monkeypatch.setattr("autointerp.explaining.explain.open_method", opened)
        return explain_runs([run], Choice(n=n, **choice), "ngram", NONE, Compute("cpu"))

    return go


@pytest.fixture
def score(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    def go(judge: FakeJudge, control: int | None = None) -> Outcome:
        @asynccontextmanager
        async def opened(*_: object) -> AsyncIterator[FakeJudge]:
            yield judge

        monkeypatch.setattr("autointerp.scoring.score.open_judge", opened)
        return score_runs([run], run.root, ("detection",), "ngram", NONE, control)

    return go


Explain = Callable[..., Outcome]
Score = Callable[..., Outcome]


@dataclass
class Repeats(FakeExplainer):
    """Gives the same ``texts`` again and again."""

    texts: tuple[str, ...] = ("Commas.",)

    async def explain(self, latent: int, contexts: Sequence[Context], background: Sequence[Context]) -> Explanation:
        found = await super().explain(latent, contexts, background)
        return replace(found, text=self.texts[latent % len(self.texts)])


# --- explain ------------------------------------------------------------------------------------------------


def test_every_answer_is_journalled_with_its_inputs(run: Run, explain: Explain) -> None:
    fake = FakeExplainer()
    outcome = explain(fake)
    rows = journal(run.journal_path)["explanation"]
    assert (outcome.n_done, outcome.n_new, outcome.n_failed) == (8, 8, 0)
    assert {row["latent"]: set(row["contexts"]) for row in rows} == fake.shown
    assert all(row["text"] == f"statement {row['latent']}" and row["draw"] == 0 for row in rows)
    assert {(row["explainer"], row["prompt_hash"], row["model"]) for row in rows} == {("fake", "p", "m")}
    with Journal(run.journal_path) as opened:
        assert opened.usage()["requests"].tolist() == [8]


def the_latents(explain: Explain) -> list[int]:
    """Which latents a sample of eight takes, in the order in which they are asked."""
    probe = FakeExplainer(settings_hash="probe")
    explain(probe)
    return probe.asked


def test_what_failed_is_counted_and_asked_again_alone(explain: Explain) -> None:
    fails = frozenset(the_latents(explain)[:3])
    outcome = explain(FakeExplainer(fails=fails))
    assert outcome.failures == Counter({"no idea": 3})
    assert (outcome.n_done, outcome.n_new) == (5, 5)
    assert outcome.as_dict()["retry"] is None, "no command was typed"
    again = FakeExplainer()
    outcome = explain(again)
    assert set(again.asked) == fails
    assert (outcome.n_done, outcome.n_new, outcome.n_failed) == (8, 3, 0)


def test_an_end_of_everything_keeps_what_was_finished(explain: Explain) -> None:
    latents = the_latents(explain)
    first = FakeExplainer(breaks=frozenset({latents[6]}))
    with pytest.raises(Unavailable, match="gone"):
        explain(first)
    again = FakeExplainer()
    outcome = explain(again)
    assert outcome.n_done == 8
    assert latents[6] in again.asked
    assert len(again.asked) <= 2 + NONE.concurrency  # the last two, and those under way beside the seventh
    assert outcome.n_new == len(again.asked)


@pytest.mark.parametrize("changed", [{"settings_hash": "s2"}, {"prompt_hash": "p2"}, {"model": "m2"}, {"name": "n2"}])
def test_other_settings_stand_beside(run: Run, explain: Explain, changed: dict[str, str]) -> None:
    explain(FakeExplainer())
    before = journal(run.journal_path, times=True)["explanation"]
    assert explain(FakeExplainer(**changed)).n_new == 8  # type: ignore[arg-type]
    after = journal(run.journal_path, times=True)["explanation"]
    assert after[:8] == before
    assert len(after) == 16


def test_a_larger_sample_asks_only_for_the_rest(explain: Explain) -> None:
    explain(FakeExplainer(), n=5)
    more = FakeExplainer()
    outcome = explain(more, n=9)
    assert len(more.asked) == 4
    assert (outcome.n_done, outcome.n_new) == (9, 4)


def test_the_sample_is_recorded_before_asking(run: Run, explain: Explain, score: Score) -> None:
    broken = FakeExplainer(breaks=frozenset(range(run.settings.training.num_latents)))
    with pytest.raises(Unavailable):
        explain(broken, n=6)
    setup = {
        "explainer": "fake",
        "explainer_model": "m",
        "explain_prompt_hash": "p",
        "explain_settings_hash": table_metadata(run.stage_path("sample"))["draws"][0]["settings_hash"],
    }

    def kept() -> Sample:
        found = load_sample(run, setup)
        assert found is not None
        return found

    few = kept()
    assert len(few.drawn) == 6
    assert few.draws[0].about["strata"] == "similarity × log firing frequency"
    fake = FakeExplainer()
    explain(fake, n=9)
    more = kept()
    assert few.drawn < more.drawn == set(fake.asked)
    assert fake.asked != sorted(fake.asked)  # whatever was done by an early end would be a sample too
    outside = sorted(set(range(run.settings.training.num_latents)) - more.drawn)[:2]
    explain(FakeExplainer(), indices=tuple(outside))
    assert kept().drawn == more.drawn
    assert len(table_metadata(run.stage_path("sample"))["draws"]) == 1
    score(FakeJudge())
    found = findings(run.root, [r.name for r in all_runs(run.root)], View(focus=run.name, explainer="fake"))
    tree = found["scores"]["sample"]
    assert (tree["n_drawn"], tree["n_done"], tree["n_waiting"]) == (9, 9, 0)
    assert tree["n_scored"] + tree["n_failed"] == 9
    assert tree["n_outside"] == sum(row["latent"] in outside and row["status"] == "ok" for row in own(run))
    assert found["scores"]["mean"] == pytest.approx(1)


def test_partners_of_a_sample_are_on_record_too(run: Run, explain: Explain) -> None:
    explain(FakeExplainer(), n=9, with_partners=True)
    (sibling,) = run.siblings()
    draws = table_metadata(sibling.stage_path("sample"))["draws"]
    assert [entry["partners_of"] for entry in draws if entry["explainer"] == "fake"] == [run.name]
    with Journal(sibling.journal_path) as opened:
        asked = set(opened.explanations(explainer="fake")["latent"])
    table = read_table(sibling.stage_path("sample"))
    assert set(table["latent"][table["drawn"] & (table["draw"] == draws[-1]["draw"])]) == asked


def test_suspicious_explanations_are_counted_and_shown(run: Run, explain: Explain) -> None:
    explain(Repeats(texts=('The word "ananas" in a text.',)))
    outcome = explain(Repeats(texts=('The word "ananas" in a text.',)))
    flags = {"same text as 7 others": 8, "quotes nothing it saw": 8}
    assert outcome.flags == Counter(flags), "those of earlier calls count too"
    assert outcome.as_dict()["flags"] == flags
    rows = journal(run.journal_path)["explanation"]
    latents = sorted(row["latent"] for row in rows)
    assert all(row["quotes_unseen"] == 1 for row in rows)
    assert latent_findings(run, latents[0])["explanations"][0]["flags"] == list(flags)
    found = findings(run.root, [run.name], View(run.name))["scores"]["flags"]
    shown = [{"stage": "explain", "reason": flag, "n": 8, "latents": latents} for flag in flags]
    assert sorted(found, key=str) == sorted(shown, key=str)


def test_explanations_of_earlier_versions_have_no_flag_for_quotes(run: Run, explain: Explain) -> None:
    explain(Repeats(texts=('The word "ananas".', 'The word "banana".')))
    with closing(sqlite3.connect(run.journal_path)) as connection:
        connection.execute("UPDATE explanation SET quotes_unseen = NULL")
        connection.commit()
    assert "quotes nothing it saw" not in explain(Repeats()).flags


# --- score --------------------------------------------------------------------------------------------------


def own(run: Run) -> list[dict[str, Any]]:
    table = read_table(run.stage_path("scores"))
    return records(table[table["control"] == "none"])


def test_a_judge_that_is_right_scores_one(run: Run, explain: Explain, score: Score) -> None:
    fake = FakeExplainer()
    explain(fake)
    outcome = score(FakeJudge())
    assert (outcome.n_done, outcome.n_new, outcome.n_failed) == (8, 8, 0)
    for row in own(run):
        assert (row["balanced_accuracy"], row["auroc"], row["status"], row["n_failed"]) == (1, 1, "ok", 0)
        assert row["ba_low"] < 1
    # … and has never seen a window that the explainer saw.
    for verdict in journal(run.journal_path)["verdict"]:
        assert verdict["context"] not in fake.shown[verdict["latent"]]


def test_the_control_is_another_latents_statement(run: Run, explain: Explain, score: Score) -> None:
    explain(FakeExplainer())
    score(FakeJudge())
    stored = journal(run.journal_path)
    owner = {row["id"]: row["latent"] for row in stored["explanation"]}
    for verdict in stored["verdict"]:
        mine = owner[verdict["explanation_id"]] == verdict["latent"]
        assert mine == (verdict["control"] == "none")
    # On the very contexts of the score.
    by_control: dict[str, set[tuple[int, int]]] = {"none": set(), "swap": set()}
    for verdict in stored["verdict"]:
        by_control[verdict["control"]].add((verdict["latent"], verdict["context"]))
    assert by_control["swap"] <= by_control["none"]


@pytest.mark.parametrize("n", [0, 2])
def test_controls_may_be_fewer(run: Run, explain: Explain, score: Score, n: int) -> None:
    explain(FakeExplainer())
    score(FakeJudge(), n)
    table = read_table(run.stage_path("scores"))
    assert (table["control"] == "swap").sum() == n
    assert (table["control"] == "none").sum() == 8


def swapped_texts(run: Run) -> list[tuple[str, str]]:
    """The own and the other's text of each swapped control in the score table."""
    stored = journal(run.journal_path)["explanation"]
    text, mine = {row["id"]: row["text"] for row in stored}, {row["latent"]: row["text"] for row in stored}
    rows = [row for row in records(read_table(run.stage_path("scores"))) if row["control"] == "swap"]
    return [(mine[row["latent"]], text[row["explanation_id"]]) for row in rows]


def test_the_control_has_another_text(run: Run, explain: Explain, score: Score) -> None:
    explain(Repeats(texts=("Commas.", "commas", "Full stops.")))
    outcome = score(FakeJudge())
    swapped = swapped_texts(run)
    assert swapped
    assert all((own == "Full stops.") != (other == "Full stops.") for own, other in swapped)
    n_lacking = 8 - len(swapped)
    lacking = f"run_b: {n_lacking} explanations have no swapped control: no dissimilar latent with another text"
    assert (lacking in outcome.notes) == (n_lacking > 0)


def test_where_all_texts_are_equal_there_is_no_control(
    run: Run, explain: Explain, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    explain(Repeats())
    with monkeypatch.context() as patch:  # as earlier versions drew them
        patch.setattr("autointerp.scoring.questions.swap_partners", lambda *of, texts, **how: swap_partners(*of, **how))  # noqa: ARG005
        score(FakeJudge())
    assert any(verdict["control"] == "swap" for verdict in journal(run.journal_path)["verdict"])
    assert swapped_texts(run) == [], "a control with the same text shows nothing"
    outcome = score(FakeJudge())
    lacking = "run_b: 8 explanations have no swapped control: no dissimilar latent with another text"
    assert lacking in outcome.notes
    assert outcome.n_done == 8


def failing(every: int) -> Verdict:
    def verdict(text: str, context: Context, n: int) -> Judgement:
        return Judgement(None, None, "garbled") if n % every == 0 else right(text, context, n)

    return verdict


def test_some_failed_answers_are_counted_and_asked_again(run: Run, explain: Explain, score: Score) -> None:
    explain(FakeExplainer())
    first = FakeJudge(failing(10))
    score(first, 0)
    columns = ("n_failed", "n_failed_hard", "n_failed_same_token")
    failed = {row["latent"]: sum(row[c] for c in columns) for row in own(run)}
    assert sum(failed.values()) == len([i for i in range(len(first.judged)) if i % 10 == 0])
    assert all(row["balanced_accuracy"] == 1 for row in own(run) if row["status"] == "ok")  # a failure is no "no"
    second = FakeJudge()
    score(second, 0)
    assert len(second.judged) == sum(failed.values())
    assert all(row["balanced_accuracy"] == 1 and not any(row[c] for c in columns) for row in own(run))


def test_many_failed_answers_are_no_score(run: Run, explain: Explain, score: Score) -> None:
    explain(FakeExplainer())
    outcome = score(FakeJudge(failing(2)), 0)
    assert (outcome.n_done, outcome.n_failed) == (0, 8)
    for row in own(run):
        assert row["status"].startswith("failed: ")
        assert "garbled" in row["status"]
        assert row["balanced_accuracy"] is None


def test_a_judge_that_stops_keeps_every_request(run: Run, explain: Explain, score: Score) -> None:
    """What is judged is journalled request by request; the table in the end is that of an undisturbed scoring."""

    def stops(text: str, context: Context, n: int) -> Judgement:
        if n >= 40:
            raise Unavailable("gone")
        return right(text, context, n)

    explain(FakeExplainer())
    first = FakeJudge(stops)
    with pytest.raises(Unavailable, match="gone"):
        score(first)
    kept = journal(run.journal_path)["verdict"]
    assert len(kept) >= 40 - 3 * NONE.concurrency
    second = FakeJudge()
    score(second)
    resumed = own(run)
    everything = len(journal(run.journal_path)["verdict"])
    assert len(second.judged) == everything - len(kept)
    # The same, judged afresh under another name, in one go.
    score(FakeJudge(name="undisturbed"))
    fresh = [row for row in own(run) if row["judge"] == "undisturbed"]
    ignored = ("judge", "settings_hash", "stratum_tpr", "stratum_low", "stratum_high")

    def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k not in ignored} for row in rows]

    assert plain([row for row in resumed if row["judge"] == "fakejudge"]) == plain(fresh)


def test_latents_without_an_explanation_are_rows_too(run: Run, explain: Explain, score: Score) -> None:
    probe = FakeExplainer(settings_hash="probe")
    explain(probe, n=4)
    with Journal(run.journal_path) as opened:
        n_before = len(opened.explanations())
    assert n_before == 4
    for path in run.folder.glob("journal.sqlite*"):
        path.unlink()
    explain(FakeExplainer(fails=frozenset(probe.asked)), n=4)
    outcome = score(FakeJudge())
    assert (outcome.n_done, outcome.n_failed) == (0, 0), "scoring again would not mend it"
    assert outcome.left_out == Counter({"no explanation: no idea": 4})
    assert all(row["status"] == "failed: no explanation: no idea" for row in own(run))


# --- material, backends, work -------------------------------------------------------------------------------


def test_eligibility_is_recounted_only_when_settings_change(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Material.of(run).eligibility()
    assert 0 < first["eligible"].sum() <= len(first)
    assert (first["ineligible_reason"] == "").equals(first["eligible"])

    def refuse(*_: object) -> None:
        raise AssertionError("counted again")

    with monkeypatch.context() as patched:
        patched.setattr("autointerp.contexts.sampler.ContextSampler.eligible", refuse)
        assert records(Material.of(run).eligibility()) == records(first)
    values = run.settings.with_values(contexts={"min_active": 10}).model_dump(mode="json")
    change_record(run.folder / "run.json", settings=values)
    again = Material.of(Run.open(run.name, run.root))
    assert again.digest != Material.of(run).digest
    assert again.eligibility()["eligible"].sum() <= first["eligible"].sum()


names = st.none() | st.sampled_from(["http://a/v1", "b"])


@given(names, names, names, names)
def test_a_judge_of_its_own_is_just_that(
    url: str | None, model: str | None, judge_url: str | None, judge_model: str | None
) -> None:
    options = LlmOptions(url, model, judge_url, judge_model)
    judge = options.for_judge()
    assert judge.url == (judge_url or url)
    # Another server knows nothing of this one's model.
    assert judge.model == (judge_model or (None if judge_url else model))
    assert resolve_name(EXPLAINERS, "auto", options) == ("llm" if url or model else "ngram")
    assert resolve_name(JUDGES, "ngram", options) == "ngram"
    if options.is_named:
        assert resolve_name(EXPLAINERS, "llm", options) == "llm"
    else:
        with pytest.raises(BadInput, match="--explainer llm needs a language model"):
            resolve_name(EXPLAINERS, "llm", options)


def test_an_unknown_protocol_is_reported_before_opening(tmp_path: Path) -> None:
    async def opened() -> None:
        async with open_judge("auto", LlmOptions(url="http://127.0.0.1:9", protocol="chat"), tmp_path / "cache"):
            raise AssertionError

    with pytest.raises(BadInput, match="--protocol 'chat'"):
        asyncio.run(opened())
    assert not (tmp_path / "cache").exists()


@settings(max_examples=50)
@given(st.integers(0, 30), st.integers(1, 8), st.none() | st.integers(0, 29))
def test_work_in_flight(n: int, limit: int, breaks: int | None) -> None:
    """All of it, once each, never more than ``limit`` at a time; the first error is the one that is raised."""
    begun: list[int] = []
    now = most = 0

    async def work(item: int) -> None:
        nonlocal now, most
        begun.append(item)
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        if item == breaks:
            raise Unavailable(str(item))

    async def go() -> float:
        with track("work", n) as bar:
            await run_in_flight(range(n), work, limit, bar)
        return bar.done

    if breaks is not None and breaks < n:
        with pytest.raises(Unavailable, match=f"^{breaks}$"):
            asyncio.run(go())
        assert len(begun) <= breaks + 2 * limit
    else:
        assert asyncio.run(go()) == n
        assert begun == list(range(n))
    assert most <= limit


@given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 5)))
def test_an_outcome_counts_its_failures(failures: dict[str, int]) -> None:
    outcome = Outcome("explain", ["run_a"], "ngram", 5, 2, Counter(failures), retry="again")
    found = outcome.as_dict()
    assert found["n_failed"] == sum(failures.values()) == sum(found["failures"].values())
    assert found["retry"] == ("again" if failures else None)
