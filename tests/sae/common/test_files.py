"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from sae.common.errors import UserError
from sae.common.files import (
    SCHEMA,
    atomic,
    digest,
    digest_file,
    digest_samples,
    mapping_differences,
    read_json,
    read_table,
    table_metadata,
    write_json,
    write_table,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
nested = st.recursive(
    st.integers(0, 3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: isinstance(value, dict))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_its_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename between file systems would be a copy
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.txt"]


def write_half(path: Path, error: Exception) -> None:
    with atomic(path) as temporary:
        temporary.write_text("half of i")
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_in_one_line(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UserError, match=r"the disk is full: '.*file\.txt' cannot be written .*; free some") as caught:
        write_half(path, error)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "file"
    plain.touch()
    with atomic(path) as temporary:
        temporary.touch(mode=0o600)
    assert path.stat().st_mode == plain.stat().st_mode


def test_the_folder_is_synced_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, renaming, folder: in this order, so that what a caller deletes afterwards can be spared."""
    seen = []

    def fsync(descriptor: int) -> None:
        seen.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert seen == [(temporary.name, False), (tmp_path.name, True)]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def half() -> None:
        with atomic(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "file.txt"):
        pass
    assert not names(tmp_path)


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "a[b]*.json"
    code = (
        "import os, signal, sys; from pathlib import Path; from sae.common.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as t: t.write_text('ha'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[3], check=False)
    assert ran.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".a[b]*.json.")
    living = tmp_path / f".a[b]*.json.{os.getppid()}.tmp"
    living.write_text("another process is writing this")
    write_json(path, 1)
    assert names(tmp_path) == sorted([path.name, living.name])


@given(values)
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_a_table_and_what_its_writer_noted(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    table = pd.DataFrame({"latent": [0, 1], "text": ["a", None], "strata": [[0.5, 1.0], []]})
    write_table(path, table, inputs="abc", against=["run_b"])
    pd.testing.assert_frame_equal(read_table(path)[["latent"]], table[["latent"]])
    assert [list(x) for x in read_table(path)["strata"]] == [[0.5, 1.0], []]
    own = {"schema": SCHEMA, "place": f"{tmp_path.name}/table.parquet"}
    noted = table_metadata(path)
    assert len(noted.pop("layout")) == 64
    assert noted == own | {"inputs": "abc", "against": ["run_b"]}
    first = path.read_bytes()
    write_table(path, table, inputs="abc", against=["run_b"])
    assert path.read_bytes() == first


def test_foreign_and_missing_tables_have_no_notes(tmp_path: Path) -> None:
    assert table_metadata(tmp_path / "none.parquet") == {}
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "foreign.parquet")
    assert table_metadata(tmp_path / "foreign.parquet") == {}


@given(st.dictionaries(st.text(max_size=4), values, max_size=4), st.randoms())
def test_a_digest_knows_no_order_of_keys(value: dict[str, Any], random: Any) -> None:
    keys = list(value)
    random.shuffle(keys)
    assert digest(value) == digest({key: value[key] for key in keys})
    assert len(digest(value)) == 64


@given(values, values)
def test_different_values_have_different_digests(a: Any, b: Any) -> None:
    assert (digest(a) == digest(b)) == (json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True))


def test_a_files_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcdef")
    (tmp_path / "y").write_bytes(b"abcxyz")
    assert digest_file(tmp_path / "x") != digest_file(tmp_path / "y")
    assert digest_file(tmp_path / "x", 3) == digest_file(tmp_path / "y", 3)
    assert digest_file(tmp_path / "x", 99) == digest_file(tmp_path / "x")


@given(nested, nested)
def test_differences_are_there_exactly_where_values_differ(a: dict[str, Any], b: dict[str, Any]) -> None:
    found = mapping_differences(a, b)
    assert bool(found) == (a != b)
    assert not mapping_differences(a, a)
    swapped = mapping_differences(b, a)
    assert [line.partition(":")[0] for line in found] == [line.partition(":")[0] for line in swapped]


def test_a_difference_is_named_by_its_path() -> None:
    old, new = {"training": {"k": 32, "auxk": 0.1}, "text": "a"}, {"training": {"k": 64, "auxk": 0.1}}
    assert mapping_differences(old, new) == ["text: 'a' there, not set now", "training.k: 32 there, 64 now"]


@pytest.mark.parametrize("size", [1, 1 << 16, 5_000_000])
def test_samples_of_a_file_hold_its_ends(size: int, tmp_path: Path) -> None:
    found = set()
    for changed in (None, 0, size - 1):
        content = bytearray(size)
        if changed is not None:
            content[changed] = 1
        (tmp_path / "x").write_bytes(content)
        found.add(digest_samples(tmp_path / "x"))
    assert len(found) == (2 if size == 1 else 3)
