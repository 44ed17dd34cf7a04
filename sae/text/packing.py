"""Tokenise text and pack it into the rows of a corpus (:mod:`sae.text.corpus`); resumes after a kill."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from pydantic import with_config
from typing_extensions import TypedDict

from sae.common.amounts import human
from sae.common.errors import BadInput, UserError
from sae.common.files import digest, report_full_disk
from sae.common.progress import say, track
from sae.common.records import OPEN, digest_pieces, read_record, write_record
from sae.settings import CorpusSettings
from sae.text.columns import count_token_ids
from sae.text.corpus import Corpus
from sae.text.sources import Document, Hashes, TextSource, open_stdlib, open_text_files

_SCHEMA = 1
_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 512
_CHECKPOINT_SECONDS = 15.0
_END_BYTES = 8  # int64


def prepare_corpus(settings: CorpusSettings, tokenizer: Any, tokenizer_fingerprint: str, root: Path) -> Corpus:
    """Open the corpus of ``settings`` under ``root/corpora/``; make it first if it does not exist.

    Raises NotFound or BadInput if the source is missing, unreadable, not text, or shorter than one sequence.
    """
    if settings.max_tokens is not None and settings.max_tokens < settings.context:
        raise BadInput(
            f"corpus.max_tokens = {settings.max_tokens} is less than one sequence of corpus.context = "
            f"{settings.context}; raise the first or lower the second"
        )
    corpora = root / "corpora"
    source = open_source(settings, corpora / "hashes.json", tokenizer)
    if source.total is None and settings.max_tokens is None:
        raise BadInput(f"the length of {settings.source[0]!r} is unknown; set corpus.max_tokens")
    made_from = {
        "schema": _SCHEMA,
        "source": source.identity,
        "tokenizer": tokenizer_fingerprint,
        "context": settings.context,
        "max_tokens": settings.max_tokens,
        **({} if settings.end_token else {"end_token": False}),
    }
    key = digest(made_from)[:16]
    folder = corpora / key
    if not (folder / "corpus.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if not (folder / "corpus.json").is_file():
                _Packer(folder, key, settings, tokenizer, source).run(made_from)
    return Corpus.open(folder)


def open_source(settings: CorpusSettings, memo: Path, tokenizer: Any) -> TextSource:
    """Open the source of ``settings``, with hashes cached in ``memo``; raise NotFound or BadInput if it is no text.

    The ``tokenizer`` renders chat messages and bounds token ids.
    """
    if settings.kind == "stdlib":
        return open_stdlib()
    if not settings.source:
        wanted = "files or folders" if settings.kind == "text" else "a directory or a hub name"
        raise BadInput(f"corpus.source is empty, and corpus.kind {settings.kind!r} needs {wanted}; give one")
    if settings.kind == "text":
        return open_text_files(settings, Hashes(memo))
    from sae.text.hf_datasets import open_datasets  # takes a second to import

    return open_datasets(settings, Hashes(memo), tokenizer)


def _lock(folder: Path) -> AbstractContextManager[object]:
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        say(f"corpus {folder.name}: waiting for another command that is making it")
        return lock.acquire()


_COUNTS = ("rows", "pieces", "documents", "bytes", "within_document", "last_id", "n_ends")


@with_config(OPEN)
class _State(TypedDict):
    """The content of ``packing.json``."""

    rows: int
    pieces: int
    documents: int
    bytes: int
    within_document: bool
    last_id: int
    n_ends: int
    left: list[int]


class _Packer:
    """Tokenise into ``tokens.part`` and rename it when it is complete; ``documents.part`` gets the documents' ends.

    ``packing.json`` records how many pieces of text the first ``rows`` rows hold and which tokens remain, to resume.
    """

    def __init__(self, folder: Path, key: str, settings: CorpusSettings, tokenizer: Any, source: TextSource) -> None:
        self.folder, self.key, self.settings, self.source = folder, key, settings, source
        self.context = settings.context
        self.special_ids = find_special_ids(tokenizer)
        self.separator = find_separator(tokenizer) if settings.end_token else None
        self.bos = getattr(tokenizer, "bos_token_id", None)
        self.encode, self.backend = make_encoder(tokenizer)
        self.dtype = np.dtype("<u2" if count_token_ids(tokenizer) <= 1 << 16 else "<u4")
        self.max_rows = sys.maxsize if settings.max_tokens is None else settings.max_tokens // self.context
        self.part, self.ends_part = folder / "tokens.part", folder / "documents.part"
        self.state = folder / "packing.json"
        self.rows = self.pieces = self.documents = self.bytes = self.n_ends = 0
        self.last_id = -1  # of the document that is being read
        self.left = np.empty(0, dtype=self.dtype)
        self.within_document = False

    def run(self, made_from: dict[str, Any]) -> None:
        self._resume()
        hasher = hashlib.sha256(f"{self.context}\n".encode())
        with report_full_disk(self.folder), self.part.open("r+b") as stream, self.ends_part.open("r+b") as ends:
            while data := stream.read((1 << 18) * self.dtype.itemsize):
                hasher.update(np.frombuffer(data, self.dtype).astype("<u4").tobytes())
            ends.seek(0, os.SEEK_END)
            self._pack(stream, ends, hasher)
            for file in (stream, ends):
                file.flush()
                os.fsync(file.fileno())
        if self.rows == 0:
            self.part.unlink()
            self.ends_part.unlink()
            self.state.unlink(missing_ok=True)
            name = ", ".join(map(repr, self.settings.source)) or "the standard library"
            raise BadInput(
                f"the text of {name} has {human(len(self.left))} tokens, fewer than one sequence of "
                f"corpus.context = {self.context}; add text or lower corpus.context"
            )
        if self.backend is not None:
            self.backend.save(str(self.folder / "tokenizer.json"))
        self.part.replace(self.folder / "tokens.bin")
        self.ends_part.replace(self.folder / "documents.bin")
        info = {
            "kind": self.settings.kind,
            **self.source.info,
            "n_documents": self.documents,
            "n_bytes": self.bytes,
            "n_tokens": self.rows * self.context,
            "context": self.context,
            "max_tokens": self.settings.max_tokens,
            "end_token": self.separator is not None,
        }
        record = {
            "key": self.key,
            "fingerprint": hasher.hexdigest(),
            "context": self.context,
            "n_sequences": self.rows,
            "dtype": self.dtype.str,
            "special_ids": self.special_ids,
            "separator": self.separator,
            "made_from": made_from,
            "info": info,
            "digests": {
                name: digest_pieces(self.folder / name)
                for name in ("tokens.bin", "documents.bin", "tokenizer.json")
                if (self.folder / name).is_file()
            },
        }
        write_record(self.folder / "corpus.json", record)
        self.state.unlink(missing_ok=True)

    def _pack(self, stream: Any, ends: Any, hasher: Any) -> None:
        total, unit = self.max_rows * self.context, "tokens"
        if self.settings.max_tokens is None:
            total, unit = self.source.total or 0, self.source.unit
        last = time.monotonic()
        with track("tokenise", total, unit, done=self._amount(unit)) as bar:
            for batch in _batches(islice(self.source.documents(), self.pieces, None)):
                if self.rows >= self.max_rows:
                    break
                before = self._amount(unit)
                rows, ends_here = self._rows_of(batch)
                stream.write(rows.tobytes())
                ends.write(ends_here.tobytes())
                hasher.update(rows.astype("<u4").tobytes())
                bar.advance(self._amount(unit) - before)
                if time.monotonic() - last > _CHECKPOINT_SECONDS:
                    self._checkpoint(stream, ends)
                    last = time.monotonic()

    def _amount(self, unit: str) -> int:
        return {"tokens": self.rows * self.context, "bytes": self.bytes, "documents": self.documents}[unit]

    def _rows_of(self, batch: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        """Add a batch of pieces; return the rows [n, T] that it completes, and the ends of its documents."""
        parts = [self.left]
        begin, ends = self.rows * self.context, []
        limit = (self.max_rows - self.rows) * self.context
        total = len(self.left)
        for piece, ids in zip(batch, self._encode(batch), strict=True):
            if total >= limit:
                break  # so that the counts do not depend on the batches
            parts.append(np.asarray(ids, dtype=self.dtype))
            total += len(ids)
            self.pieces += 1
            self.bytes += len(piece.text.encode())
            if len(ids) > 0:
                self.within_document, self.last_id = True, int(ids[-1])
            if piece.ends and self.within_document:
                is_closed = self.source.has_markers and self.last_id == self.separator
                if self.separator is not None and not is_closed:
                    parts.append(np.asarray([self.separator], dtype=self.dtype))
                    total += 1
                ends.append(begin + total)
                self.documents += 1
                self.within_document = False
        flat = np.concatenate(parts)
        n = min(len(flat) // self.context, self.max_rows - self.rows)
        self.left = flat[n * self.context :]
        self.rows += n
        self.n_ends += len(ends)
        return flat[: n * self.context].reshape(n, self.context), np.asarray(ends, dtype="<i8")

    def _encode(self, batch: Sequence[Document]) -> list[Sequence[int]]:
        """Return the token ids of each piece. A BOS that chat templates begin with is dropped: the model adds its own.

        Only sources with markers are concerned. A BOS that is also the end-of-text token stays.
        """
        encoded = iter(self.encode([d.text for d in batch if d.ids is None]))
        found = [next(encoded) if d.ids is None else d.ids for d in batch]
        if not self.source.has_markers or self.bos is None or self.bos == self.separator:
            return found
        begins = [not self.within_document, *(d.ends for d in batch[:-1])]
        return [ids[1:] if first and ids[:1] == [self.bos] else ids for first, ids in zip(begins, found, strict=True)]

    def _checkpoint(self, stream: Any, ends: Any) -> None:
        for file in (stream, ends):
            file.flush()
            os.fsync(file.fileno())
        state = {name: getattr(self, name) for name in _COUNTS}
        write_record(self.state, {**state, "left": self.left.tolist()})

    def _resume(self) -> None:
        row_bytes = self.context * self.dtype.itemsize
        try:
            state = read_record(self.state, _State, "")
            ends = self.ends_part.stat().st_size // _END_BYTES
            if self.part.stat().st_size >= state["rows"] * row_bytes and ends >= state["n_ends"]:
                self.left = np.asarray(state["left"], dtype=self.dtype)
                vars(self).update({name: value for name, value in state.items() if name in _COUNTS})
        except (OSError, OverflowError, UserError):
            self.rows = 0
        for path, size in ((self.part, self.rows * row_bytes), (self.ends_part, self.n_ends * _END_BYTES)):
            path.touch()
            os.truncate(path, size)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group pieces into batches that are large enough for a parallel tokenizer."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def find_special_ids(tokenizer: Any) -> list[int]:
    """Return all special tokens (end of text, BOS, padding, chat markers), ascending."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {int(i) for i, token in added.items() if getattr(token, "special", False)}
    return sorted(marked | {int(i) for i in tokenizer.all_special_ids})


def find_separator(tokenizer: Any) -> int | None:
    """Return the token to put after each document: EOS, else SEP, else BOS."""
    found = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "sep", "bos"))
    return next((int(token) for token in found if token is not None), None)


def make_encoder(tokenizer: Any) -> tuple[Any, Any]:
    """Return a function ``texts -> token ids of each``, and the Rust tokenizer that it uses (or ``None``).

    It calls a copy without truncation and padding, because the Python wrapper takes twice as long.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return (lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]), None
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return (lambda texts: [e.ids for e in copy.encode_batch_fast(texts, add_special_tokens=False)]), copy
