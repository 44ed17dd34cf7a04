"""Tables for other programs: what is read back is what was there, nothing is overwritten, what is missing is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_study
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_study import cli

from autointerp import Run as Opened
from autointerp.journal.journal import Journal, Verdict
from autointerp.report import export
from autointerp.report.export import TABLES, check_request, export_neuronpedia, export_table, frames_of
from autointerp.report.neuronpedia import Ids, lines_of
from sae.alignment.alignment import read_alignment
from sae.common.errors import BadInput, NotFound
from sae.common.files import read_table, table_metadata
from sae.study.run import Run

NASTY = "=HYPERLINK(\"x\")\r\nline,two\ttab 'q' \x1b[31m \u202e ‖ naïve 漢字\n"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A made-up study with every table that needs no model, its first run with hostile explanations."""
    runs = small_study.whole(tmp_path_factory.mktemp("tables"), nulls=True)
    table = small_study.scored(runs[1], small_study.explained(runs[1], list(range(50))))
    assert len(table)
    with Journal(runs[0].journal_path) as journal:
        about: dict[str, Any] = {
            "explainer": "llm",
            "settings_hash": "e" * 64,
            "prompt_hash": "p" * 64,
            "model": "a-model",
        }
        for latent, text in enumerate((NASTY, "None", "NA", "", "-1", '"', "\r", "\n", "plain")):
            number = journal.add_explanation(latent=latent, contexts=[1, 2], text=text, **about)
        journal.add_explanation(latent=50, contexts=[], failure="the server,\r\n said no", **about)
        same: dict[str, Any] = {
            "judge": "llm",
            "scorer": "detection",
            "settings_hash": "s",
            "prompt_hash": "q",
            "model": "a-model",
        }
        failed: dict[str, Any] = {"truth": False, "negative_kind": "random", "failure": "no"}
        journal.add_verdicts(
            [
                Verdict(latent=8, explanation_id=number, context=i, truth=True, p=i / 7, label=i % 3 == 0, **same)
                if i % 2 == 0
                else Verdict(latent=8, explanation_id=number, context=i, **failed, **same)
                for i in range(7)
            ]
        )
    return runs


def read_csv(path: Path, **how: Any) -> pd.DataFrame:
    """As the documentation says to read it."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""], **how)


def whole(run: Run, name: str) -> pd.DataFrame:
    return pd.concat(list(frames_of(name, [run])), ignore_index=True)


def plain(value: Any) -> Any:
    """A cell as JSON has it, with nothing where it is missing."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(of) for of in value]
    if isinstance(value, dict):
        return {key: plain(of) for key, of in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    return value


OF_MADE_UP = sorted(set(TABLES) - {"logits", "overlap", "contexts", "behaviour", "sample", "reliability", "usage"})


@pytest.mark.parametrize("name", OF_MADE_UP)
def test_parquet_gives_back_every_cell(study: list[Run], name: str, tmp_path: Path) -> None:
    expected = whole(study[0], name)
    told = export_table(study[:1], name, "parquet", tmp_path / "t.parquet")
    found = pd.read_parquet(tmp_path / "t.parquet")
    assert list(found.columns) == list(expected.columns) == told["columns"]
    assert told["rows"] == len(found) == len(expected)
    for column in expected:
        assert [plain(x) for x in found[column]] == [plain(x) for x in expected[column]], column
    assert table_metadata(tmp_path / "t.parquet")["table"] == name
    assert told["bytes"] == (tmp_path / "t.parquet").stat().st_size


@pytest.mark.parametrize("name", OF_MADE_UP)
def test_csv_gives_back_every_cell(study: list[Run], name: str, tmp_path: Path) -> None:
    expected = whole(study[0], name)
    told = export_table(study[:1], name, "csv", tmp_path / "t.csv")
    found = read_csv(tmp_path / "t.csv")
    assert list(found.columns) == list(expected.columns)
    assert told["rows"] == len(found) == len(expected)
    for column in expected:
        for mine, read in zip(map(plain, expected[column]), map(plain, found[column]), strict=True):
            if isinstance(mine, (list, dict)):
                assert json.loads(read) == mine
            elif isinstance(mine, float):
                # Of half-precision numbers the shortest text is written, which reads back as the same number there.
                assert expected[column].dtype.type(read) == mine if expected[column].dtype != object else read == mine
            elif mine == "":
                assert read is None  # the one thing that a CSV does not tell apart
            else:
                assert read == mine, column


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(texts, st.floats() | st.none(), st.lists(st.floats(), max_size=3)), min_size=1, max_size=8))
@example([("a\x00b\r\x1b\ufeff", None, [float("nan")])])
def test_any_text_and_number_comes_back_from_csv(rows: list[tuple[str, float | None, list[float]]]) -> None:
    table = pd.DataFrame(rows, columns=["text", "number", "list"]).astype({"number": float})
    stream = io.StringIO(newline="")
    export._write_csv([table], stream)
    found = read_csv(io.StringIO(stream.getvalue(), newline=""), dtype={"text": str})  # type: ignore[arg-type]
    assert [x if isinstance(x, str) else "" for x in found["text"]] == table["text"].tolist()
    np.testing.assert_array_equal(found["number"].to_numpy(float), table["number"].to_numpy(float))
    for mine, read in zip(table["list"], found["list"], strict=True):
        assert json.loads(read) == [x if np.isfinite(x) else None for x in mine]
    assert list(csv.reader(io.StringIO(stream.getvalue(), newline="")))[1][0] == rows[0][0]


def test_formula_like_texts_are_counted_and_kept(study: list[Run], tmp_path: Path) -> None:
    told = export_table(study[:1], "explanations", "csv", tmp_path / "e.csv")
    texts_ = whole(study[0], "explanations")["text"].dropna()
    assert told["formula_cells"] == sum(text[:1] in ("=", "+", "-", "@", "\t", "\r") for text in texts_) == 3
    assert NASTY in read_csv(tmp_path / "e.csv")["text"].tolist()


def test_verdicts_in_pieces_are_the_same_file(study: list[Run], tmp_path: Path, monkeypatch: Any) -> None:
    for format_ in ("csv", "parquet"):
        at_once = export_table(study[:1], "verdicts", format_, tmp_path / f"whole.{format_}")
        with monkeypatch.context() as patched:
            patched.setattr(export, "VERDICTS_AT_ONCE", 2)
            pieces = export_table(study[:1], "verdicts", format_, tmp_path / f"pieces.{format_}")
        assert at_once["rows"] == pieces["rows"] == 7
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "pieces.csv").read_bytes()
    one, other = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("whole", "pieces"))
    pd.testing.assert_frame_equal(one, other)
    assert one["failure"].notna().sum() == one["p"].isna().sum() == 3


def test_a_journal_without_verdicts_gives_an_empty_table(tmp_path: Path) -> None:
    (run,) = small_study.runs_of(tmp_path, 1)
    small_study.explained(run, [1])
    for format_ in ("csv", "parquet"):
        assert export_table([run], "verdicts", format_, tmp_path / f"v.{format_}")["rows"] == 0
    assert list(read_csv(tmp_path / "v.csv").columns) == list(pd.read_parquet(tmp_path / "v.parquet").columns)


def test_pairs_are_against_those_named(study: list[Run], tmp_path: Path) -> None:
    export_table([study[0], study[2]], "alignment", "parquet", tmp_path / "one.parquet")
    one = pd.read_parquet(tmp_path / "one.parquet")
    assert (one["run"].unique().tolist(), one["other"].unique().tolist()) == (["run_a"], ["run_c"])
    side = read_alignment(study[0].root / "alignments", "run_a", "run_c").a
    pd.testing.assert_frame_equal(one[side.columns], side, check_dtype=False)
    export_table(study[:1], "alignment", "csv", tmp_path / "all.csv")
    assert read_csv(tmp_path / "all.csv")["other"].value_counts().to_dict() == {"run_b": 120, "run_c": 120}
    pairs = whole(study[0], "pairs")
    both = pairs[(pairs["other"] == "run_b") & pairs["score"].notna() & pairs["score_there"].notna()]
    np.testing.assert_allclose(both["score_gap"].astype(float), both["score"] - both["score_there"])
    assert len(both) > 20


def test_the_same_again_is_kept_and_another_refused(study: list[Run], tmp_path: Path) -> None:
    for format_, name in (("csv", "t.csv"), ("csv", "t.csv.gz"), ("parquet", "t.parquet")):
        to = tmp_path / name
        assert not export_table(study[:1], "firing", format_, to)["kept"]
        before = to.read_bytes()
        assert export_table(study[:1], "firing", format_, to)["kept"]
        with pytest.raises(BadInput, match="holds something else"):
            export_table(study[1:2], "firing", format_, to)
        assert to.read_bytes() == before
        assert sorted(f.name for f in tmp_path.iterdir()) == sorted({f.name for f in tmp_path.iterdir()})
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    with pytest.raises(BadInput, match="is a folder"):
        export_table(study[:1], "firing", "csv", tmp_path)
    assert gzip.decompress((tmp_path / "t.csv.gz").read_bytes()) == (tmp_path / "t.csv").read_bytes()


# --- what is not there --------------------------------------------------------------------------------------

MISSING = {
    "latents": "harvest --sae run_a",
    "firing": "harvest --sae run_a",
    "logits": "harvest --sae run_a",
    "eligibility": "explain --sae run_a",
    "overlap": "align run_a run_b",
    "alignment": "align run_a run_b",
    "behaviour": "align run_a run_b",
    "pairs": "align run_a run_b",
    "explanations": "explain --sae run_a",
    "verdicts": "explain --sae run_a",
    "usage": "explain --sae run_a",
    "contexts": "explain --sae run_a",
    "scores": "score --sae run_a",
    "reliability": "score --sae run_a",
    "sample": "explain --sae run_a",
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_there_yet_names_its_command(name: str, tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path / "runs", 2)
    with pytest.raises(NotFound, match=f"run `python cli.py {MISSING[name]}"):
        export_table(runs[:1], name, "csv", tmp_path / "t.csv")
    assert [f.name for f in tmp_path.iterdir()] == ["runs"]


def test_every_table_is_missing_or_made_somewhere() -> None:
    assert set(MISSING) | {"training"} == set(TABLES)


@pytest.mark.parametrize(
    ("format_", "table", "n", "words"),
    [
        ("csv", None, 1, "name one with --table: latents"),
        ("csv", "scoers", 1, "did you mean 'scores'"),
        ("saelens", "scores", 1, "--format saelens writes an SAE"),
        ("neuronpedia", "scores", 1, "as csv or parquet"),
        ("neuronpedia", None, 2, "give --sae once"),
    ],
)
def test_what_does_not_go_together(study: list[Run], format_: str, table: str, n: int, words: str) -> None:
    with pytest.raises((BadInput, NotFound), match=words):
        check_request(format_, table, study[:n])


def test_several_runs_are_for_pairs(study: list[Run], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"about one run.*alignment"):
        export_table(study[:2], "scores", "csv", tmp_path / "t.csv")


# --- Neuronpedia --------------------------------------------------------------------------------------------


def test_neuronpedia_has_a_line_for_every_explanation(study: list[Run], tmp_path: Path) -> None:
    told = export_neuronpedia(study[0], tmp_path / "batch-0.jsonl.gz", Ids.of(study[0]))
    lines = [json.loads(line) for line in gzip.decompress((tmp_path / "batch-0.jsonl.gz").read_bytes()).splitlines()]
    table = whole(study[0], "explanations")
    good = table[table["status"] == "ok"]
    assert told["rows"] == len(lines) == len(good)
    assert told["left_out"] == len(table) - len(good) == 1
    assert sorted(line["description"] for line in lines) == sorted(good["text"])
    assert {tuple(line) for line in lines} == {tuple(told["columns"])}  # an importer takes columns from the first line
    assert {(line["modelId"], line["layer"]) for line in lines} == {("pystdlib-4m", "2-run_a")}
    assert [int(line["index"]) for line in lines] == sorted(good["latent"])
    assert all(isinstance(line["index"], str) for line in lines)
    assert len({line["id"] for line in lines}) == len(lines)
    assert {line["typeName"] for line in lines} == {"sae-autointerp_ngram", "sae-autointerp_llm"}
    assert {line["explanationModelName"] for line in lines} == {None, "a-model"}
    scores = read_table(study[0].stage_path("scores"))
    own = scores[(scores["control"] == "none") & (scores["status"] == "ok")].set_index("latent")
    told_scores = {int(line["index"]): line["scores"] for line in lines if line["typeName"].endswith("ngram")}
    for latent, row in own.iterrows():
        (score,) = told_scores[int(str(latent))]
        assert score["value"] == row["balanced_accuracy"]
        assert score["explanationScoreTypeName"] == "sae-autointerp_detection"
        assert json.loads(score["jsonDetails"])["auroc"] == row["auroc"]
    again = export_neuronpedia(study[0], tmp_path / "batch-0.jsonl.gz", Ids.of(study[0]))
    assert again["kept"]


def test_the_ids_are_given_or_the_runs_own(study: list[Run]) -> None:
    assert Ids.of(study[0], "pythia-160m", "6-mlp-x", "someone") == Ids("pythia-160m", "6-mlp-x", "someone")
    lines, _ = lines_of(study[0], Ids("pythia-160m", "6-mlp-x", "someone"))
    assert {line["authorId"] for line in lines} == {"someone"}
    for option, value in (("model", "a/b"), ("source", " x"), ("author", "é")):
        with pytest.raises(BadInput, match=f"--{option}-id"):
            Ids.of(study[0], **{option: value})


def test_nothing_explained_is_no_empty_file(tmp_path: Path) -> None:
    (run,) = small_study.runs_of(tmp_path, 1)
    for made in (False, True):
        if made:
            small_study.explained(run, [1], failing={1: "no"})
        with pytest.raises(NotFound, match="explain --sae run_a"):
            export_neuronpedia(run, tmp_path / "x.jsonl", Ids.of(run))
    assert not (tmp_path / "x.jsonl").exists()


# --- as commands, on a study with every stage ---------------------------------------------------------------


@pytest.mark.parametrize("format_", ["csv", "parquet"])
def test_every_table_is_written_by_the_command(untouched: Path, tmp_path: Path, format_: str) -> None:
    for name in TABLES:
        to = tmp_path / f"{name}.{format_}"
        arguments = ("--sae", "run_a", "--table", name, "--format", format_, "--to", to, "--root", untouched)
        if name == "logits":  # the study's hookpoint has none
            cli("export", *arguments).failed_in_one_line("does not write into the residual stream")
            continue
        told = cli("export", *arguments, "--json").well().json
        table = read_csv(to) if format_ == "csv" else pd.read_parquet(to)
        assert (told["command"], told["rows"], told["columns"]) == ("export", len(table), list(table.columns)), name
        if name != "usage":
            assert told["rows"] > 0, name
        if name == "scores":
            assert f"{told['rows']:,} rows" in cli("export", *arguments).well().out
    run = Opened("run_a", untouched)
    contexts = pd.read_parquet(tmp_path / "contexts.parquet") if format_ == "parquet" else None
    if contexts is not None:
        latent = int(contexts["latent"].iloc[0])
        mine = contexts[contexts["latent"] == latent]
        assert sorted(mine["window"]) == sorted(context.window for context in run.contexts(latent))
        assert ["".join(tokens) for tokens in mine["tokens"]] == mine["text"].tolist()


def test_neuronpedia_by_the_command(untouched: Path, tmp_path: Path) -> None:
    to, of = tmp_path / "lines.jsonl", ("--format", "neuronpedia", "--model-id", "m", "--source-id", "1-s")
    told = cli("export", "--sae", "run_a", *of, "--to", to, "--root", untouched, "--json").well().json
    lines = [json.loads(line) for line in to.read_text().splitlines()]
    assert told["rows"] == len(lines) > 0
    assert told["ids"] == {"model": "m", "source": "1-s", "author": lines[0]["authorId"]}
    assert {line["scores"][0]["explanationScoreTypeName"] for line in lines} == {"sae-autointerp_detection"}


def test_export_of_nothing_sensible_is_one_line(untouched: Path, tmp_path: Path) -> None:
    for words, said in (
        (("--format", "csv"), "--table"),
        (("--format", "csv", "--table", "explanation"), "'explanations'"),
        (("--format", "saelens", "--table", "scores"), "writes an SAE"),
        (("--format", "saelens", "--sae", "run_a", "--sae", "run_b"), "give --sae once"),
    ):
        refused = cli("export", *words, "--to", tmp_path / "x", "--root", untouched, "--json")
        refused.failed_in_one_line(said)
    assert not list(tmp_path.iterdir())
