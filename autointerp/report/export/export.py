"""Write tables and explanations for other programs: CSV, Parquet, and Neuronpedia's JSON lines.

CSV is UTF-8 with ``\\n`` between rows. Every text is quoted and unchanged, numbers round-trip exactly, a missing value
is an empty field, and a list or mapping is JSON (``null`` for NaN). Read it back with ``pandas.read_csv(path,
keep_default_na=False, na_values=[""])``. A text that begins with ``=``, ``+``, ``-`` or ``@`` is a formula to a
spreadsheet; such cells are kept unchanged, counted and reported. A name that ends in ``.gz`` is compressed.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from autointerp.report.export.neuronpedia import Ids, lines_of
from autointerp.report.export.tables import TABLES, Frames, frames_of, table_named
from sae.common.errors import BadInput
from sae.common.files import add_metadata, atomic, digest_file
from sae.common.progress import say
from sae.study.run import Run

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def check_request(format_: str, table: str | None, runs: Sequence[Run]) -> str:
    """Return the requested table; raises if the format and the other options do not fit together."""
    if format_ == "neuronpedia":
        if table not in (None, "explanations"):
            raise BadInput(f"--format neuronpedia is for explanations; write --table {table} as csv or parquet")
        if len(runs) > 1:
            raise BadInput("--format neuronpedia writes one run's explanations; give --sae once")
        return "explanations"
    if format_ not in ("csv", "parquet"):
        raise BadInput(f"--table is written as csv, parquet or neuronpedia; --format {format_} writes an SAE")
    if table is None:
        raise BadInput(f"--format {format_} writes a table; name one with --table: {', '.join(TABLES)}")
    return table_named(table).name


def export_table(runs: Sequence[Run], name: str, format_: str, to: Path) -> dict[str, Any]:
    """Write the table ``name`` of ``runs`` (see :func:`autointerp.report.export.tables.frames_of`) to the file ``to``.

    Returns ``path``, ``rows``, ``columns``, ``bytes`` and, for CSV, ``formula_cells``. Raises NotFound if the table
    does not exist yet, and BadInput, before writing, if ``to`` holds something else.
    """
    frames = frames_of(name, runs)
    first = next(frames)  # raises what is missing before a file is begun
    counted = _Counted(itertools.chain([first], frames))
    metadata = {"table": name, "runs": [run.name for run in runs], "columns": [str(c) for c in first.columns]}

    def write(temporary: Path) -> None:
        if format_ == "parquet":
            _write_parquet(counted, temporary, metadata)
        else:
            with _text(temporary, to) as stream:
                _write_csv(counted, stream)

    written = _put(to, write)
    found = {"run": runs[0].name, "runs": metadata["runs"], "table": name, "format": format_, **written}
    found |= {"rows": counted.n_rows, "columns": metadata["columns"]}
    if format_ == "csv":
        found["formula_cells"] = counted.n_formulas
        if counted.n_formulas:
            say(
                f"export: {counted.n_formulas:,} texts begin like a spreadsheet's formula (= + - @) and are written as "
                "they are; a spreadsheet has to read these columns as text"
            )
    return found


def export_neuronpedia(run: Run, to: Path, ids: Ids) -> dict[str, Any]:
    """Write the run's explanations to ``to`` in Neuronpedia's form, and return a summary as JSON values.

    ``left_out`` counts failed explanations, which have no line. Raises like :func:`export_table`.
    """
    lines, left_out = lines_of(run, ids)

    def write(temporary: Path) -> None:
        with _text(temporary, to) as stream:
            stream.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    written = _put(to, write)
    if left_out:
        say(f"export: {left_out:,} explanations that failed have no line")
    of = {"model": ids.model, "source": ids.source, "author": ids.author}
    found = {"run": run.name, "table": "explanations", "format": "neuronpedia", **written, "ids": of}
    return {**found, "rows": len(lines), "columns": list(lines[0]), "left_out": left_out}


# --- files --------------------------------------------------------------------------------------------------


def _put(to: Path, write: Callable[[Path], None]) -> dict[str, Any]:
    """Write ``to`` whole or not at all; raises where it holds something else."""
    if to.is_dir():
        raise BadInput(f"{str(to)!r} is a folder; name the file to write with --to")
    there = to.exists()
    with atomic(to) as temporary:
        write(temporary)
        if there and digest_file(temporary) != digest_file(to):
            raise BadInput(f"{str(to)!r} exists and holds something else; delete it, or name another file with --to")
    return {"path": str(to), "bytes": to.stat().st_size, "kept": there}


@contextmanager
def _text(temporary: Path, to: Path) -> Iterator[TextIO]:
    """Open a text stream, compressed if the file name says so. The same text gives the same bytes."""
    with temporary.open("wb") as raw:
        if to.suffix != ".gz":
            with io.TextIOWrapper(raw, "utf-8", newline="") as stream:
                yield stream
            return
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
            io.TextIOWrapper(packed, "utf-8", newline="") as stream,
        ):
            yield stream


class _Counted:
    """Passes on the pieces of a table, and counts rows and texts that look like formulas."""

    def __init__(self, frames: Iterable[pd.DataFrame]) -> None:
        self._frames, self.n_rows, self.n_formulas = frames, 0, 0

    def __iter__(self) -> Frames:
        for frame in self._frames:
            self.n_rows += len(frame)
            yield frame

    def count_formulas(self, column: pd.Series) -> None:
        self.n_formulas += sum(isinstance(x, str) and x.startswith(_FORMULA) for x in column)


def _write_csv(frames: _Counted, stream: TextIO) -> None:
    for i, frame in enumerate(frames):
        flat = frame.copy(deep=False)
        for name in frame:
            if pd.api.types.is_object_dtype(frame[name]) and any(map(_nested, frame[name])):
                flat[name] = [_as_json(value) if _nested(value) else value for value in frame[name]]
            if pd.api.types.is_object_dtype(flat[name]) or pd.api.types.is_string_dtype(flat[name]):
                frames.count_formulas(flat[name])
        flat.to_csv(stream, index=False, header=i == 0, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def _nested(value: Any) -> bool:
    return isinstance(value, list | tuple | dict | np.ndarray)


def _as_json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """Convert a nested value to JSON values."""
    if isinstance(value, Mapping):
        return {str(key): _plain(of) for key, of in value.items()}
    if _nested(value):
        return [_plain(of) for of in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_parquet(frames: _Counted, path: Path, metadata: Mapping[str, Any]) -> None:
    schema: pa.Schema | None = None
    writer: pq.ParquetWriter | None = None
    try:
        for frame in frames:
            if schema is None or writer is None:
                schema = _schema_of(frame, metadata)
                writer = pq.ParquetWriter(path, schema)
            writer.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False))
    finally:
        if writer is not None:
            writer.close()


def _schema_of(frame: pd.DataFrame, metadata: Mapping[str, Any]) -> pa.Schema:
    """Return the columns' types; one that is empty in the first piece is text, the only type that may be missing."""
    found = pa.Schema.from_pandas(frame, preserve_index=False)
    for i, field in enumerate(found):
        if pa.types.is_null(field.type):
            found = found.set(i, field.with_type(pa.string()))
    return found.with_metadata(add_metadata(found, metadata))
