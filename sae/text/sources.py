"""Open the source of a corpus: the standard library, text files, or a dataset."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae.common.errors import BadInput, NotFound, find_similar, suggest
from sae.common.files import digest
from sae.settings import CorpusSettings
from sae.text.documents import JSON_LINES, Document, Hashes, TextSource, read_json_lines, read_pieces

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson")
_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages"})


def open_source(settings: CorpusSettings, memo: Path) -> TextSource:
    """Open the source of ``settings``, with hashes cached in ``memo``; raise NotFound or BadInput if it is no text."""
    if settings.kind == "stdlib":
        return _stdlib()
    if not settings.source:
        wanted = "files or folders" if settings.kind == "text" else "a directory or a hub name"
        raise BadInput(f"corpus.source is empty, and corpus.kind {settings.kind!r} needs {wanted}; give one")
    if settings.kind == "text":
        return _text_files(settings, Hashes(memo))
    from sae.text.hf_datasets import open_dataset  # takes a second to import

    return open_dataset(settings, Hashes(memo))


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


def _text_files(settings: CorpusSettings, hashes: Hashes) -> TextSource:
    chosen: list[Path] = []
    contents: list[list[str]] = []
    skipped: list[str] = []
    total = 0
    for name in settings.source:
        given = Path(name).expanduser()
        if not given.exists():
            raise NotFound(f"text {name!r} does not exist{_hint(given)}")
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
    found = find_similar(path.name, names)
    return f"; did you mean {suggest(path.name, found)}?" if found else ""


def _files_below(folder: Path) -> list[Path]:
    def wanted(path: Path) -> bool:
        inner = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in inner)
        return path.suffix.lower() in TEXT_SUFFIXES and not hidden and path.is_file()

    return sorted((p for p in folder.rglob("*") if wanted(p)), key=lambda p: p.relative_to(folder).as_posix())


def _read_all(paths: list[Path], column: str) -> Iterator[Document]:
    for path in paths:
        yield from read_json_lines(path, column) if path.suffix.lower() in JSON_LINES else read_pieces(path)
