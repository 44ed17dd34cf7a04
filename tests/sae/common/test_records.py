"""Records on disk are never taken on trust: whatever they hold ends in one error, not in another number."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.findings.sweep_table import SweepRecord
from sae.alignment.alignment import Certificate
from sae.common import records
from sae.common.errors import BadInput, SettingsDiffer, UserError
from sae.common.records import check_pieces, digest_pieces, read_record, write_record
from sae.firings.store import ShardFacts, StoreRecord
from sae.study.run import RunRecord, WeightsRecord
from sae.text.corpus import CorpusRecord

KINDS: dict[str, Any] = {
    "run.json": RunRecord,
    "weights.json": WeightsRecord,
    "firings/store.json": StoreRecord,
    "../alignments/run_a--run_b.json": Certificate,
    "../reports/ks.sweep.json": SweepRecord,
    "../corpora/corpus.json": CorpusRecord,
    "facts.json": ShardFacts,
}
SWEEP = Path(__file__).parents[3] / "eval_runs" / "reference" / "ks.sweep.json"
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just("../../x"),
)
ANYTHING = st.recursive(VALUES, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=9), some))


def found(root: Path) -> dict[str, Path]:
    """A record of each kind, as the program wrote it."""
    corpus = next((root / "corpora").glob("*/corpus.json"))
    facts = next((root / "run_a" / "firings" / "shards").glob("*/facts.json"))
    special = {"../corpora/corpus.json": corpus, "../reports/ks.sweep.json": SWEEP, "facts.json": facts}
    return {name: special.get(name, root / "run_a" / name) for name in KINDS}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within ``value``, two at most of a list."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [path for key, one in inside for path in [(*at, key), *places(one, (*at, key))]]


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_no_value_in_a_record_raises_another_error(
    tiny_done: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    record = json.loads(found(tiny_done[0])[name].read_text())
    record.pop("digest", None)
    *above, last = data.draw(st.sampled_from(places(record)))
    inner = record
    for key in above:
        inner = inner[key]
    if data.draw(st.booleans()) and isinstance(inner, dict):
        del inner[last]
    else:
        inner[last] = data.draw(ANYTHING)
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_text(json.dumps(record))
    with suppress(UserError):
        read_record(path, KINDS[name], "fix it")


@given(st.binary(max_size=40) | ANYTHING.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000))
def test_no_bytes_raise_another_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bytes.json"):
        read_record(path, RunRecord, "fix it")


def test_records_of_the_program_and_of_older_ones_are_read(tiny_done: tuple[Path, Any], tmp_path: Path) -> None:
    for name, path in found(tiny_done[0]).items():
        read = read_record(path, KINDS[name], "fix it")
        older = json.loads(path.read_text())
        older.pop("digest", None)
        (tmp_path / "older.json").write_text(json.dumps(older))
        assert read_record(tmp_path / "older.json", KINDS[name], "fix it") == read


@given(st.data())
def test_every_flipped_byte_of_a_record_is_found(
    tiny_done: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = found(tiny_done[0])[data.draw(st.sampled_from(["run.json", "firings/store.json"]))]
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    flipped = tmp_path_factory.getbasetemp() / "flipped.json"
    flipped.write_bytes(content)
    kind = RunRecord if path.name == "run.json" else StoreRecord
    with suppress(UserError):
        assert read_record(flipped, kind, "fix it") == read_record(path, kind, "fix it")  # a change of layout


def test_another_schema_is_named(tmp_path: Path) -> None:
    write_record(tmp_path / "x.json", {"schema": 7})
    with pytest.raises(SettingsDiffer, match="has schema 7, this program reads 1"):
        read_record(tmp_path / "x.json", dict[str, Any], "fix it")
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "nowhere.json", dict[str, Any], "fix it")
    (tmp_path / "x.json").write_text('{"a": 1, "digest": "0"}')
    with pytest.raises(BadInput, match="does not match its digest"):
        read_record(tmp_path / "x.json", dict[str, Any], "fix it")


@settings(max_examples=30)
@given(st.integers(1, 50), st.data())
def test_a_damaged_piece_is_found_where_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, n: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PIECE_BYTES", 8)
        path = folder / "x.bin"
        path.write_bytes(bytes(np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)))
        digests = digest_pieces(path)
        assert len(digests) == -(-n // 8)
        assert check_pieces(path, digests)
        at = data.draw(st.integers(0, n - 1))
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        (folder / "y.bin").write_bytes(content)
        first = data.draw(st.integers(0, n - 1))
        last = data.draw(st.integers(first + 1, n))
        assert check_pieces(folder / "y.bin", digests, first, last) == (not first // 8 <= at // 8 <= (last - 1) // 8)


def test_a_piece_is_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"abc")
    digests = digest_pieces(path)
    assert check_pieces(path, digests)
    monkeypatch.setattr(records, "_hash", lambda _: "never")
    assert check_pieces(path, digests)
    path.write_bytes(b"other")  # at another time
    assert not check_pieces(path, digests)
    assert check_pieces(path, ())  # an older file without any
