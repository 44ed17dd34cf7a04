"""Chat messages, token ids, shuffling, mixtures and end tokens: against plain references over local data files."""

# ruff: noqa: F811 - the fixtures are imported by name

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_corpus import dataset_settings, folder, llama, neox, refused, text_settings  # noqa: F401

import sae.text.packing as packing
from sae.common.errors import BadInput, NotFound
from sae.common.records import write_record
from sae.settings import CorpusSettings
from sae.text.corpus import Corpus
from sae.text.hf_datasets import interleave
from sae.text.packing import prepare_corpus
from sae.text.sources import Document

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
)


def pack(documents: list[list[int]], context: int = 16) -> np.ndarray:
    flat = [i for document in documents for i in document]
    n = len(flat) // context
    return np.array(flat[: n * context]).reshape(n, context)


def conversations(lines: list[str]) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": line}, {"role": "assistant", "content": line * (1 + n % 3)}]
        for n, line in enumerate(lines)
    ]


def write(path: Path, **columns: list[Any]) -> Path:
    rows = datasets.Dataset.from_dict(columns)
    {".parquet": rows.to_parquet, ".jsonl": rows.to_json}[path.suffix](str(path))
    return path


@pytest.fixture
def chat_llama(llama: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    monkeypatch.setattr(llama[0], "chat_template", TEMPLATE)
    return llama


# --- chat messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_messages_go_through_the_chat_template(
    form: str, chat_llama: tuple[Any, str], lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, _ = chat_llama
    chats = conversations(lines)
    file = write(tmp_path / f"chats.{form}", messages=chats)
    corpus = prepare_corpus(dataset_settings(file, column="messages", max_tokens=10**6), *chat_llama, tmp_path)
    expected = []
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        expected.append(ids[1:])  # the model adds its BOS, and the template has put the end token
    np.testing.assert_array_equal(corpus.tokens, pack(expected))
    assert corpus.info["form"] == "messages"
    assert corpus.info["chat_template"]
    assert "rendered by the subject model's chat template" in capsys.readouterr().err
    ends = np.cumsum([len(ids) for ids in expected])
    assert corpus.document_ends.tolist() == [*ends[ends < corpus.n_tokens], corpus.n_tokens]


def test_another_chat_template_is_another_corpus(
    chat_llama: tuple[Any, str], lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "chats.parquet", messages=conversations(lines))
    wanted = dataset_settings(file, column="messages", max_tokens=10**6)
    one = prepare_corpus(wanted, *chat_llama, tmp_path)
    monkeypatch.setattr(chat_llama[0], "chat_template", TEMPLATE.replace("<", "["))
    two = prepare_corpus(wanted, *chat_llama, tmp_path)
    assert one.key != two.key
    assert one.fingerprint != two.fingerprint


def test_messages_that_cannot_be_rendered_are_refused(
    neox: tuple[Any, str], chat_llama: tuple[Any, str], lines: list[str], tmp_path: Path
) -> None:
    chats = conversations(lines)
    file = write(tmp_path / "chats.parquet", messages=chats)
    wanted = dataset_settings(file, column="messages", max_tokens=999)
    assert neox[0].chat_template is None
    refused(wanted, neox, tmp_path / "r", BadInput, "holds chat messages", "no chat template", "column of text")
    chats[3][0]["role"] = "tool"
    late = dataset_settings(write(tmp_path / "late.parquet", messages=chats), column="messages", max_tokens=10**6)
    refused(late, chat_llama, tmp_path / "r", BadInput, "row 3", "refuses column 'messages'", "no tools")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(json.dumps({"text": value}) for value in ("a b c", [1, 2], "d")))
    with pytest.raises(BadInput):
        prepare_corpus(dataset_settings(mixed, max_tokens=999), *neox, tmp_path / "r")
    refused(text_settings(mixed), neox, tmp_path / "r", BadInput, "line 2", "token ids, not text", "--dataset")


# --- token ids ----------------------------------------------------------------------------------------------------


def test_token_ids_are_taken_as_they_are(
    neox: tuple[Any, str], lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, _ = neox
    ids = [tokenizer(line * 3)["input_ids"] for line in lines]
    ids[2].append(tokenizer.eos_token_id)  # ends already
    file = write(tmp_path / "ids.parquet", input_ids=[None, *ids, []], text=[*lines, "", ""])
    corpus = prepare_corpus(dataset_settings(file, column="input_ids", max_tokens=10**6), *neox, tmp_path)
    closed = [one if one[-1] == tokenizer.eos_token_id else [*one, tokenizer.eos_token_id] for one in ids]
    np.testing.assert_array_equal(corpus.tokens, pack(closed))
    assert corpus.info["form"] == "token ids"
    assert corpus.info["n_documents"] == len(lines)
    said = capsys.readouterr().err
    assert "token ids, taken as the subject model's" in said
    assert tokenizer.decode(ids[0][:4]) in said


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_of_another_tokenizer_are_refused(wrong: int, neox: tuple[Any, str], tmp_path: Path) -> None:
    file = write(tmp_path / "ids.parquet", input_ids=[[1, 2, 3] * 9, [4, wrong]])
    bad = dataset_settings(file, column="input_ids", max_tokens=999)
    size = packing.count_token_ids(neox[0])
    refused(bad, neox, tmp_path / "r", BadInput, "row 1", str(wrong), f"0 to {size - 1}", "another tokenizer")


# --- refused columns ----------------------------------------------------------------------------------------------


def test_advice_never_names_the_refused_column(neox: tuple[Any, str], lines: list[str], tmp_path: Path) -> None:
    numbers = list(range(len(lines)))
    file = write(tmp_path / "a.parquet", number=numbers, flag=[True] * len(lines), code=lines, ids=[[1]] * len(lines))
    bad = dataset_settings(file, column="number", max_tokens=999)
    with pytest.raises(BadInput) as refusal:
        prepare_corpus(bad, *neox, tmp_path)
    said = str(refusal.value)
    assert "column 'number' holds int, not text; choose 'code' (text) or 'ids' (token ids)" in said
    assert "number" not in said.split(";")[1]
    lone = dataset_settings(write(tmp_path / "b.parquet", number=numbers, n=numbers), column="number", max_tokens=999)
    refused(lone, neox, tmp_path, BadInput, "none of its other columns can be read as text")


# --- shuffling ----------------------------------------------------------------------------------------------------


def test_a_shuffle_buffer_is_seeded_and_recorded(neox: tuple[Any, str], lines: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", text=[f"{n} {line}" * 3 for n, line in enumerate(lines)])

    def make(root: str, **more: Any) -> Corpus:
        return prepare_corpus(dataset_settings(file, max_tokens=10**6, **more), *neox, tmp_path / root)

    plain, one, again = make("a"), make("a", shuffle_buffer=4), make("b", shuffle_buffer=4)
    other = make("a", shuffle_buffer=4, shuffle_seed=1)
    assert one.fingerprint == again.fingerprint
    assert len({c.key for c in (plain, one, other)}) == len({c.fingerprint for c in (plain, one, other)}) == 3
    assert (one.info["shuffle_buffer"], other.info["shuffle_seed"]) == (4, 1)
    assert one.info["n_documents"] == plain.info["n_documents"] == len(lines)
    reference = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    texts = [row["text"] for row in reference.shuffle(seed=0, buffer_size=4)]
    eos = neox[0].eos_token_id
    np.testing.assert_array_equal(one.tokens, pack([[*neox[0](text)["input_ids"], eos] for text in texts]))


# --- several datasets ---------------------------------------------------------------------------------------------


def counted(name: str, n: int) -> Iterator[Document]:
    for number in range(n):
        yield Document(f"{name}:{number}", "a", ends=False)
        yield Document(f"{name}:{number}", "b")


@given(st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.5]), min_size=2, max_size=5), st.integers(1, 40))
def test_interleaving_keeps_weights_and_documents(weights: list[float], n: int) -> None:
    found = list(interleave([counted(str(i), n) for i in range(len(weights))], weights))
    assert all(a.name == b.name for a, b in zip(found[::2], found[1::2], strict=True))
    for end in range(2, len(found) + 1, 2):
        given_ = Counter(document.name.split(":")[0] for document in found[:end:2])
        for i, weight in enumerate(weights):
            assert abs(given_[str(i)] - end / 2 * weight / sum(weights)) < 1 + len(weights) * weight / sum(weights)
    assert max(Counter(d.name.split(":")[0] for d in found[::2]).values()) == n


def test_a_mixture_of_forms_is_recorded(chat_llama: tuple[Any, str], lines: list[str], tmp_path: Path) -> None:
    tokenizer, _ = chat_llama
    chats = conversations(lines)
    sources = (
        write(tmp_path / "chats.parquet", messages=chats),
        write(tmp_path / "plain.jsonl", body=[line * 2 for line in lines]),
    )
    mixture = CorpusSettings(
        kind="dataset",
        source=tuple(map(str, sources)),
        columns=("messages", "body"),
        weights=(1.0, 2.0),
        context=16,
        max_tokens=10**6,
    )
    corpus = prepare_corpus(mixture, *chat_llama, tmp_path)
    eos = tokenizer.eos_token_id
    body = [[*tokenizer(line * 2, add_special_tokens=False)["input_ids"], eos] for line in lines]
    chat = [tokenizer.apply_chat_template(c, tokenize=True, return_dict=False)[1:] for c in chats]
    order = []
    for n in range(len(lines) // 2):
        order += [body[2 * n], chat[n], body[2 * n + 1]]
    np.testing.assert_array_equal(corpus.tokens[: len(pack(order))], pack(order))
    assert corpus.info["weights"] == [1.0, 2.0]
    assert [each["column"] for each in corpus.info["datasets"]] == ["messages", "body"]
    equal = mixture.model_copy(update={"weights": ()})
    assert prepare_corpus(equal, *chat_llama, tmp_path).info["weights"] == [1.0, 1.0]
    wrong = mixture.model_copy(update={"weights": (1.0,)})
    refused(wrong, chat_llama, tmp_path, BadInput, "corpus.weights has 1 values for 2 datasets")


# --- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end_token", [True, False])
def test_documents_with_and_without_end_token(
    end_token: bool, neox: tuple[Any, str], folder: Path, tmp_path: Path
) -> None:
    corpus = prepare_corpus(text_settings(folder, end_token=end_token), *neox, tmp_path)
    tokenizer, paths = neox[0], sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".md"))
    paths = [p for p in paths if ".hidden" not in p.parts]
    paths.sort(key=lambda p: p.relative_to(folder).as_posix())
    ids = [tokenizer(p.read_text(), add_special_tokens=False)["input_ids"] for p in paths]
    documents = [[*one, tokenizer.eos_token_id] if end_token else one for one in ids if one]
    np.testing.assert_array_equal(corpus.tokens, pack(documents))
    assert corpus.info["end_token"] is end_token
    ends = np.cumsum([len(one) for one in documents])
    assert corpus.document_ends.tolist() == [*ends[ends < corpus.n_tokens], corpus.n_tokens]


def test_older_corpora_find_documents_by_end_tokens(
    neox: tuple[Any, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = prepare_corpus(text_settings(folder), *neox, tmp_path)
    expected = corpus.document_ends
    (corpus.folder / "documents.bin").rename(tmp_path / "documents.bin")
    with pytest.raises(NotFound, match=r"has no documents\.bin; delete the folder"):
        _ = Corpus.open(corpus.folder).document_ends
    record = json.loads((corpus.folder / "corpus.json").read_text())
    del record["digest"], record["digests"]["documents.bin"]
    write_record(corpus.folder / "corpus.json", record)
    monkeypatch.setattr("sae.text.corpus._SCAN_TOKENS", 7)
    older = Corpus.open(corpus.folder)
    assert not older.has_document_ends
    np.testing.assert_array_equal(older.document_ends, expected)
    write_record(corpus.folder / "corpus.json", {k: v for k, v in record.items() if k != "separator"})
    assert Corpus.open(corpus.folder).document_ends.tolist() == [older.n_tokens]


def test_settings_of_before_keep_their_keys(
    neox: tuple[Any, str], folder: Path, lines: list[str], tmp_path: Path
) -> None:
    made = {"schema", "source", "tokenizer", "context", "max_tokens"}
    text = prepare_corpus(text_settings(folder), *neox, tmp_path)
    data = dataset_settings(write(tmp_path / "a.parquet", text=[line * 4 for line in lines]), max_tokens=999)
    dataset = prepare_corpus(data, *neox, tmp_path)
    records = [json.loads((c.folder / "corpus.json").read_text())["made_from"] for c in (text, dataset)]
    assert [set(record) for record in records] == [made, made]
    assert set(records[1]["source"]) == {"kind", "column", "config", "split", "contents"}
