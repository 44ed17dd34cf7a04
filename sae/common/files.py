"""Read and write JSON files and Parquet tables; each file is written under a temporary name, then renamed.

A table's metadata holds a schema number and usually the hash of its inputs. pandas and pyarrow are imported late.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.common.errors import BadInput, UserError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UMASK = os.umask(0)
os.umask(_UMASK)
_REFUSED = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS)
_META = b"autointerp"
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path, renamed to ``path`` unless the block fails. Raises UserError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not _runs(left.name.rsplit(".", 2)[1]):  # of a process that was killed
            left.unlink(missing_ok=True)
    filled = False
    try:
        with report_full_disk(path):
            yield temporary
            filled = True
            temporary.chmod(0o666 & ~_UMASK)  # some writers make files private
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
    except OSError as error:
        if filled or temporary.name not in str(error) or error.errno not in _REFUSED:
            raise
        raise BadInput(f"{str(path)!r} cannot be written: its folder is read-only or gone; choose another") from None
    finally:
        with suppress(OSError):  # as a read-only file system raises, which would hide the error
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by this file system
            raise
    finally:
        os.close(opened)


@contextmanager
def report_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk in the block into a UserError about ``path``."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"the disk is full: {str(path)!r} cannot be written (or a limit on file sizes is reached); free some space "
            "and run the same command again"
        ) from None


def is_disk_full(error: Exception) -> bool:
    """Return whether a write failed because the disk, a quota or the limit on file sizes (``ulimit -f``) is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    # Writers in Rust report errors as text only.
    return any(f"(os error {number})" in str(error) for number in _FULL)


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def expand_user(path: Path | str) -> Path:
    """Replace a leading ``~`` by the home folder; a path of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # pathlib raises for an unknown user


def check_regular(path: Path, what: str) -> None:
    """Raise BadInput for a pipe, a socket or a device, which may never end, and for a link to itself."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ELOOP:
            raise BadInput(f"{what} {str(path)!r} is a link that leads to itself; give the file itself") from None
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise BadInput(f"{what} {str(path)!r} is a pipe or a device; give a regular file")


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    check_regular(path, "file")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError if it is none, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_table(path: Path, table: pd.DataFrame, **metadata: Any) -> None:
    """Write ``table`` as Parquet with ``metadata`` (any JSON values) in its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    with atomic(path) as temporary:
        own = {"place": _place(path), "layout": _layout_digest(arrow.schema, len(table)), **metadata}
        named = arrow.replace_schema_metadata(add_metadata(arrow.schema, own))
        pq.write_table(named, temporary, write_page_checksum=True)


def add_metadata(schema: pa.Schema, metadata: Mapping[str, Any]) -> dict[bytes, bytes]:
    """Add ``metadata`` to a schema's own, for :func:`table_metadata` to read."""
    return {**(schema.metadata or {}), _META: json.dumps({"schema": SCHEMA, **metadata}).encode()}


def read_table(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table, or those of ``columns`` that it has. Raises BadInput if the file is damaged."""
    import pandas as pd

    wanted = None if columns is None else [c for c in table_columns(path) if c in columns]
    table_metadata(path)  # checks the place
    with _whole(path):
        return pd.read_parquet(path, columns=wanted, page_checksum_verification=True)


def table_columns(path: Path) -> list[str]:
    """Return the names of a table's columns. Raises BadInput if the file is damaged."""
    import pyarrow.parquet as pq

    check_regular(path, "table")
    with _whole(path):
        return list(pq.read_schema(path).names)


def table_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that :func:`write_table` stored; empty for a missing file or another program's."""
    if not path.exists():
        return {}
    import pyarrow.parquet as pq

    check_regular(path, "table")
    with _whole(path):
        footer = pq.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
        found = dict(json.loads((schema.metadata or {}).get(_META, b"{}")))
        if found.get("layout") not in (None, _layout_digest(schema, footer.num_rows)):
            raise ValueError("the footer is damaged")
    if found.get("place", _place(path)) != _place(path):
        raise BadInput(f"{str(path)!r} is a copy of {found['place']!r}; delete it and run the command that writes it")
    return found


def _layout_digest(schema: pa.Schema, n_rows: int) -> str:
    """Return the digest of what the footer says of columns and rows; the checksums of pages do not cover it."""
    columns = [[field.name, str(field.type).replace("<element: ", "<item: ")] for field in schema]
    return digest([n_rows, columns, (schema.metadata or {}).get(b"pandas", b"").decode()])


def _place(path: Path) -> str:
    """Return the name of a table and its folder, which a copy elsewhere does not have."""
    return "/".join(path.absolute().parts[-2:])


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of Arrow or pandas
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:  # of the system
            raise
        raise BadInput(
            f"{str(path)!r} is damaged; delete it and run the command that writes it again (see docs/files.md)"
        ) from None


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of keys: 64 hex characters."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path, first_bytes: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first ``first_bytes`` bytes."""
    check_regular(path, "file")
    with path.open("rb") as stream:
        if first_bytes is not None:
            return hashlib.sha256(stream.read(first_bytes)).hexdigest()
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_samples(path: Path) -> str:
    """Return the SHA-256 of samples of a file: detects other weights in a time independent of their size."""
    hasher, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as stream:
        for part in range(_SAMPLES + 1):
            stream.seek(max(0, (size - _SAMPLE_BYTES) * part // _SAMPLES))
            hasher.update(stream.read(_SAMPLE_BYTES))
    return hasher.hexdigest()


def mapping_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the values that differ between two nested mappings, as ``training.k: 32 there, 64 now``."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += mapping_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            there, now = ("not set" if value is None else repr(value) for value in (a, b))
            found.append(f"{prefix}{key}: {there} there, {now} now")
    return found
