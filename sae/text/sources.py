"""Open the text of a corpus (the standard library or text files), and read its documents in pieces.

A corpus is identified by the hash of its contents (the SHA-256 of each file, or a hub dataset's commit). Hashes are
kept in a small file and trusted while path, size and modification time are unchanged.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sae.common.errors import BadInput, NotFound, UserError, join_or, suggest
from sae.common.files import check_regular, digest, expand_user, parse_json
from sae.common.records import read_record, write_record
from sae.settings import CorpusSettings
from sae.text.stdlib import read_stdlib

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson")
_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages"})
PIECE_CHARACTERS = 1 << 18
JSON_LINES = (".jsonl", ".ndjson")
_READ = 1 << 20
_SETTLED_SECONDS = 2.0  # a newer file may change again within the same modification time


Form = Literal["text", "messages", "token ids"]


class Document(NamedTuple):
    """A document, or one piece of it; ``ends`` is false if the next piece continues it.

    ``ids`` are the token ids of a document that is tokenised already; its text is then empty.
    """

    name: str
    text: str
    ends: bool = True
    ids: list[int] | None = None


@dataclass(frozen=True)
class TextSource:
    """A source of text.

    ``identity`` is JSON that changes exactly when the text does; ``info`` is the entry in a run's record; ``total`` is
    the number of ``unit`` (bytes or documents), ``None`` if unknown. ``has_markers``: documents may begin with a BOS
    and end with an end token of their own, as chat templates write them.
    """

    identity: dict[str, Any]
    info: dict[str, Any]
    documents: Callable[[], Iterator[Document]]
    total: int | None
    unit: str
    has_markers: bool = False


def open_stdlib() -> TextSource:
    files, missing = read_stdlib()
    contents = [hashlib.sha256(f.text.encode()).hexdigest() for f in files]
    info = {
        "source": f"Python {sys.version_info.major}.{sys.version_info.minor} standard library",
        "files": len(files),
        "files_changed": sum(not f.as_listed for f in files),
        "files_missing": len(missing),
    }
    return TextSource(
        identity={"kind": "stdlib", "contents": digest(contents)},
        info=info,
        documents=lambda: (Document(f.path, f.text) for f in files),
        total=sum(len(f.text.encode()) for f in files),
        unit="bytes",
    )


def open_text_files(settings: CorpusSettings, hashes: Hashes) -> TextSource:
    """Open the files and folders ``settings.source``; raise NotFound or BadInput if they are no text."""
    chosen: list[Path] = []
    contents: list[list[str]] = []
    skipped: list[str] = []
    total = 0
    for name in settings.source:
        given = expand_user(name)
        if not given.exists():
            raise NotFound(f"text {name!r} does not exist{_hint(given)}")
        check_regular(given, "text")
        for path in _files_below(given) if given.is_dir() else [given]:
            facts = hashes.facts(path)
            if facts.not_text_at is not None:
                if not given.is_dir():
                    raise BadInput(
                        f"{name!r} is not UTF-8 text (first at byte {facts.not_text_at}); "
                        "convert it, or give it as a dataset if it is a data file"
                    )
                skipped.append(str(path))
                continue
            total += facts.size
            chosen.append(path)
            contents.append([facts.sha256, "lines of JSON" if path.suffix.lower() in JSON_LINES else "text"])
    hashes.save()
    if not chosen:
        why = f"none ends in {' '.join(TEXT_SUFFIXES)}"
        if skipped:
            why = f"none of the {len(skipped)} files is UTF-8 text"
        raise NotFound(f"no text files in {', '.join(map(repr, settings.source))}: {why}; name other files or folders")
    identity: dict[str, Any] = {"kind": "text", "contents": digest(contents)}
    if any(how != "text" for _, how in contents):
        identity["column"] = settings.column
    return TextSource(
        identity=identity,
        info={"source": list(settings.source), "files": len(chosen), "files_not_text": len(skipped)},
        documents=lambda: _read_all(chosen, settings.column),
        total=total,
        unit="bytes",
    )


def _hint(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, names)
    return f"; did you mean {join_or(found)}?" if found else ""


def _files_below(folder: Path) -> list[Path]:
    def wanted(path: Path) -> bool:
        inner = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in inner)
        return path.suffix.lower() in TEXT_SUFFIXES and not hidden and path.is_file()

    return sorted((p for p in folder.rglob("*") if wanted(p)), key=lambda p: p.relative_to(folder).as_posix())


def _read_all(paths: list[Path], column: str) -> Iterator[Document]:
    for path in paths:
        yield from read_json_lines(path, column) if path.suffix.lower() in JSON_LINES else read_pieces(path)


_FACTS = ([str, int], [str, type(None)])  # types of sha256 and not_text_at


class FileFacts(NamedTuple):
    sha256: str
    size: int
    not_text_at: int | None  # offset of the first byte that is not UTF-8 text


class Hashes:
    """Content hashes of files, cached in ``memo`` by path, size and modification time."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        self._known: dict[str, Any] = {}
        with suppress(OSError, UserError):
            record = read_record(memo, dict[str, Any], "")
            files = record.get("files", record)  # older ones have no key above the files
            self._known = files if isinstance(files, dict) else {}
        self._changed = False

    def facts(self, path: Path) -> FileFacts:
        """Return the hash of a file, and whether it is UTF-8 text."""
        try:
            status = path.stat()
            key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
            kept = self._known.get(key)
            if isinstance(kept, list) and kept[:2] == stamp and [type(v) for v in kept[2:]] in _FACTS:
                return FileFacts(kept[2], status.st_size, kept[3])
            facts = _read_facts(path)
        except OSError as error:
            raise BadInput(f"{str(path)!r} cannot be read: {error.strerror or error}; check its permissions") from None
        if time.time() - status.st_mtime > _SETTLED_SECONDS and facts.size == status.st_size:
            self._known[key] = [*stamp, facts.sha256, facts.not_text_at]
            self._changed = True
        return facts

    def save(self) -> None:
        if self._changed:
            write_record(self._memo, {"files": self._known})
            self._changed = False


def _read_facts(path: Path) -> FileFacts:
    hasher, size, bad = hashlib.sha256(), 0, None
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as stream:
        while True:
            data = stream.read(_READ)
            if bad is None:
                found = [size + nul] if (nul := data.find(b"\0")) >= 0 else []
                pending = len(decoder.getstate()[0])
                try:
                    decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    found.append(size - pending + error.start)
                bad = min(found, default=None)
            if not data:
                return FileFacts(hasher.hexdigest(), size, bad)
            hasher.update(data)
            size += len(data)


def read_pieces(path: Path, size: int = PIECE_CHARACTERS) -> Iterator[Document]:
    """Yield a text file in pieces of about ``size`` characters.

    Pieces end before a line if possible: no token spans a line end and the next word, so the tokens stay the same.
    """
    with path.open(encoding="utf-8-sig", newline="") as stream:
        held = stream.read(size)
        while following := stream.read(size):
            held += following
            cut = find_cut(held)
            yield Document(str(path), held[:cut], ends=False)
            held = held[cut:]
        yield Document(str(path), held)


def find_cut(text: str) -> int:
    """Return where to end a piece: at the last line that starts with a word, else before a space."""
    at = text.rfind("\n", 0, len(text) - 1)
    while at >= 0 and text[at + 1].isspace():
        at = text.rfind("\n", 0, at)
    if at < 0:
        at = text.rfind(" ", 1) - 1  # the space stays with the next word
    return at + 1 if at >= 0 else len(text)


def split_text(name: str, text: str, size: int = PIECE_CHARACTERS) -> Iterator[Document]:
    while len(text) > size:
        cut = find_cut(text[: size + 1])
        yield Document(name, text[:cut], ends=False)
        text = text[cut:]
    yield Document(name, text)


def read_json_lines(path: Path, column: str) -> Iterator[Document]:
    """Yield one document per line: the string under ``column`` of its JSON object."""
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise BadInput(f"{str(path)!r} line {number} is not JSON ({error}); fix or remove the line") from None
            if not isinstance(row, dict):
                raise BadInput(f"{str(path)!r} line {number} is not a JSON object; each line must be one")
            yield from split_text(f"{path}:{number}", get_text(row, column, f"{str(path)!r} line {number}"))


def find_form(value: Any) -> Form | None:
    """Return how a dataset's value can be read; ``None`` if it cannot be, or is missing or empty."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in value):
        return "messages"
    return "token ids" if all(type(each) is int for each in value) else None


def _advise(row: Mapping[str, Any], column: str, form: Form | None) -> str:
    """Return what to do about a column that cannot be read as text."""
    if form is not None:
        return "give the file as a dataset (--dataset)"
    readable = [f"{name!r} ({found})" for name, value in row.items() if name != column and (found := find_form(value))]
    if readable:
        return f"choose {' or '.join(readable)} (corpus.column)"
    return "choose another column" if len(row) == 1 else "none of its other columns can be read as text"


def get_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """Return the text under ``column``, empty for a missing value."""
    if column not in row:
        raise NotFound(f"{where} has no column {column!r}; did you mean {suggest(column, row)}? (corpus.column)")
    value = row[column]
    if value is not None and not isinstance(value, str):
        form = find_form(value)
        kind = form or type(value).__name__
        raise BadInput(f"{where}: column {column!r} holds {kind}, not text; {_advise(row, column, form)}")
    try:
        (value or "").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON allows
        value = str(value).encode(errors="replace").decode()
    return value or ""
