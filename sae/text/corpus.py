"""Packed token sequences on disk, and the order in which they are read.

Documents follow one another, separated by the end-of-text token, and are cut into rows of T tokens, which every later
stage reads. The subject model adds a BOS for its forward pass and drops it again.

Activations may differ in the last bit with the shape of a batch, so a sequence is always computed with the same others,
its *block*, drawn at random. An order shuffles the blocks, then the sequences within groups of :data:`MIXED_BLOCKS`
blocks. Reading in order computes each block once with one group in memory, yet no two epochs repeat a batch.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import Field, with_config
from typing_extensions import TypedDict

from sae.common.commands import shell_command
from sae.common.errors import BadInput, NotFound
from sae.common.records import OPEN, PIECE_BYTES, check_pieces, read_record

BLOCK_TOKENS = 4096
MIXED_BLOCKS = 4
_BLOCK_SEED = 0x5AE
_SCAN_TOKENS = 1 << 24
_AGAIN = f"delete the folder and run `{shell_command('train')}` with the same settings to write it again"


@with_config(OPEN)
class CorpusRecord(TypedDict):
    """The content of ``corpus.json``."""

    key: str
    fingerprint: str
    context: Annotated[int, Field(ge=1)]
    n_sequences: Annotated[int, Field(ge=1)]
    dtype: Literal["<u2", "<u4"]
    special_ids: list[int]
    separator: NotRequired[int | None]
    info: dict[str, Any]
    digests: NotRequired[dict[str, list[str]]]  # of the pieces of the files; older corpora have none


class Corpus:
    """N packed sequences of T tokens, memory-mapped. :func:`sae.text.packing.prepare_corpus` makes one.

    Attributes:
        key: the folder's name, 16 hex characters of the digest of its inputs.
        fingerprint: SHA-256 of the tokens and T, 64 hex characters.
        context: T.
        n_sequences, n_tokens: N and N·T.
        special_ids: the tokenizer's special tokens, ascending.
        info: the entry in ``run.json`` (kind, source, counts of files, documents, bytes and tokens).
        tokens: [N, T], uint16 or uint32, read-only.
    """

    def __init__(self, folder: Path, record: CorpusRecord, tokens: np.memmap) -> None:
        self.folder = folder
        self._digests = record.get("digests", {})
        self._intact: set[int] = set()  # pieces of the tokens that match their digests
        self.key: str = record["key"]
        self.fingerprint: str = record["fingerprint"]
        self.context: int = record["context"]
        self.special_ids: tuple[int, ...] = tuple(record["special_ids"])
        self.info: dict[str, Any] = record["info"]
        self._separator = record.get("separator")
        self.tokens = tokens
        self.n_sequences: int = tokens.shape[0]
        self.n_tokens: int = tokens.size
        self._piece = functools.cache(self._piece_of)

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Open a stored corpus. Raises NotFound if there is none, BadInput if it is damaged."""
        try:
            record = read_record(folder / "corpus.json", CorpusRecord, _AGAIN)
            n, context, dtype = record["n_sequences"], record["context"], np.dtype(record["dtype"])
            if (folder / "tokens.bin").stat().st_size != n * context * dtype.itemsize:
                raise BadInput(f"corpus {str(folder)!r} is damaged (tokens.bin has the wrong size); {_AGAIN}")
            return cls(folder, record, np.memmap(folder / "tokens.bin", dtype, "r", shape=(n, context)))
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise NotFound(f"corpus {str(folder)!r} has no {missing}; {_AGAIN}") from None

    @property
    def has_digests(self) -> bool:
        return bool(self._digests)

    def check(self, first: int = 0, last: int | None = None, name: str = "tokens.bin") -> None:
        """Raise BadInput if a file differs from its digests between two bytes."""
        if not check_pieces(self.folder / name, self._digests.get(name, ()), first, last):
            raise BadInput(f"{str(self.folder / name)!r} is damaged: it does not match its digest; {_AGAIN}")

    @property
    def block_rows(self) -> int:
        """Sequences in a block: :data:`BLOCK_TOKENS` tokens, at least one sequence."""
        return max(1, BLOCK_TOKENS // self.context)

    @property
    def n_blocks(self) -> int:
        return -(-self.n_sequences // self.block_rows)

    @functools.cached_property
    def _by_block(self) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(_BLOCK_SEED)).permutation(self.n_sequences)

    @functools.cached_property
    def _rank(self) -> np.ndarray:
        rank = np.empty(self.n_sequences, dtype=np.int64)
        rank[self._by_block] = np.arange(self.n_sequences)
        return rank

    def block(self, number: int) -> np.ndarray:
        """Return the sequences of a block, int64 [block_rows] (fewer in the last), the same for every seed."""
        return self._by_block[number * self.block_rows : (number + 1) * self.block_rows]

    def place(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the block of each of sequences ``rows`` [n] and its place in it, both int64 [n]."""
        blocks, places = np.divmod(self._rank[rows], self.block_rows)
        return blocks, places

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """Return the order of an epoch (0, 1, …): a permutation of the N sequences, int64 [N]."""
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        turn = np.empty(self.n_blocks, dtype=np.int64)
        turn[rng.permutation(self.n_blocks)] = np.arange(self.n_blocks)
        group = turn[np.arange(self.n_sequences) // self.block_rows] // MIXED_BLOCKS
        return self._by_block[np.lexsort((rng.random(self.n_sequences), group))]

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Return the sequences ``index`` [n], int64 [n, T]."""
        row_bytes = self.context * self.tokens.itemsize
        ends = np.asarray(index)[:, None] * row_bytes + [0, row_bytes - 1]
        for piece in set(np.unique(ends // PIECE_BYTES).tolist()) - self._intact:
            self.check(piece * PIECE_BYTES, (piece + 1) * PIECE_BYTES)
            self._intact.add(piece)
        return self.tokens[index].astype(np.int64)

    @property
    def has_document_ends(self) -> bool:
        """Whether the ends of documents were recorded; in older corpora each end-of-text token is taken as one."""
        return "documents.bin" in self._digests

    @functools.cached_property
    def document_ends(self) -> np.ndarray:
        """The first token after each document, int64, ascending; the last is N·T, which may cut a document.

        Tokens count through the rows. An older corpus without end-of-text tokens is one document. Raises NotFound or
        BadInput if the recorded ends are missing or damaged.
        """
        if self.has_document_ends:
            path = self.folder / "documents.bin"
            if not path.is_file():
                raise NotFound(f"corpus {str(self.folder)!r} has no documents.bin; {_AGAIN}")
            self.check(name=path.name)
            ends = np.fromfile(path, "<i8")
        elif self._separator is None:
            ends = np.empty(0, np.int64)
        else:
            flat = self.tokens.reshape(-1)
            pieces = (
                np.flatnonzero(flat[start : start + _SCAN_TOKENS] == self._separator) + start + 1
                for start in range(0, len(flat), _SCAN_TOKENS)
            )
            ends = np.concatenate(list(pieces))
        return np.append(ends[: np.searchsorted(ends, self.n_tokens)], self.n_tokens)

    def is_special(self, tokens: np.ndarray) -> np.ndarray:
        """Return which of ``tokens`` are special tokens: bool of the same shape."""
        return np.isin(tokens, self.special_ids)

    @functools.cached_property
    def _decoder(self) -> Any:
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise NotFound(f"corpus {str(self.folder)!r} has no tokenizer.json, so its tokens cannot be decoded")
        self.check(name=path.name)
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers has no class for it
            raise BadInput(f"{str(path)!r} is damaged ({error}); {_AGAIN}") from None

    @functools.cached_property
    def _decodes_apart(self) -> bool:
        """Whether each token decodes to the same bytes in any context."""
        decoder: dict[str, Any] | None = json.loads(self._decoder.to_str())["decoder"]
        return decoder is not None and decoder["type"] == "ByteLevel"

    def _piece_of(self, token: int) -> str | None:
        """Return the text of a token; ``None`` if it depends on the context."""
        if not self._decodes_apart:
            return None
        text: str = self._decoder.decode([token], skip_special_tokens=False)
        return None if "\ufffd" in text else text

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Return the text of each of ``tokens`` [n]; joined, they are the text of the whole.

        A character of several tokens belongs to the last of them; incomplete characters at either end are U+FFFD.
        """
        from tokenizers.decoders import DecodeStream

        ids = tokens.tolist()
        known = [self._piece(i) for i in ids]
        if None not in known:
            return [piece or "" for piece in known]
        stream = DecodeStream(skip_special_tokens=False)
        steps: list[str | None] = []
        for i in ids:
            try:
                steps.append(stream.step(self._decoder, i))
            except Exception:  # invalid bytes: the decoder must restart
                stream = DecodeStream(skip_special_tokens=False)
                steps.append("\ufffd" + (stream.step(self._decoder, i) or ""))
        pieces = [step or "" for step in steps]
        if steps and steps[-1] is None:  # the last tokens need more bytes, or have no text
            whole, joined = self._decoder.decode(ids, skip_special_tokens=False), "".join(pieces)
            pieces[-1] = whole[len(joined) :] if whole.startswith(joined) else "\ufffd"
        return pieces
