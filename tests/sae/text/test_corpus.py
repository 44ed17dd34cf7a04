"""Packing against a plain reference, orders as permutations, interruption and damage."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae.text.packing as packing
from sae.activations.subject import load_tokenizer
from sae.common.errors import BadInput, NotFound, UserError
from sae.settings import CorpusSettings
from sae.text.corpus import MIXED_BLOCKS, Corpus
from sae.text.packing import prepare_corpus
from sae.text.sources import Document, read_pieces, split_text

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def neox(tiny_neox_dir: Path) -> tuple[Any, str]:
    return load_tokenizer(str(tiny_neox_dir))


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path) -> tuple[Any, str]:
    return load_tokenizer(str(tiny_llama_dir))


@pytest.fixture
def folder(tmp_path: Path, lines: list[str]) -> Path:
    """Twelve small text files, one of them empty, and a file and a folder that are not to be read."""
    texts = tmp_path / "texts"
    (texts / "below").mkdir(parents=True)
    for i, line in enumerate(lines):
        (texts / f"{i:02d}.txt").write_text(line * 5)
    (texts / "below" / "deep.md").write_text("deep " * 30)
    (texts / "empty.txt").write_text("")
    (texts / "picture.png").write_bytes(b"\x89PNG\0")
    (texts / ".hidden").mkdir()
    (texts / ".hidden" / "secret.txt").write_text("never read")
    return texts


def text_settings(*source: Path | str, **more: Any) -> CorpusSettings:
    return CorpusSettings(kind="text", source=tuple(map(str, source)), **{"context": 16, **more})


def dataset_settings(source: Path | str, **more: Any) -> CorpusSettings:
    return CorpusSettings(kind="dataset", source=(str(source),), **{"context": 16, **more})


def reference(folder: Path, tokenizer: Any, context: int) -> np.ndarray:
    flat: list[int] = []
    paths = [p for p in folder.rglob("*") if p.suffix in (".txt", ".md") and ".hidden" not in p.parts]
    for path in sorted(paths, key=lambda p: p.relative_to(folder).as_posix()):
        ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
        flat += [*ids, tokenizer.eos_token_id] if ids else []
    n = len(flat) // context
    return np.array(flat[: n * context]).reshape(n, context)


# --- packing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["neox", "llama"])
def test_rows_are_documents_joined_by_end_of_text(
    which: str, request: pytest.FixtureRequest, folder: Path, tmp_path: Path
) -> None:
    tokenizer, fingerprint = request.getfixturevalue(which)
    corpus = prepare_corpus(text_settings(folder), tokenizer, fingerprint, tmp_path)
    expected = reference(folder, tokenizer, 16)
    np.testing.assert_array_equal(corpus.tokens, expected)
    assert corpus.rows(np.array([3, 1])).dtype == np.int64
    np.testing.assert_array_equal(corpus.rows(np.array([3, 1])), expected[[3, 1]])
    assert (corpus.n_sequences, corpus.context, corpus.n_tokens) == (*expected.shape, expected.size)
    assert corpus.tokens.dtype == np.uint16
    assert not corpus.tokens.flags.writeable
    assert corpus.info["n_documents"] == 9
    assert corpus.info["n_tokens"] == expected.size
    if which == "llama":
        assert tokenizer.bos_token_id not in corpus.tokens


def test_equal_text_is_one_corpus_wherever_it_lies(neox: tuple[Any, str], folder: Path, tmp_path: Path) -> None:
    first = prepare_corpus(text_settings(folder), *neox, tmp_path)
    written = (first.folder / "tokens.bin").stat().st_mtime_ns
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    again = prepare_corpus(text_settings(moved), *neox, tmp_path)
    assert again.key == first.key
    assert (again.folder / "tokens.bin").stat().st_mtime_ns == written
    (moved / "00.txt").write_text("other words " * 9)
    other = prepare_corpus(text_settings(moved), *neox, tmp_path)
    assert other.key != first.key
    assert other.fingerprint != first.fingerprint


def test_key_and_fingerprint_depend_on_tokenizer_and_limit(
    neox: tuple[Any, str], llama: tuple[Any, str], folder: Path, tmp_path: Path
) -> None:
    made = [
        prepare_corpus(text_settings(folder), *neox, tmp_path),
        prepare_corpus(text_settings(folder), *llama, tmp_path),
        prepare_corpus(text_settings(folder, context=8), *neox, tmp_path),
        prepare_corpus(text_settings(folder, max_tokens=100), *neox, tmp_path),
    ]
    assert len({c.key for c in made}) == 4
    assert len({c.fingerprint for c in made}) == 4
    assert made[3].n_tokens == 96  # whole sequences of 16 within 100 tokens
    np.testing.assert_array_equal(made[3].tokens, made[0].tokens[:6])


def test_a_remembered_hash_does_not_hide_a_change(neox: tuple[Any, str], folder: Path, tmp_path: Path) -> None:
    import os

    for path in folder.rglob("*.txt"):
        os.utime(path, (1_000_000, 1_000_000))
    first = prepare_corpus(text_settings(folder), *neox, tmp_path)
    assert (tmp_path / "corpora" / "hashes.json").is_file()
    text = (folder / "03.txt").read_text()
    (folder / "03.txt").write_text(text.swapcase())  # the same size, a new modification time
    assert prepare_corpus(text_settings(folder), *neox, tmp_path).key != first.key
    (folder / "03.txt").write_text(text)
    for damaged in ("{ damaged", '{"files": []}', '{"files": 3}', '{"files": {"a": [1, 2, "x", "y"]}}'):
        (tmp_path / "corpora" / "hashes.json").write_text(damaged)
        assert prepare_corpus(text_settings(folder), *neox, tmp_path).key == first.key


def test_special_tokens_in_text_are_recognised(neox: tuple[Any, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three <|endoftext|> four five six seven " * 4)
    corpus = prepare_corpus(text_settings(tmp_path / "a.txt", context=8), *neox, tmp_path)
    special = corpus.is_special(corpus.tokens)
    assert special.shape == corpus.tokens.shape
    np.testing.assert_array_equal(special, corpus.tokens == 0)
    assert special.sum() >= 4


def test_a_large_vocabulary_uses_four_bytes_per_token(
    neox: tuple[Any, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = prepare_corpus(text_settings(folder), *neox, tmp_path / "small")
    monkeypatch.setattr(packing, "count_token_ids", lambda _: 1 << 17)
    large = prepare_corpus(text_settings(folder), *neox, tmp_path / "large")
    assert large.tokens.dtype == np.uint32
    np.testing.assert_array_equal(large.tokens, small.tokens)
    assert large.fingerprint == small.fingerprint


def test_standard_library(neox: tuple[Any, str], tmp_path: Path) -> None:
    corpus = prepare_corpus(CorpusSettings(context=32, max_tokens=4000), *neox, tmp_path)
    assert corpus.n_tokens == 4000
    assert corpus.info["kind"] == "stdlib"
    assert {"files_changed", "files_missing", "source"} <= corpus.info.keys()


# --- interruption -----------------------------------------------------------------------------------------


def test_killed_while_packing_it_resumes_to_equal_rows(
    neox: tuple[Any, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 2)
    whole = prepare_corpus(text_settings(folder), *neox, tmp_path / "whole")
    tokenised: list[str] = []
    real_encoder = packing.make_encoder

    def failing_encoder(tokenizer: Any) -> tuple[Any, Any]:
        encode, backend = real_encoder(tokenizer)

        def run(texts: list[str]) -> list[list[int]]:
            if len(tokenised) == 6:
                raise KeyboardInterrupt
            tokenised.extend(texts)
            return encode(texts)

        return run, backend

    monkeypatch.setattr(packing, "make_encoder", failing_encoder)
    root = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(text_settings(folder), *neox, root)
    (part,) = root.glob("corpora/*/tokens.part")
    with part.open("ab") as stream:
        stream.write(b"half a row that no checkpoint knows of")
    with pytest.raises(NotFound):
        Corpus.open(part.parent)

    tokenised.insert(0, "a seventh, so that nothing fails")
    resumed = prepare_corpus(text_settings(folder), *neox, root)
    assert len(tokenised) == 1 + 10  # no document a second time
    np.testing.assert_array_equal(resumed.tokens, whole.tokens)
    assert (resumed.fingerprint, resumed.key, resumed.info) == (whole.fingerprint, whole.key, whole.info)
    assert sorted(p.name for p in resumed.folder.iterdir() if p.name != ".lock") == [
        "corpus.json",
        "documents.bin",
        "tokenizer.json",
        "tokens.bin",
    ]
    np.testing.assert_array_equal(resumed.document_ends, whole.document_ends)


def test_a_limit_counts_the_same_wherever_batches_begin(
    neox: tuple[Any, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare_corpus(text_settings(folder, max_tokens=320), *neox, tmp_path / "one")
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 1)
    two = prepare_corpus(text_settings(folder, max_tokens=320), *neox, tmp_path / "two")
    assert one.info == two.info
    assert one.fingerprint == two.fingerprint


@given(
    text=st.text(alphabet=st.sampled_from("ab \n\té日"), max_size=300),
    size=st.integers(min_value=2, max_value=50),
)
@settings(max_examples=200, deadline=None)
def test_pieces_make_up_the_text(text: str, size: int) -> None:
    pieces = list(split_text("x", text, size))
    assert "".join(p.text for p in pieces) == text
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(p.text) <= size + 1 for p in pieces)


def test_tokens_of_a_file_equal_those_of_pieces(neox: tuple[Any, str], lines: list[str], tmp_path: Path) -> None:
    tokenizer, _ = neox
    path = tmp_path / "long.txt"
    path.write_text("".join(lines) * 20)
    pieces = [p.text for p in read_pieces(path, size=200)]
    assert len(pieces) > 20
    joined = [i for p in pieces for i in tokenizer(p, add_special_tokens=False)["input_ids"]]
    assert joined == tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]


def test_document_in_pieces_gets_one_end_of_text(
    neox: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def documents() -> Iterator[Document]:
        yield Document("a", "one two ", ends=False)
        yield Document("a", "three four ", ends=False)
        yield Document("a", "", ends=True)
        yield Document("b", "", ends=True)
        yield Document("c", "five six seven eight nine")

    source = packing.TextSource({"kind": "x"}, {}, documents, 4, "documents")
    monkeypatch.setattr(packing, "open_source", lambda *_: source)
    corpus = prepare_corpus(text_settings("x", context=8), *neox, tmp_path)
    assert corpus.info["n_documents"] == 2
    assert (corpus.tokens == 0).sum() == 1


# --- order ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(neox: tuple[Any, str], lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Some hundreds of sequences of 512 tokens: blocks of 8, the last one smaller."""
    root = tmp_path_factory.mktemp("stored")
    (root / "a.txt").write_text("".join(lines) * 500)
    corpus = prepare_corpus(text_settings(root / "a.txt", context=512), *neox, root)
    assert corpus.block_rows == 8
    assert corpus.n_sequences > 200
    return corpus


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_an_order_is_a_blockwise_permutation(stored: Corpus, seed: int, epoch: int) -> None:
    order = stored.order(epoch, seed)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(stored.n_sequences))
    np.testing.assert_array_equal(order, stored.order(epoch, seed))
    blocks, _ = stored.place(order)
    first = [int(np.flatnonzero(blocks == b)[0]) for b in range(stored.n_blocks)]
    last = [int(np.flatnonzero(blocks == b)[-1]) for b in range(stored.n_blocks)]
    for at in range(0, stored.n_sequences, 7):
        assert sum(f <= at <= e for f, e in zip(first, last, strict=True)) <= MIXED_BLOCKS


def test_orders_differ_by_seed_and_epoch(stored: Corpus) -> None:
    orders = [tuple(stored.order(e, s)) for e in range(3) for s in range(3)]
    assert len(set(orders)) == 9
    positions = np.argsort(stored.order(0, 0))
    assert abs(np.corrcoef(np.arange(len(positions)), positions)[0, 1]) < 0.3
    batches = {frozenset(stored.order(e, 0)[i : i + 8]) for e in range(3) for i in range(0, 200, 8)}
    assert len(batches) == 75  # no batch comes back in a later epoch


def test_blocks_partition_the_sequences_and_place_inverts_them(stored: Corpus) -> None:
    everything = np.concatenate([stored.block(b) for b in range(stored.n_blocks)])
    np.testing.assert_array_equal(np.sort(everything), np.arange(stored.n_sequences))
    blocks, places = stored.place(everything)
    for row, block, place in zip(everything, blocks, places, strict=True):
        assert stored.block(int(block))[place] == row


# --- decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["neox", "llama"])
def test_decoded_tokens_join_to_the_text(
    which: str, request: pytest.FixtureRequest, folder: Path, tmp_path: Path
) -> None:
    tokenizer, fingerprint = request.getfixturevalue(which)
    corpus = prepare_corpus(text_settings(folder), tokenizer, fingerprint, tmp_path)
    for row in corpus.tokens:
        pieces = corpus.decode(row)
        assert len(pieces) == 16
        whole = corpus._decoder.decode(row.tolist(), skip_special_tokens=False)
        assert "".join(pieces) == whole or pieces[-1] == "\ufffd"  # a character cut by the row's end
    rng = np.random.default_rng(0)
    for _ in range(300):  # any tokens at all, broken characters among them
        row = rng.integers(0, 320, size=12)
        assert len(corpus.decode(row)) == 12
    assert corpus.decode(np.array([], dtype=np.int64)) == []


@pytest.mark.parametrize("which", ["neox", "llama"])
def test_known_tokens_decode_as_a_stream_does(
    which: str, request: pytest.FixtureRequest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, fingerprint = request.getfixturevalue(which)
    corpus = prepare_corpus(text_settings(folder), tokenizer, fingerprint, tmp_path)
    rng = np.random.default_rng(1)
    rows = [*corpus.tokens, *rng.integers(0, 320, size=(300, 12))]
    known = [corpus.decode(row) for row in rows]
    assert corpus._decodes_apart == (which == "neox")
    monkeypatch.setattr(corpus, "_piece", lambda _: None)
    assert known == [corpus.decode(row) for row in rows]


# --- what goes wrong --------------------------------------------------------------------------------------


def refused(wanted: CorpusSettings, neox: tuple[Any, str], root: Path, kind: type[UserError], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        prepare_corpus(wanted, *neox, root)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_damaged_corpora(neox: tuple[Any, str], folder: Path, tmp_path: Path) -> None:
    made = prepare_corpus(text_settings(folder), *neox, tmp_path).folder
    with pytest.raises(NotFound, match=r"has no corpus\.json"):
        Corpus.open(tmp_path)
    tokens = (made / "tokens.bin").read_bytes()
    (made / "tokens.bin").write_bytes(tokens[:-2])
    with pytest.raises(BadInput, match="wrong size"):
        Corpus.open(made)
    (made / "tokens.bin").unlink()
    with pytest.raises(NotFound, match=r"has no tokens\.bin"):
        Corpus.open(made)
    (made / "tokens.bin").write_bytes(tokens)
    (made / "corpus.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        Corpus.open(made)


def test_a_full_disk_is_told_in_one_line(
    neox: tuple[Any, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing._Packer, "_pack", full)
    refused(text_settings(folder), neox, tmp_path, UserError, "disk is full")


def test_reading_a_corpus_imports_no_torch(neox: tuple[Any, str], folder: Path, tmp_path: Path) -> None:
    made = prepare_corpus(text_settings(folder), *neox, tmp_path).folder
    program = (
        "import sys; from pathlib import Path; from sae.text.corpus import Corpus; "
        f"c = Corpus.open(Path({str(made)!r})); c.decode(c.tokens[0]); c.order(0, 0); "
        "sys.exit(sum(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
