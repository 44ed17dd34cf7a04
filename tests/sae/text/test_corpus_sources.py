"""Where text comes from: data sets in every form, folders of files, and what is refused in one line."""

# ruff: noqa: F811 - the fixtures are imported by name

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_corpus import dataset_settings, folder, neox, refused, text_settings  # noqa: F401

from sae.common.errors import BadInput, NotFound, Unavailable
from sae.text.packing import prepare_corpus

REPOSITORY = Path(__file__).parents[3]


# --- datasets ---------------------------------------------------------------------------------------------


@pytest.fixture
def rows(lines: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"text": [x * 4 for x in lines], "code": lines, "number": list(range(len(lines)))}
    )


def test_a_saved_dataset_with_and_without_splits(neox: tuple[Any, str], rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0, 1])}).save_to_disk(str(tmp_path / "split"))
    plain = prepare_corpus(dataset_settings(tmp_path / "plain"), *neox, tmp_path)
    train = prepare_corpus(dataset_settings(tmp_path / "split"), *neox, tmp_path)
    test = prepare_corpus(dataset_settings(tmp_path / "split", split="test"), *neox, tmp_path)
    other = prepare_corpus(dataset_settings(tmp_path / "plain", column="code"), *neox, tmp_path)
    assert plain.fingerprint == train.fingerprint
    assert len({plain.fingerprint, test.fingerprint, other.fingerprint}) == 3
    with pytest.raises(NotFound, match="no split 'tets'; did you mean 'test'"):
        prepare_corpus(dataset_settings(tmp_path / "split", split="tets"), *neox, tmp_path)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_data_files(form: str, as_folder: bool, neox: tuple[Any, str], rows: datasets.Dataset, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / f"train.{form}"
    {"parquet": rows.to_parquet, "jsonl": rows.to_json, "csv": rows.to_csv}[form](str(file))
    rows.save_to_disk(str(tmp_path / "saved"))
    corpus = prepare_corpus(dataset_settings(file.parent if as_folder else file, max_tokens=10_000), *neox, tmp_path)
    assert corpus.fingerprint == prepare_corpus(dataset_settings(tmp_path / "saved"), *neox, tmp_path).fingerprint


def test_lines_of_json_as_text(neox: tuple[Any, str], lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": x * 4, "other": x}) for x in lines) + "\n\n")
    text = prepare_corpus(text_settings(file), *neox, tmp_path)
    other = prepare_corpus(text_settings(file, column="other"), *neox, tmp_path)
    assert text.info["n_documents"] == len(lines)
    assert text.key != other.key
    file.write_text('{"text": "half a pair \\ud800 of surrogates, and a NUL \\u0000, and so on to the end"}')
    assert prepare_corpus(text_settings(file), *neox, tmp_path).n_sequences >= 1


# --- bad input --------------------------------------------------------------------------------------------


def test_bad_text(neox: tuple[Any, str], folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    refused(text_settings(), neox, root, BadInput, "corpus.source is empty")
    refused(text_settings(folder / "00.tx"), neox, root, NotFound, "00.tx' does not exist", "'00.txt'")
    refused(text_settings(folder / "picture.png"), neox, root, BadInput, "picture.png", "not UTF-8 text", "byte 0")
    (folder / "late.txt").write_bytes(b"good text " * 200_000 + b"\xff")
    refused(text_settings(folder / "late.txt"), neox, root, BadInput, "byte 2000000")
    (folder / "late.txt").write_bytes("cut é".encode()[:-1])
    refused(text_settings(folder / "late.txt"), neox, root, BadInput, "byte 4")
    (tmp_path / "none").mkdir()
    refused(text_settings(tmp_path / "none"), neox, root, NotFound, "no text files", ".txt")
    refused(text_settings(folder / "00.txt", context=4096), neox, root, BadInput, "fewer than one sequence", "4096")
    refused(text_settings(folder / "empty.txt"), neox, root, BadInput, "0 tokens")
    refused(text_settings(folder, max_tokens=9), neox, root, BadInput, "corpus.max_tokens = 9", "16")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"txt": "x"}\n')
    refused(text_settings(tmp_path / "a.jsonl"), neox, root, NotFound, "line 2", "no column 'text'", "'txt'")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\nnot json\n')
    refused(text_settings(tmp_path / "b.jsonl"), neox, root, BadInput, "b.jsonl", "line 2")
    (tmp_path / "c.jsonl").write_text('{"text": 17}\n[1]\n')
    refused(text_settings(tmp_path / "c.jsonl"), neox, root, BadInput, "holds int, not text")


def test_a_folder_skips_and_counts_files_without_text(neox: tuple[Any, str], folder: Path, tmp_path: Path) -> None:
    before = prepare_corpus(text_settings(folder), *neox, tmp_path)
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    after = prepare_corpus(text_settings(folder), *neox, tmp_path / "other")
    assert after.fingerprint == before.fingerprint
    assert (before.info["files_not_text"], after.info["files_not_text"]) == (0, 1)


def test_bad_datasets(
    neox: tuple[Any, str], rows: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "good.parquet"))
    refused(dataset_settings("./nowhere"), neox, root, NotFound, "'./nowhere' does not exist")
    refused(dataset_settings(tmp_path / "saved", column="txt"), neox, root, NotFound, "'txt'", "'text'")
    refused(dataset_settings(tmp_path / "saved", column="number"), neox, root, BadInput, "holds int, not text")
    refused(dataset_settings(tmp_path / "good.parquet"), neox, root, BadInput, "set corpus.max_tokens")
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:200])
    refused(dataset_settings(tmp_path / "bad.parquet", max_tokens=99), neox, root, BadInput, "bad.parquet")
    (tmp_path / "odd.xyz").write_text("x")
    refused(dataset_settings(tmp_path / "odd.xyz"), neox, root, BadInput, ".xyz is not one of")
    (tmp_path / "void").mkdir()
    refused(dataset_settings(tmp_path / "void"), neox, root, NotFound, "empty folder")
    (tmp_path / "data").mkdir()
    rows.to_parquet(str(tmp_path / "data" / "train.parquet"))
    wrong = dataset_settings(tmp_path / "data", split="test", max_tokens=99)
    refused(wrong, neox, root, BadInput, "split: test", "'train'", "corpus.split")
    wrong = dataset_settings(tmp_path / "data", config="en", max_tokens=99)
    refused(wrong, neox, root, BadInput, "'en' not found", "'default'", "corpus.config")

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    refused(dataset_settings("some/data"), neox, root, Unavailable, "some/data", "cannot be reached")
