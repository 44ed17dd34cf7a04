"""Write a run's tables for other programs as CSV or Parquet, and its explanations as Neuronpedia's JSON lines.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from autointerp.findings.json_values import to_json
from autointerp.journal.journal import Journal, open_journal
from autointerp.notebook import Run as OpenedRun
from autointerp.report.neuronpedia import Ids, lines_of
from sae.alignment.alignment import pair_path, read_sides
from sae.common.commands import command
from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import add_metadata, atomic, digest_file, read_table
from sae.common.progress import say
from sae.study.align import behaviour_folder
from sae.study.logits import LogitTable
from sae.study.run import Run

VERDICTS_AT_ONCE = 100_000
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
    known = ", ".join(TABLES)
    if table is None:
        raise BadInput(f"--format {format_} writes a table; name one with --table: {known}")
    if table not in TABLES:
        raise NotFound(f"--table {table!r} does not exist; did you mean {suggest(table, TABLES)}? There are {known}")
    return table


def export_table(runs: Sequence[Run], name: str, format_: str, to: Path) -> dict[str, Any]:
    """Write the table ``name`` of ``runs`` (see :func:`frames_of`) to the file ``to``.

    Returns ``path``, ``rows``, ``columns``, ``bytes`` and, for CSV, ``formula_cells``. Raises NotFound if the table
    does not exist yet, and BadInput, before writing, if ``to`` holds something else.
    """
    frames = frames_of(name, runs)
    first = next(frames)  # raises what is missing before a file is begun
    frames = itertools.chain([first], frames)
    metadata = {"table": name, "runs": [run.name for run in runs], "columns": [str(c) for c in first.columns]}
    found = {"run": runs[0].name, "runs": metadata["runs"], "table": name, "format": format_}

    def write(temporary: Path) -> dict[str, int]:
        if format_ == "parquet":
            return {"rows": _write_parquet(frames, temporary, metadata)}
        with _text(temporary, to) as stream:
            n_rows, n_formulas = _write_csv(frames, stream)
        return {"rows": n_rows, "formula_cells": n_formulas}

    found |= {**_put(to, write), "columns": metadata["columns"]}
    if found.get("formula_cells"):
        say(
            f"export: {found['formula_cells']:,} texts begin like a spreadsheet's formula (= + - @) and are written as "
            "they are; a spreadsheet has to read these columns as text"
        )
    return found


def export_neuronpedia(run: Run, to: Path, ids: Ids) -> dict[str, Any]:
    """Write the run's explanations to ``to`` in Neuronpedia's form, and return a summary as JSON values.

    ``left_out`` counts failed explanations, which have no line. Raises like :func:`export_table`.
    """
    lines, left_out = lines_of(run, ids)

    def write(temporary: Path) -> dict[str, int]:
        with _text(temporary, to) as stream:
            stream.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        return {"rows": len(lines)}

    written = _put(to, write)
    if left_out:
        say(f"export: {left_out:,} explanations that failed have no line")
    of = {"model": ids.model, "source": ids.source, "author": ids.author}
    found = {"run": run.name, "table": "explanations", "format": "neuronpedia", **written, "ids": of}
    return {**found, "columns": list(lines[0]), "left_out": left_out}


# --- files --------------------------------------------------------------------------------------------------


def _put(to: Path, write: Callable[[Path], dict[str, int]]) -> dict[str, Any]:
    """Write ``to`` whole or not at all, and add what ``write`` counts; raises where it holds something else."""
    if to.is_dir():
        raise BadInput(f"{str(to)!r} is a folder; name the file to write with --to")
    there = to.exists()
    with atomic(to) as temporary:
        counts = write(temporary)
        if there and digest_file(temporary) != digest_file(to):
            raise BadInput(f"{str(to)!r} exists and holds something else; delete it, or name another file with --to")
    return {"path": str(to), "bytes": to.stat().st_size, "kept": there, **counts}


@contextmanager
def _text(temporary: Path, to: Path) -> Iterator[TextIO]:
    """Open a text stream, compressed if the file name says so. The same text gives the same bytes."""
    with ExitStack() as opened:
        raw: Any = opened.enter_context(temporary.open("wb"))
        if to.suffix == ".gz":
            raw = opened.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0))
        yield opened.enter_context(io.TextIOWrapper(raw, "utf-8", newline=""))


def _write_csv(frames: Iterable[pd.DataFrame], stream: TextIO) -> tuple[int, int]:
    """Return the number of rows, and of texts that look like formulas."""
    n_rows = n_formulas = 0
    for i, frame in enumerate(frames):
        flat = frame.copy(deep=False)
        n_rows += len(frame)
        for name in frame:
            if pd.api.types.is_object_dtype(frame[name]) and any(map(_is_nested, frame[name])):
                flat[name] = [_as_json(value) if _is_nested(value) else value for value in frame[name]]
            if pd.api.types.is_object_dtype(flat[name]) or pd.api.types.is_string_dtype(flat[name]):
                n_formulas += sum(isinstance(x, str) and x.startswith(_FORMULA) for x in flat[name])
        flat.to_csv(stream, index=False, header=i == 0, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    return n_rows, n_formulas


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple | dict | np.ndarray)


def _as_json(value: Any) -> str:
    return json.dumps(to_json(value), ensure_ascii=False, allow_nan=False)


def _write_parquet(frames: Iterator[pd.DataFrame], path: Path, metadata: Mapping[str, Any]) -> int:
    """Return the number of rows."""
    first = next(frames)
    schema, n_rows = _schema_of(first, metadata), 0
    with pq.ParquetWriter(path, schema) as writer:
        for frame in itertools.chain([first], frames):
            writer.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False))
            n_rows += len(frame)
    return n_rows


def _schema_of(frame: pd.DataFrame, metadata: Mapping[str, Any]) -> pa.Schema:
    """Return the columns' types; one that is empty in the first piece is text, the only type that may be missing."""
    found = pa.Schema.from_pandas(frame, preserve_index=False)
    for i, field in enumerate(found):
        if pa.types.is_null(field.type):
            found = found.set(i, field.with_type(pa.string()))
    return found.with_metadata(add_metadata(found, metadata))


# --- tables -------------------------------------------------------------------------------------------------

Frames = Iterator[pd.DataFrame]
"""One table, in pieces where it may not fit in memory at once; all have the same columns."""
_Reader = Callable[[Run, Sequence[Run]], pd.DataFrame | Frames]


def frames_of(name: str, runs: Sequence[Run]) -> Frames:
    """Return the table ``name`` of the first of ``runs``; one about pairs is against the others (default: all).

    Raises NotFound for a missing table, with the command that makes it, and BadInput for a second run if the table is
    about one.
    """
    run, others = runs[0], [other for other in runs[1:] if other.name != runs[0].name]
    if others and name not in _OF_PAIRS:
        raise BadInput(f"table {name!r} is about one run; several --sae are for {' and '.join(_OF_PAIRS)}")
    found = TABLES[name](run, others)
    return iter([found]) if isinstance(found, pd.DataFrame) else found


def _adapt(read: Callable[[OpenedRun], pd.DataFrame]) -> _Reader:
    return lambda run, _: read(OpenedRun(run.name, run.root))


def _stage(stage: str, what: str, maker: str) -> _Reader:
    """Return a reader of a stage's file, which names the command ``maker`` if there is no file."""

    def read(run: Run, _: Sequence[Run]) -> pd.DataFrame:
        if not run.stage_path(stage).exists():
            raise run.missing_error(what, maker)
        return read_table(run.stage_path(stage))

    return read


def _overlap(run: Run, _: Sequence[Run]) -> pd.DataFrame:
    if not run.stage_path("overlap").exists():
        raise _unaligned_error("overlap", run, *run.siblings())
    return read_table(run.stage_path("overlap"))


def _unaligned_error(what: str, *runs: Run) -> NotFound:
    names = [run.name for run in runs]
    return NotFound(f"there is no {what} of {' and '.join(names)}; run `{command(runs[0].root, 'align', *names)}`")


def _training(run: Run, _: Sequence[Run]) -> pd.DataFrame:
    if not run.training_log_path.exists():
        why = "it was imported" if run.imported else "it is not trained; give its `train` command again"
        raise NotFound(f"run {run.name!r} has no training log: {why}")
    return read_table(run.training_log_path)


def _read_sides(run: Run, others: Sequence[Run], folder: Path, what: str) -> pd.DataFrame:
    """Return the run's side of each of its pairs, with ``run`` and ``other`` before the file's columns."""
    tables = []
    for other in _list_others(run, others, folder, what):
        side = read_sides(folder, run.name, other.name)[0]
        side.insert(0, "run", run.name)
        side.insert(1, "other", other.name)
        tables.append(side)
    return pd.concat(tables, ignore_index=True)


def _list_others(run: Run, others: Sequence[Run], folder: Path, what: str) -> Sequence[Run]:
    """Return the other runs of the pairs: those given, else all with a file. Raises NotFound if a file is missing."""
    siblings = run.siblings()
    found = others or [of for of in siblings if pair_path(folder, run.name, of.name) is not None]
    for other in found or siblings:
        if pair_path(folder, run.name, other.name) is None:
            raise _unaligned_error(what, run, other)
    if not found:
        raise NotFound(f"run {run.name!r} has no sibling to be compared with; {run.suggest_another_run()}")
    return found


def _pairs(run: Run, others: Sequence[Run]) -> Frames:
    """Return a flat row for each latent and other run: the pair that ``compare`` shows."""
    from autointerp.findings.json_values import to_json
    from autointerp.findings.pair import compare_runs

    for other in _list_others(run, others, run.root / "alignments", "alignment"):
        rows = []
        for pair in to_json(compare_runs(run, other).pairs):
            shared = {f"shared_{name}": value for name, value in pair["shared"].items()}
            row = {"run": run.name, "other": other.name, **pair, **shared}
            for end, side in zip(("", "_there"), pair["sides"], strict=True):
                score = side["score"] or {}
                row |= {f"{name}{end}": side[name] for name in ("n_firings", "firing_frequency", "explanation")}
                row |= {f"score{end}": score.get("value"), f"auroc{end}": score.get("auroc")}
                bounds = score.get("interval") or (None, None)
                row |= {f"score_low{end}": bounds[0], f"score_high{end}": bounds[1]}
            del row["shared"], row["sides"], row["is_shared"]
            rows.append(row)
        yield _typed(pd.DataFrame(rows))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Give columns without a value in one piece the type that they have in the others."""
    words = ("explanation", "explanation_there")
    whole = ("latent", "partner", "encoder_partner", "n_firings", "n_firings_there")
    plain = ("run", "other", "same_partner", *(c for c in table if str(c).startswith("shared_")))
    types: dict[Any, Any] = dict.fromkeys(whole, "Int64") | dict.fromkeys(words, object)
    types |= {column: float for column in table if column not in (*words, *whole, *plain)}
    return table.astype(types)


def _open_journal(run: Run) -> Journal:
    if not run.journal_path.exists():
        raise run.missing_error("explanations", "explain")
    return open_journal(run)


def _verdicts(run: Run, _: Sequence[Run]) -> Frames:
    with _open_journal(run) as journal:
        yield from journal.verdicts_in_pieces(VERDICTS_AT_ONCE)


def _usage(run: Run, _: Sequence[Run]) -> pd.DataFrame:
    with _open_journal(run) as journal:
        return journal.usage()


def _contexts(run: OpenedRun) -> pd.DataFrame:
    """Return the contexts that explainers saw, one latent at a time by number."""
    from autointerp.contexts.material import Material

    latents = sorted({int(latent) for latent in run.explanations()["latent"]})
    sampler = Material.of(run).sampler
    rows = [
        (latent, of.window, of.stratum, of.text, list(of.tokens), [float(a) for a in of.activations])
        for latent in latents
        for of in sampler.explaining(latent)
    ]
    return pd.DataFrame(rows, columns=["latent", "window", "stratum", "text", "tokens", "activations"])


_OF_PAIRS = ("alignment", "behaviour", "pairs")  # further runs may be named: those that the first one is compared with
TABLES: dict[str, _Reader] = {
    "latents": _adapt(OpenedRun.latents),
    "firing": _stage("firing", "firings", "harvest"),
    "logits": lambda run, _: LogitTable(run).table,
    "overlap": _overlap,
    "eligibility": _stage("contexts", "count of contexts", "explain"),
    "training": _training,
    "alignment": lambda run, others: _read_sides(run, others, run.root / "alignments", "alignment"),
    "behaviour": lambda run, others: _read_sides(run, others, behaviour_folder(run.root), "comparison of firings"),
    "pairs": _pairs,
    "contexts": _adapt(_contexts),
    "explanations": _adapt(OpenedRun.explanations),
    "verdicts": _verdicts,
    "scores": _adapt(OpenedRun.scores),
    "sample": _adapt(OpenedRun.sample),
    "reliability": _adapt(OpenedRun.reliability),
    "usage": _usage,
}
