"""Where the text of a corpus comes from: the standard library, text files, or a dataset.

Two questions are kept apart. *What is it?* is answered before anything is tokenised, by the contents
(the SHA-256 of every file that will be read, or a hub dataset's commit), so that a corpus is named by
what is in it and never by where it lay or when it was read. *Give me the text* is an iterator that holds
one piece at a time, whatever the size of the source.

Hashing a large dataset takes minutes, so the hashes are kept in a small file beside the corpora and
trusted as long as path, size and modification time are unchanged, as a version control system does.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae.common.errors import BadInput, NotFound, alike, nearest
from sae.common.files import digest, read_json, write_json
from sae.settings import CorpusSettings

PIECE_CHARACTERS = 1 << 18
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson")
JSON_LINES = (".jsonl", ".ndjson")
_READ = 1 << 20
_SETTLED_SECONDS = 2.0  # a file changed more recently may change again without a new modification time
_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages"})


class Document(NamedTuple):
    """A document, or one piece of a long one: ``ends`` is false where the next piece goes on with it."""

    name: str
    text: str
    ends: bool = True


@dataclass(frozen=True)
class TextSource:
    """``identity``: JSON that changes exactly when the text does. ``info``: what a run's record says of
    it. ``total`` counts ``unit`` (bytes or documents); ``None`` where nobody knows."""

    identity: dict[str, Any]
    info: dict[str, Any]
    documents: Callable[[], Iterator[Document]]
    total: int | None
    unit: str


def open_source(settings: CorpusSettings, memo: Path) -> TextSource:
    """The text that ``settings`` name. ``memo`` is the file in which content hashes are kept.

    Raises :class:`NotFound` or :class:`BadInput` for a source that is not there or is no text.
    """
    if settings.kind == "stdlib":
        return _stdlib()
    if not settings.source:
        wanted = "files or folders" if settings.kind == "text" else "a directory or a hub name"
        raise BadInput(f"corpus.source is empty, and corpus.kind {settings.kind!r} needs {wanted}; give one")
    if settings.kind == "text":
        return _text_files(settings, Hashes(memo))
    from sae.text.hf_datasets import open_dataset

    return open_dataset(settings, Hashes(memo))


# --- content hashes ---------------------------------------------------------------------------------------


class FileFacts(NamedTuple):
    sha256: str
    size: int
    not_text_at: int | None  # offset of the first byte that is no UTF-8 text; None: all of it is


class Hashes:
    """Content hashes of files, remembered in ``memo`` by path, size and modification time."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        try:
            self._known: dict[str, list[Any]] = read_json(memo)
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def facts(self, path: Path) -> FileFacts:
        """Hash of a file's bytes, and whether they are UTF-8 text. Reads it once, then remembers."""
        try:
            status = path.stat()
            key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
            kept = self._known.get(key)
            if isinstance(kept, list) and kept[:2] == stamp and len(kept) == 4:
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
            write_json(self._memo, self._known)
            self._changed = False


def _read_facts(path: Path) -> FileFacts:
    hasher, size, bad = hashlib.sha256(), 0, None
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as stream:
        while True:
            data = stream.read(_READ)
            if bad is None:
                bad = _first_bad(data, decoder, size, final=not data)
            if not data:
                return FileFacts(hasher.hexdigest(), size, bad)
            hasher.update(data)
            size += len(data)


def _first_bad(data: bytes, decoder: codecs.IncrementalDecoder, offset: int, final: bool) -> int | None:
    """Offset in the file of the first NUL or byte that is not UTF-8, if there is one in ``data``."""
    found = [offset + nul] if (nul := data.find(b"\0")) >= 0 else []
    pending = len(decoder.getstate()[0])
    try:
        decoder.decode(data, final)
    except UnicodeDecodeError as error:
        found.append(offset - pending + error.start)
    return min(found, default=None)


# --- the standard library ---------------------------------------------------------------------------------


def _stdlib() -> TextSource:
    from sae.text.stdlib import read_stdlib

    text = read_stdlib()
    contents = [hashlib.sha256(f.text.encode()).hexdigest() for f in text.files]
    info = {
        "source": f"Python {sys.version_info.major}.{sys.version_info.minor} standard library",
        "files": len(text.files),
        "files_changed": text.n_changed,
        "files_missing": len(text.missing),
    }
    return TextSource(
        identity={"kind": "stdlib", "contents": digest(contents)},
        info=info,
        documents=lambda: (Document(f.path, f.text) for f in text.files),
        total=sum(len(f.text.encode()) for f in text.files),
        unit="bytes",
    )


# --- text files -------------------------------------------------------------------------------------------


def _text_files(settings: CorpusSettings, hashes: Hashes) -> TextSource:
    chosen: list[Path] = []
    contents: list[list[str]] = []
    skipped: list[str] = []
    total = 0
    for name in settings.source:
        given = Path(name).expanduser()
        if not given.exists():
            raise NotFound(f"text {name!r} does not exist{_beside(given)}")
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
            why = (
                "the one file there is not UTF-8 text" if len(skipped) == 1 else f"{len(skipped)} files, no UTF-8 text"
            )
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


def _beside(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    found = alike(path.name, names)
    return f"; beside it there is {nearest(path.name, found)}" if found else ""


def _files_below(folder: Path) -> list[Path]:
    """Text files under ``folder`` in the order of their paths; hidden and generated folders left out."""

    def wanted(path: Path) -> bool:
        inner = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in inner)
        return path.suffix.lower() in TEXT_SUFFIXES and not hidden and path.is_file()

    return sorted((p for p in folder.rglob("*") if wanted(p)), key=lambda p: p.relative_to(folder).as_posix())


def _read_all(paths: list[Path], column: str) -> Iterator[Document]:
    for path in paths:
        yield from read_json_lines(path, column) if path.suffix.lower() in JSON_LINES else read_pieces(path)


def read_pieces(path: Path, size: int = PIECE_CHARACTERS) -> Iterator[Document]:
    """A text file in pieces of about ``size`` characters.

    A piece ends at the start of a line where there is one, since no tokenizer with a pre-tokenizer joins
    the end of one line to the first word of the next: the pieces' tokens are then the whole file's.
    """
    with path.open(encoding="utf-8-sig", newline="") as stream:
        held = stream.read(size)
        while following := stream.read(size):
            held += following
            cut = place_to_cut(held)
            yield Document(str(path), held[:cut], ends=False)
            held = held[cut:]
        yield Document(str(path), held)


def place_to_cut(text: str) -> int:
    """Where to end a piece: at the last start of a line that begins with a word, else before a space."""
    at = text.rfind("\n", 0, len(text) - 1)
    while at >= 0 and text[at + 1].isspace():
        at = text.rfind("\n", 0, at)
    if at < 0:
        at = text.rfind(" ", 1) - 1  # the space stays with the word that it precedes
    return at + 1 if at >= 0 else len(text)


def in_pieces(name: str, text: str, size: int = PIECE_CHARACTERS) -> Iterator[Document]:
    """A text that is in memory already, cut as :func:`read_pieces` would."""
    while len(text) > size:
        cut = place_to_cut(text[: size + 1])
        yield Document(name, text[:cut], ends=False)
        text = text[cut:]
    yield Document(name, text)


def read_json_lines(path: Path, column: str) -> Iterator[Document]:
    """One document per line: the string under ``column`` of its JSON object."""
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadInput(f"{str(path)!r} line {number} is not JSON ({error}); mend or remove the line") from None
            if not isinstance(row, dict):
                raise BadInput(f"{str(path)!r} line {number} is not a JSON object; each line must be one")
            yield from in_pieces(f"{path}:{number}", text_of(row, column, f"{str(path)!r} line {number}"))


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """The text under ``column``, a missing value as an empty text."""
    if column not in row:
        raise NotFound(f"{where} has no column {column!r}; did you mean {nearest(column, row)}? (corpus.column)")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise BadInput(
            f"{where}: column {column!r} holds {type(value).__name__}, not text; "
            f"choose another of its columns ({', '.join(row)})"
        )
    try:
        (value or "").encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        value = str(value).encode(errors="replace").decode()
    return value or ""
