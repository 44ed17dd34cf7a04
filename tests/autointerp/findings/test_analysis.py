"""The findings against an independent recount of the same files, stage by stage, failures included."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_study
from scipy import stats
from small_study import findings

from autointerp.findings.evidence import View
from autointerp.findings.latent import latent_findings
from autointerp.journal.journal import Journal
from sae.alignment.alignment import read_alignment
from sae.alignment.nulls import read_null
from sae.alignment.overlap import find_shared
from sae.common.errors import BadInput, NotFound
from sae.common.files import read_table, write_table
from sae.study.run import Run

NAMES = ["run_a", "run_b", "run_c"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    small_study.whole(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


@pytest.fixture(scope="module")
def found(made: Path) -> dict[str, Any]:
    return findings(made, NAMES, contexts=small_study.contexts)


def own_rows(root: Path, control: str = "none") -> pd.DataFrame:
    table = read_table(Run("run_a", root).stage_path("scores"))
    return table[(table["control"] == control) & (table["status"] == "ok")].set_index("latent")


def strict_with(root: Path, other: str) -> np.ndarray:
    return find_shared(read_alignment(root / "alignments", "run_a", other).a, "strict")


def test_findings_are_plain_json(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"overlap", "similarity", "scores", "relation", "methods", "interesting", "failures"} <= found.keys()
    assert found["missing"] == []


def test_overlap_equals_a_recount(made: Path, found: dict[str, Any]) -> None:
    tree = found["overlap"]
    alive = {n: ~read_table(Run(n, made).stage_path("firing"))["dead"].to_numpy() for n in NAMES}
    pairs = {}
    for i, a in enumerate(NAMES):
        for b in NAMES[i + 1 :]:
            both = read_alignment(made / "alignments", a, b)
            pairs[f"{a}--{b}"] = np.mean(
                [find_shared(both.a, "strict")[alive[a]].mean(), find_shared(both.b, "strict")[alive[b]].mean()]
            )
    assert tree["strict"]["pairs"] == pytest.approx(pairs)
    assert tree["strict"]["value"] == pytest.approx(np.mean(list(pairs.values())))
    low, high = tree["strict"]["interval"]
    assert low <= tree["strict"]["value"] <= high
    assert len(tree["only_one"]) == len(tree["all_of_n"]) == 3
    assert tree["only_one"][0] == tree["all_of_n"][0] == 1
    assert tree["only_one"][1] + tree["all_of_n"][1] == pytest.approx(1)
    # What was made to be shared is what is found to be.
    assert tree["strict"]["value"] == pytest.approx(0.4, abs=0.06)


def test_membership_parts_are_the_runs_latents(made: Path, found: dict[str, Any]) -> None:
    alive = ~read_table(Run("run_a", made).stage_path("firing"))["dead"].to_numpy()
    b, c = (strict_with(made, n)[alive] for n in ("run_b", "run_c"))
    counts = {part["label"]: part["n"] for part in found["membership"]["parts"]}
    assert counts == {
        "only run_a": (~b & ~c).sum(),
        "with run_b alone": (b & ~c).sum(),
        "with run_c alone": (~b & c).sum(),
        "with both": (b & c).sum(),
    }
    assert sum(p["fraction"] for p in found["membership"]["parts"]) == pytest.approx(1)


def test_nulls_equal_a_recount(tmp_path: Path) -> None:
    """Every figure of a null is the real one's, of the null's columns."""
    small_study.whole(tmp_path, m=60, n_scored=10, nulls=True)
    found = findings(tmp_path, NAMES, View(definition="lenient", threshold=0.4))
    alive = {n: ~read_table(Run(n, tmp_path).stage_path("firing"))["dead"].to_numpy() for n in NAMES}
    seen = {}
    for i, a in enumerate(NAMES):
        for b in NAMES[i + 1 :]:
            both = read_alignment(tmp_path / "alignments", a, b)
            seen[a, b], seen[b, a] = (read_null(of) for of in (both.a, both.b))
    for name in ("strict", "both", "decoder", "lenient"):
        held = {
            pair: find_shared(table, name, 0.4)[alive[pair[0]]] for pair, table in seen.items() if table is not None
        }
        pairs = {f"{a}--{b}": (held[a, b].mean() + held[b, a].mean()) / 2 for a, b in held if a < b}
        tree = found["overlap"][name]
        assert tree["pairs_null"]["rotated"] == pytest.approx(pairs)
        assert tree["null"]["rotated"] == pytest.approx(np.mean([*pairs.values()]))
        assert tree["null_range"]["rotated"] == pytest.approx([min(pairs.values()), max(pairs.values())])
        counts = {a: sum(held[a, b].astype(int) for b in NAMES if b != a) for a in NAMES}
        exactly = [np.mean([np.mean(of == n) for of in counts.values()]) for n in range(3)]
        assert tree["exactly_n_null"]["rotated"] == pytest.approx(exactly)
        assert tree["only_one_null"]["rotated"][2] == pytest.approx(exactly[0])
        assert tree["all_of_n_null"]["rotated"][2] == pytest.approx(exactly[2])
    of_null = found["overlap"]["nulls"]["rotated"]
    assert (
        of_null["pairs"] == found["overlap"]["lenient"]["pairs_null"]["rotated"] != found["overlap"]["strict"]["pairs"]
    )
    assert of_null["exactly_n"] == found["overlap"]["lenient"]["exactly_n_null"]["rotated"]
    with_b, with_c = held["run_a", "run_b"], held["run_a", "run_c"]
    assert 0 < with_b.mean() < 1  # so that there is something to count
    parts = {part["label"]: part["null"]["rotated"] for part in found["membership"]["parts"]}
    assert parts == pytest.approx(
        {
            "only run_a": (~with_b & ~with_c).mean(),
            "with run_b alone": (with_b & ~with_c).mean(),
            "with run_c alone": (~with_b & with_c).mean(),
            "with both": (with_b & with_c).mean(),
        }
    )
    similar = found["similarity"]["null"]["rotated"]
    means = [table["max_decoder_cosine"][alive[pair[0]]].mean() for pair, table in seen.items() if table is not None]
    assert similar["mean_max_decoder"] == pytest.approx(np.mean(means))
    assert similar["mean_max_decoder_range"][0] <= np.mean(means) <= similar["mean_max_decoder_range"][1]
    n = sum(alive[a].sum() for a, _ in seen)
    assert sum(found["similarity"]["histogram"]["null"]["rotated"]["counts"]) == n
    assert found["similarity"]["pw_mcc"]["null_sd"]["rotated"] > 0


def test_a_single_pair_has_a_null_without_range(tmp_path: Path) -> None:
    small_study.whole(tmp_path, seeds=2, m=40, n_scored=10, nulls=True)
    found = findings(tmp_path, NAMES[:2])
    assert found["overlap"]["strict"]["null"]["rotated"] == 0
    assert found["overlap"]["strict"]["null_range"] == {"rotated": None}
    assert found["similarity"]["null"]["rotated"]["mean_encoder_range"] is None
    assert found["similarity"]["pw_mcc"]["null_sd"] == {"rotated": None}
    json.dumps(found, allow_nan=False)


def test_many_runs_are_counted_by_number(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path, 4, m=40, d=16)
    small_study.harvested(runs)
    small_study.aligned(runs)
    found = findings(tmp_path, [r.name for r in runs])
    parts = found["membership"]["parts"]
    assert [p["label"] for p in parts] == ["only run_a", "with 1 of 3", "with 2 of 3", "with all 3 others"]
    assert sum(p["n"] for p in parts) == found["membership"]["n_alive"]


def test_frequency_by_class_covers_every_alive_latent(made: Path, found: dict[str, Any]) -> None:
    tree = found["frequency_by_class"]
    alive = int((~read_table(Run("run_a", made).stage_path("firing"))["dead"]).sum())
    assert sum(row["n"] for row in tree.values()) == alive
    assert sum(sum(row["histogram"]["counts"]) for row in tree.values()) == alive
    assert tree["all"]["median"] > 3 * tree["one"]["median"]
    assert found["firing"]["tokens"] == small_study.HARVESTED


def test_scores_equal_numpy(made: Path, found: dict[str, Any]) -> None:
    values = own_rows(made)["balanced_accuracy"]
    tree = found["scores"]
    assert tree["mean"] == pytest.approx(values.mean())
    assert tree["quartiles"] == pytest.approx(list(np.percentile(values, [25, 50, 75])))
    assert tree["n_scored"] == len(values) == sum(tree["histogram"]["counts"])
    assert tree["n_failed"] == 0
    assert tree["waiting"] is None
    low, high = tree["interval"]
    assert low < tree["mean"] < high


def test_control_is_paired_by_latent(made: Path, found: dict[str, Any]) -> None:
    table = read_table(Run("run_a", made).stage_path("scores"))
    swapped = table[table["control"] == "swap"].set_index("latent")["balanced_accuracy"]
    differences = own_rows(made)["balanced_accuracy"] - swapped
    control = found["scores"]["control"]
    assert control["mean"] == pytest.approx(swapped.mean())
    assert control["above_control"]["mean"] == pytest.approx(differences.mean())
    assert control["above_control"]["fraction"] == pytest.approx((differences > 0).mean())


def test_counts_by_class_equal_a_recount(made: Path, found: dict[str, Any]) -> None:
    run = Run("run_a", made)
    n = strict_with(made, "run_b").astype(int) + strict_with(made, "run_c")
    classes = np.select([n == 0, n == 2], ["one", "all"], default="some")
    alive, scored = ~read_table(run.stage_path("firing"))["dead"].to_numpy(), own_rows(made)
    eligible = read_table(run.stage_path("contexts"))["eligible"].to_numpy()
    for name, row in found["scores"]["by_class"].items():
        members = classes == name
        inside = scored[members[scored.index]]
        assert row["n_latents"] == members.sum()
        assert row["n_alive"] == (members & alive).sum()
        assert row["n_eligible"] == (members & eligible).sum()
        assert row["n_scored"] == len(inside)
        if len(inside):
            assert row["mean"] == pytest.approx(inside["balanced_accuracy"].mean())
    assert sum(r["n_latents"] for r in found["scores"]["by_class"].values()) == len(n)


def test_relation_equals_scipy(made: Path, found: dict[str, Any]) -> None:
    similarity = np.mean(
        [
            read_alignment(made / "alignments", "run_a", b).a[["encoder_cosine", "decoder_cosine"]].mean(axis=1)
            for b in ("run_b", "run_c")
        ],
        axis=0,
    )
    scored = own_rows(made)
    alive = ~read_table(Run("run_a", made).stage_path("firing"))["dead"].to_numpy()
    scored = scored[alive[scored.index]]
    expected = stats.spearmanr(similarity[scored.index], scored["balanced_accuracy"]).statistic
    tree = found["relation"]
    assert tree["n"] == len(scored)
    assert tree["spearman"] == pytest.approx(expected, abs=1e-6)
    assert tree["interval"][0] < tree["spearman"] < tree["interval"][1]
    assert sum(s["n"] for s in tree["strata"]) == sum(b["n"] for b in tree["bins"]) == tree["n"]
    swapped = own_rows(made, "swap")
    both = (scored["balanced_accuracy"] - swapped["balanced_accuracy"]).dropna()
    for quarter in tree["bins"]:
        inside = pd.Series(similarity[both.index], both.index).between(quarter["low"] - 1e-9, quarter["high"] + 1e-9)
        above = quarter["above_control"]
        assert above["n"] == inside.sum() > 0
        assert above["mean"] == pytest.approx(both[inside].mean())
        assert above["interval"][0] < above["mean"] < above["interval"][1]
    # The relation was built through sharing, which also drives the frequency: holding it fixed takes some away.
    assert tree["spearman"] > 0.3
    assert tree["partial"]["value"] < tree["spearman"]


def test_interesting_are_unshared_and_well_explained(made: Path, found: dict[str, Any]) -> None:
    lone = ~strict_with(made, "run_b") & ~strict_with(made, "run_c")
    lows = [entry["interval"][0] for entry in found["interesting"]]
    assert lows
    assert lows == sorted(lows, reverse=True)
    assert min(lows) > 0.5
    for entry in found["interesting"]:
        assert lone[entry["latent"]]
        assert entry["score"] > entry["control"]
        assert f"token{entry['latent']}" in entry["explanation"]
        peaks = [max(c["activations"]) for c in entry["contexts"]]
        assert len(peaks) == 3
        assert peaks == sorted(peaks, reverse=True)


def test_a_failure_is_counted_and_never_zero(root: Path) -> None:
    run = Run("run_a", root)
    run.journal_path.unlink()
    run.stage_path("scores").unlink()
    latents = list(range(60))
    numbers = small_study.explained(run, latents, failing={3: "no [EXPLANATION] line", 4: "too few contexts: 2 of 10"})
    lost = [
        {
            "latent": latent,
            "explanation_id": 900 + latent,
            "control": "none",
            **small_study.EXPLAINED_BY,
            "status": f"failed: no explanation: {why}",
        }
        for latent, why in ((3, "no [EXPLANATION] line"), (4, "too few contexts: 2 of 10"))
    ]
    small_study.scored(run, numbers, failing={7: "30 of 100 answers failed"}, more=lost)
    found = findings(root, NAMES)
    scores, failures = found["scores"], found["failures"]
    assert scores["n_scored"] == 57
    assert scores["n_failed"] == 2  # 3 and 7
    assert scores["n_ineligible"] == 1  # 4
    assert scores["mean"] == pytest.approx(own_rows(root)["balanced_accuracy"].mean())
    assert min(scores["quartiles"]) > 0.4
    assert {(r["stage"], r["reason"]): r["latents"] for r in failures["reasons"]} == {
        ("explain", "no [EXPLANATION] line"): [3],
        ("score", "30 of 100 answers failed"): [7],
    }
    assert failures["n"] == 2
    assert "explain --sae run_a --indices 3 " in failures["retry"]


@pytest.mark.parametrize("model", ["", "some-model"])
def test_advice_has_a_placeholder_for_the_model(root: Path, model: str) -> None:
    """Else n-grams would answer, whose explanations are no more of the same kind."""
    run = Run("run_a", root)
    if model:
        with Journal(run.journal_path) as journal:
            hashes: dict[str, Any] = {"settings_hash": "x" * 64, "prompt_hash": "p" * 64}
            numbers = {
                latent: journal.add_explanation(
                    latent=latent, explainer="llm", model=model, contexts=[1], text="of a model", **hashes
                )
                for latent in range(0, 60, 2)
            }
        mine = read_table(run.stage_path("scores"))
        mine = mine[(mine["control"] == "none") & mine["latent"].isin(list(numbers)[1:])]
        by = {"explainer": "llm", "judge": "llm", "explainer_model": model, "model": model}
        by |= {"explain_settings_hash": "x" * 64, "explain_prompt_hash": "p" * 64, "judge_prompt_hash": "j"}
        mine = mine.assign(explanation_id=mine["latent"].map(numbers), **by)
        write_table(run.stage_path("scores"), mine)
    found = findings(root, NAMES)
    rows = {row["id"]: row for row in found["findings"]}
    advised = [str(rows[name]["command"]) for name in ("frequent-low", "both-scored") if rows[name]["command"]]
    if found["scores"]["waiting"]:
        advised.append(found["scores"]["waiting"]["command"])
    assert advised
    assert all(("--llm-url URL" in command) == bool(model) for command in advised), advised
    if model:
        assert found["scores"]["waiting"]["n"] == 1
        write_table(run.stage_path("scores"), mine.assign(latent=mine["latent"] + 0).iloc[:0])
        assert "--llm-url URL" in findings(root, NAMES)["scores"]["waiting"]["command"]


def test_every_missing_stage_is_named_with_its_command(tmp_path: Path) -> None:
    def stages() -> list[str]:
        found = findings(tmp_path, NAMES)
        json.dumps(found, allow_nan=False)
        for entry in found["missing"]:
            assert f"--root {tmp_path}" in entry["command"]
        return [entry["stage"] for entry in found["missing"]]

    runs = small_study.runs_of(tmp_path, m=40, d=16)
    assert stages() == ["harvest", "overlap", "explain", "score"]
    small_study.harvested(runs)
    assert stages() == ["overlap", "explain", "score"]
    assert findings(tmp_path, NAMES)["overlap"] is None
    small_study.aligned(runs)
    assert stages() == ["explain", "score"]
    numbers = small_study.explained(runs[0], [1, 2, 3, 4])
    assert stages() == ["score"]
    assert findings(tmp_path, NAMES)["scores"]["waiting"]["n"] == 4
    small_study.scored(runs[0], {k: v for k, v in numbers.items() if k < 4})
    assert stages() == []
    assert findings(tmp_path, NAMES)["scores"]["waiting"]["n"] == 1
    runs[2].weights_path.unlink()
    assert stages() == ["train"]


def test_alignment_alone_counts_every_latent(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path, 2, m=40, d=16)
    small_study.aligned(runs)
    tree = findings(tmp_path, ["run_a", "run_b"])["overlap"]
    assert tree["strict"]["value"] == tree["strict"]["over_all_latents"]
    assert tree["over"].startswith("all latents")


def test_one_run_alone(tmp_path: Path) -> None:
    small_study.whole(tmp_path, seeds=1, m=60, n_scored=30)
    found = findings(tmp_path, ["run_a"])
    assert found["overlap"] is None
    assert found["relation"] is None
    assert found["interesting"] is None
    assert found["scores"]["n_scored"] > 0
    assert found["scores"]["by_class"] is None
    (entry,) = found["missing"]
    assert entry["stage"] == "overlap"
    assert "train --name run --seeds 0 1" in entry["command"]


def test_a_run_that_is_not_aligned_is_named(root: Path) -> None:
    for path in (root / "alignments").glob("*run_c*"):
        path.unlink()
    found = findings(root, NAMES)
    assert found["compared"] == ["run_a", "run_b"]
    assert list(found["overlap"]["strict"]["pairs"]) == ["run_a--run_b"]
    assert [(e["stage"], "run_c" in e["says"]) for e in found["missing"]] == [("overlap", True)]
    assert [p["label"] for p in found["membership"]["parts"]] == ["only run_a", "with run_b"]


def test_the_view_changes_what_is_shared(made: Path, found: dict[str, Any]) -> None:
    lenient = findings(made, NAMES, View(definition="lenient"))
    assert lenient["membership"]["parts"][0]["n"] < found["membership"]["parts"][0]["n"]
    assert lenient["overlap"]["only_one"] == lenient["overlap"]["lenient"]["only_one"]
    stern = findings(made, NAMES, View(threshold=0.97))
    assert stern["overlap"]["strict"]["value"] < found["overlap"]["strict"]["value"]
    fewer = findings(made, NAMES, View(against=("run_b",)))
    assert "some" not in fewer["scores"]["by_class"]
    other = findings(made, NAMES, View(focus="run_b"))
    assert other["focus"] == "run_b"
    assert other["scores"] is None


@pytest.mark.parametrize(
    ("names", "view", "error", "words"),
    [
        (["run_z"], View(), NotFound, "run_z"),
        ([], View(), NotFound, "nothing to report"),
        (NAMES, View(focus="run_d"), NotFound, "run_d"),
        (NAMES, View(against=("other",)), NotFound, "other"),
        (NAMES, View(definition="strong"), BadInput, "strict"),
    ],
)
def test_unknown_names_are_one_line(
    made: Path, names: list[str], view: View, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        findings(made, names, view)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_latent_beside_the_alignment(made: Path) -> None:
    found = latent_findings(Run("run_a", made), 5)
    json.dumps(found, allow_nan=False)
    row = read_alignment(made / "alignments", "run_a", "run_c").a.iloc[5]
    match = found["matches"][1]
    assert match["run"] == "run_c"
    assert match["decoder_partner"] == row["decoder_partner"] == 5
    assert match["encoder_cosine"] == pytest.approx(row["encoder_cosine"])
    assert match["shared"] == {"strict": True, "both": True, "decoder": True, "lenient": True}
    assert found["n_shared"] == 2
    assert found["explanations"][0]["text"].startswith("Active where")
    assert {s["control"] for s in found["scores"]} == {"none", "swap"}
    assert found["contexts"] == []
    assert found["activations"] is None
    with pytest.raises(NotFound, match="0 to 119"):
        latent_findings(Run("run_a", made), 120)


def test_a_report_does_not_load_torch() -> None:
    code = (
        "import sys, autointerp.findings.study, autointerp.findings.latent, autointerp.report.terminal, "
        "autointerp.report.latent, autointerp.report.stages; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[3]).returncode == 0
