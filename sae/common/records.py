"""Read JSON records through a type that is checked, and detect damage in files by digests of their pieces.

A record's ``digest`` is of its other content, so a changed number is found too; older records have none. Pieces are
hashed with XXH3, which finds damage but not forgery.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sae.common.errors import BadInput, SettingsDiffer
from sae.common.files import SCHEMA, check_regular, digest, write_json

OPEN = ConfigDict(extra="allow", strict=True)  # of records: later versions may add keys
PIECE_BYTES = 1 << 22
_T = TypeVar("_T")
_intact: set[tuple[Path, int, int, int, str]] = set()  # pieces that this process has checked


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write ``record`` with its schema and its digest."""
    content = {"schema": SCHEMA, **record}
    write_json(path, {**content, "digest": digest(content)})


def read_record(path: Path, kind: type[_T], fix: str) -> _T:
    """Read the record in ``path`` as ``kind``, a TypedDict with :data:`OPEN`; ``fix`` ends the error message.

    Raises FileNotFoundError, SettingsDiffer for another schema, BadInput for damage.
    """
    check_regular(path, "record")
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
        if type(schema := record.get("schema")) is int and schema != SCHEMA:
            raise SettingsDiffer(
                f"{str(path)!r} has schema {schema}, this program reads {SCHEMA}; use that version, or {fix}"
            )
        stored = record.pop("digest", None)
        if stored is not None and stored != digest(record):
            raise ValueError('its content does not match its digest; remove "digest" if you changed it on purpose')
        return cast(_T, _adapter(cast(Any, kind)).validate_python(record, strict=True))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise BadInput(f"{str(path)!r} is damaged ({reason}); {fix}")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _hash(piece: bytes) -> str:
    import xxhash  # only where files are compared

    return xxhash.xxh3_64_hexdigest(piece)


def digest_pieces(path: Path) -> list[str]:
    """Return the XXH3 digest of each piece of :data:`PIECE_BYTES` of a file."""
    with path.open("rb") as stream:
        return [_hash(piece) for piece in iter(lambda: stream.read(PIECE_BYTES), b"")]


def check_pieces(path: Path, digests: Sequence[str], first: int = 0, last: int | None = None) -> bool:
    """Return whether the pieces that hold bytes ``first`` to ``last`` (exclusive) match; each is read once."""
    if not digests:
        return True
    check_regular(path, "file")
    status = path.stat()
    stop = len(digests) if last is None else min(len(digests), -(-last // PIECE_BYTES))
    for number in range(first // PIECE_BYTES, stop):
        key = (path, status.st_ino, status.st_mtime_ns, number, digests[number])
        if key in _intact:
            continue
        with path.open("rb") as stream:
            stream.seek(number * PIECE_BYTES)
            if _hash(stream.read(PIECE_BYTES)) != digests[number]:
                return False
        _intact.add(key)
    return True
