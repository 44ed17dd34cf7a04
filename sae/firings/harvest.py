"""Record which latent fires where, for all seeds of a study in one pass over the subject model.

The work is cut into shards of fixed size along the corpus order. A shard depends only on its place in the order and is
written to a temporary folder and renamed, so a resumed harvest gives the same files and a longer one adds shards.
:mod:`sae.firings.index` then merges them; ``store.json``, written last, marks the store as complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae.common.errors import BadInput, SettingsDiffer, UserError
from sae.common.files import SCHEMA, mapping_differences, report_full_disk
from sae.common.progress import say, track
from sae.common.ranks import ALONE
from sae.common.ranks import Job as RankJob
from sae.common.records import digest_pieces, read_record, write_record
from sae.firings.index import Source, describe_windows, merge
from sae.firings.store import (
    HARVEST_AGAIN,
    INDEX_FILES,
    SHARD_FILES,
    STORE_FILE,
    Array,
    FiringStore,
    Ints,
    Plan,
    ShardFacts,
    StoreRecord,
    create_array,
    map_array,
    read_store_record,
)

if TYPE_CHECKING:
    import torch

    from sae.activations.skipping import Skip
    from sae.activations.stream import ActivationStream
    from sae.dictionaries.sae import Sae
    from sae.text.corpus import Corpus

PLAN_FILE = "plan.json"
SORTED_FILES = ("sorted_offsets", "sorted_positions", "sorted_activations")  # of a shard, until the index is written
SHARD_BLOCKS = 16  # blocks (see Corpus.order) per shard; memory holds two shards, and a kill loses them
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # the positive range of float16


def harvest(
    stream: ActivationStream,
    saes: Mapping[str, Sae],
    folders: Mapping[str, Path],
    weights: Mapping[str, str],
    tokens: int,
    window: int,
    order_seed: int,
    ids: Mapping[str, str] | None = None,
    ranks: RankJob = ALONE,
) -> None:
    """Record the firings of ``saes`` over the first ``tokens`` tokens of the corpus order, in one pass.

    Skips runs whose store already holds that many tokens. Finished shards stay after an error.

    Args:
        saes: the dictionaries by run name; all of the stream's width.
        folders: each run's firing store.
        weights: the digest of each run's weights, for the record.
        tokens: rounded up to whole sequences; at most the corpus.
        window: tokens in a window; a remainder at the end of a sequence is not harvested.
        order_seed: the seed of the corpus order (epoch 0).
        ids: each run's id, for the record.
        ranks: the processes that share the shards; all call this function with the same arguments.
    Raises:
        SettingsDiffer: a finished store was harvested from something else.
        UserError: activations are not finite, or the disk is full.
    """
    corpus = stream.corpus
    if window < 1 or window > corpus.context:
        raise BadInput(f"window {window} does not fit in sequences of {corpus.context}; give 1 to {corpus.context}")
    per_sequence = corpus.context // window * window
    n_sequences = min(-(-tokens // per_sequence), corpus.n_sequences)
    if n_sequences * per_sequence > 2**32:
        raise BadInput(f"{tokens} tokens do not fit in a firing store; harvest at most {2**32}")
    order = corpus.order(0, order_seed)
    study = _provenance(stream, order, order_seed, window)
    per_shard = study["sequences_per_shard"]
    pieces = [Piece(start, min(start + per_shard, n_sequences)) for start in range(0, n_sequences, per_shard)]
    jobs = []
    for name, sae in saes.items():
        provenance = {**study, "num_latents": sae.num_latents, "weights": weights[name]}
        jobs.append(_Job(name, sae, folders[name], (ids or {}).get(name), provenance, pieces, stream.skip))
    label = f"harvest {' '.join(saes)}"
    begun = ranks.first(f"{label} begun", lambda: [job.name for job in jobs if job.begin()])
    pending = [job for job in jobs if job.name in begun]
    if not pending:
        return
    order = order[:n_sequences]
    # Rank 0 lists the missing shards before any rank adds one.
    lacking = ranks.first(f"{label} lacking", lambda: [[job.name for job in pending if job.lacks(p)] for p in pieces])
    missing = [(p, [job for job in pending if job.name in names]) for p, names in zip(pieces, lacking, strict=True)]
    missing = [(piece, jobs) for piece, jobs in missing if jobs]
    with report_full_disk(pending[0].folder):
        _encode_missing(stream, missing, order, window, ranks)
        ranks.barrier()
        for job in pending if ranks.rank == 0 else []:
            job.finish(corpus, order)
    ranks.barrier()


class Piece(NamedTuple):
    """A shard's place: ``start`` to ``stop`` in the corpus order."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.start:08d}-{self.stop:08d}"


class Coded(NamedTuple):
    """Firings of consecutive tokens: F latents and activations in token order, and B counts."""

    latents: Array
    activations: Array
    counts: Array
    n_clipped: int
    n_raised: int


class _Job:
    """The harvest of one run."""

    def __init__(
        self,
        name: str,
        sae: Sae,
        folder: Path,
        id_: str | None,
        provenance: dict[str, Any],
        pieces: list[Piece],
        skip: Skip,
    ) -> None:
        self.name, self.sae, self.folder, self.id = name, sae, folder, id_
        self.provenance, self.pieces, self.skip = provenance, pieces, skip
        self.shards = folder / "shards"
        self.kept: StoreRecord | None = None  # the record of a finished, smaller store that this harvest extends

    def begin(self) -> bool:
        """Check the files on disk; return whether work is left."""
        if (self.folder / STORE_FILE).is_file():
            store = read_store_record(self.folder)
            differences = mapping_differences(store["provenance"], self.provenance)
            if differences:
                raise SettingsDiffer(
                    f"the firings of run {self.name!r} have other settings ({'; '.join(differences)}); "
                    f"harvest with the same settings, or delete {str(self.folder)!r} first"
                )
            if store["n_sequences"] >= self.pieces[-1].stop:
                self._tidy(store)
                return False
            self.kept = store
        plan = {"schema": SCHEMA, "provenance": self.provenance}
        path = self.folder / PLAN_FILE
        begun: Plan | None = None
        with suppress(OSError, UserError):
            begun = read_record(path, Plan, "")
        if self.kept is None and self.shards.is_dir() and begun != plan:
            say(f"harvest {self.name}: discarding an unfinished harvest with other settings")
            shutil.rmtree(self.folder)
        write_record(path, plan)
        self.shards.mkdir(exist_ok=True)
        return True

    def lacks(self, piece: Piece) -> bool:
        return not (self.shards / piece.name).is_dir()

    def finish(self, corpus: Corpus, order: Ints) -> None:
        """Merge the shards into the by-latent index and mark the store as complete."""
        if self.kept is not None:
            FiringStore(self.folder, self.kept).check()
        index = f"index-{len(order):08d}"
        window = self.provenance["window"]
        n_windows = len(order) * (self.provenance["context"] // window)
        with _atomic_folder(self.folder / index) as temporary:
            n_firings = merge(temporary, self._sources(), self.sae.num_latents, f"index {self.name} by latent")
            n_special = describe_windows(temporary, corpus, order, window, self.skip.by_token)
        places = [self.shards / piece.name / "facts.json" for piece in self.pieces]
        facts = [read_record(path, ShardFacts, HARVEST_AGAIN) for path in places]
        shards = [
            {"name": piece.name, "n_sequences": piece.stop - piece.start}
            | {key: fact[key] for key in ("n_firings", "n_skipped", "digests") if key in fact}
            for piece, fact in zip(self.pieces, facts, strict=True)
        ]
        corpus_path = os.path.relpath(corpus.folder.resolve(), self.folder.resolve())
        store = {
            "provenance": self.provenance,
            "run": self.id,
            "n_sequences": len(order),
            "n_windows": n_windows,
            "n_tokens": n_windows * window,
            "n_special_tokens": n_special,
            **({"n_skipped_tokens": sum(fact.get("n_skipped", 0) for fact in facts)} if self.skip else {}),
            "n_firings": n_firings,
            "n_clipped": sum(fact.get("n_clipped", 0) for fact in facts),
            "n_raised": sum(fact.get("n_raised", 0) for fact in facts),
            "index": index,
            "corpus_path": Path(corpus_path).as_posix(),
            "shards": shards,
            "digests": {name: digest_pieces(self.folder / index / f"{name}.npy") for name in INDEX_FILES},
        }
        write_record(self.folder / STORE_FILE, store)
        self._tidy(read_store_record(self.folder))

    def _sources(self) -> list[Source]:
        """Return the index of the store that this harvest extends, and the shards that it does not hold."""

        def open_source(folder: Path, names: Sequence[str], base: int, limit: int | None = None) -> Source:
            offsets, positions, activations = (map_array(folder / f"{name}.npy") for name in names)
            return Source(offsets, positions, activations, base, limit)

        per_sequence = self.provenance["context"] // self.provenance["window"] * self.provenance["window"]
        named = {shard["name"] for shard in self.kept["shards"]} if self.kept else set()
        inherited = [piece for piece in self.pieces if piece.name in named]
        sources = []
        if self.kept and inherited:
            limit = inherited[-1].stop * per_sequence
            sources.append(open_source(self.folder / self.kept["index"], INDEX_FILES[:3], 0, limit))
        new = [piece for piece in self.pieces if piece.name not in named]
        return sources + [open_source(self.shards / p.name, SORTED_FILES, p.start * per_sequence) for p in new]

    def _tidy(self, store: StoreRecord) -> None:
        """Delete the files that a finished store does not need, also those left by a kill."""
        (self.folder / PLAN_FILE).unlink(missing_ok=True)
        current = {shard["name"] for shard in store["shards"]}
        for folder in self.shards.iterdir():
            if folder.name not in current:
                shutil.rmtree(folder)
                continue
            for kind in SORTED_FILES:
                (folder / f"{kind}.npy").unlink(missing_ok=True)
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink()
        for folder in self.folder.glob("*index-*"):
            if folder.name != store["index"]:
                shutil.rmtree(folder)


def _encode_missing(
    stream: ActivationStream, missing: list[tuple[Piece, list[_Job]]], order: Ints, window: int, ranks: RankJob
) -> None:
    corpus = stream.corpus
    used = corpus.context // window * window
    left = sum(piece.stop - piece.start for piece, _ in missing) * used
    done = len(order) * used - left
    names = " ".join(dict.fromkeys(job.name for _, lacking in missing for job in lacking))
    progress = track(f"harvest {names}", len(order) * used, "tokens", done=done)
    with progress as bar, ThreadPoolExecutor(1, thread_name_prefix="shards") as writer:
        written = writer.submit(lambda: None)
        for turn, (piece, lacking) in enumerate(missing):
            if turn % ranks.size != ranks.rank:
                bar.advance((piece.stop - piece.start) * used)  # another rank does it at about the same time
                continue
            shards: dict[_Job, list[Coded]] = {job: [] for job in lacking}
            n_skipped = 0
            for start in range(piece.start, piece.stop, corpus.block_rows):
                rows = order[start : min(start + corpus.block_rows, piece.stop)]
                values = stream.rows(rows)
                kept = stream.find_kept(rows, values)[:, :used]
                n_skipped += int((~kept).sum()) - int(corpus.is_special(corpus.rows(rows)[:, :used]).sum())
                activations, kept = values[:, :used].flatten(0, 1), kept.flatten()
                if stream.skip:
                    activations[~kept] = 0  # an outlier must not reach the arithmetic of the others
                for job, coded in shards.items():
                    coded += _encode(job.name, job.sae, activations, kept.cpu().numpy())
                bar.advance(len(rows) * used)
            written.result()  # one shard at a time is written; an error ends the harvest
            written = writer.submit(_write_shards, piece.name, shards, window, n_skipped)
        written.result()


def _encode(name: str, sae: Sae, activations: torch.Tensor, kept: Array) -> list[Coded]:
    """Encode ``activations`` [B, D]; keep the firings at tokens where ``kept`` [B] is true."""
    from sae.dictionaries.entries import tokens_at_once

    _check_products(name, sae, activations)
    n = tokens_at_once(sae.num_latents)
    starts = range(0, len(activations), n)
    return [_encode_part(name, sae, activations[i : i + n], kept[i : i + n]) for i in starts]


def _check_products(name: str, sae: Sae, activations: torch.Tensor) -> None:
    """Raise BadInput if a pre-activation of ``activations`` [B, D] could overflow float32: NaN seems not to fire."""
    import torch

    token = float(activations.double().norm(dim=1).max()) + float(sae.b_dec.double().norm())
    row = float(sae.W_enc.norm(dim=1, dtype=torch.float64).max())
    if not token * row + float(sae.b_enc.abs().max()) < torch.finfo(torch.float32).max:
        raise BadInput(
            f"harvest: the SAE of run {name!r} overflows float32 on these activations (norms: encoder rows up to "
            f"{row:.3g}, tokens up to {token:.3g}); give the model and hookpoint that it was trained on"
        )


def _encode_part(name: str, sae: Sae, activations: torch.Tensor, kept: Array) -> Coded:
    """Encode so few tokens that M slots for each fit in memory, since one may fire nearly all latents."""
    import torch

    latent_type, count_type = choose_index_types(sae.num_latents)
    with torch.inference_mode():
        strengths, indices = sae.encode_fast(activations)
    values, latents = strengths.float().cpu().numpy(), indices.cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(f"harvest: the SAE of run {name!r} gives NaN or infinite activations; use another SAE")
    fires = (values > 0) & kept[:, None]
    strong = values[fires]
    # Clip to the range of float16, so that weak firings stay firings and strong ones finite.
    return Coded(
        latents=latents[fires].astype(latent_type),
        activations=np.clip(strong, _SMALLEST, _LARGEST).astype(np.float16),
        counts=fires.sum(1, dtype=count_type),
        n_clipped=int((strong > _LARGEST).sum()),
        n_raised=int((strong < _SMALLEST).sum()),
    )


def choose_index_types(num_latents: int) -> tuple[type[np.unsignedinteger[Any]], type[np.unsignedinteger[Any]]]:
    """Return the narrowest types for a latent's index and for the number of latents that fire at a token."""
    return np.uint16 if num_latents <= 2**16 else np.uint32, np.uint16 if num_latents < 2**16 else np.uint32


def _provenance(stream: ActivationStream, order: Ints, order_seed: int, window: int) -> dict[str, Any]:
    """Return the inputs of the firings that all runs of the study share."""
    corpus = stream.corpus
    return {
        "corpus": corpus.key,
        "corpus_fingerprint": corpus.fingerprint,
        "subject": stream.subject.fingerprint,
        "dtype": str(stream.subject.dtype).removeprefix("torch."),
        "hookpoint": stream.hookpoint,
        "order_seed": order_seed,
        # The order too: a seed's generator may change between versions of NumPy.
        "order": hashlib.sha256(np.ascontiguousarray(order, dtype="<i8").data).hexdigest(),
        "context": corpus.context,
        "window": window,
        "sequences_per_shard": SHARD_BLOCKS * corpus.block_rows,
        **stream.skip.record(),
    }


def _write_shards(piece: str, shards: Mapping[_Job, list[Coded]], window: int, n_skipped: int) -> None:
    for job, coded in shards.items():
        with _atomic_folder(job.shards / piece) as temporary:
            _write_shard(temporary, coded, job.sae.num_latents, window, {"n_skipped": n_skipped} if job.skip else {})


def _write_shard(
    folder: Path, coded: Sequence[Coded], num_latents: int, window: int, more_facts: Mapping[str, int]
) -> None:
    latents, activations, counts = (np.concatenate([part[i] for part in coded]) for i in range(3))
    window_counts = counts.reshape(-1, window).sum(1, dtype=np.int64)
    token = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    by_latent = np.argsort(latents, kind="stable")  # stable: tokens stay ascending within a latent
    arrays = {
        "latents": latents,
        "counts": counts,
        "window_offsets": _offsets(window_counts).astype(np.uint32),
        "sorted_offsets": _offsets(np.bincount(latents, minlength=num_latents)),
        "sorted_positions": token[by_latent],
        "sorted_activations": activations[by_latent],
    }
    for name, array in arrays.items():
        create_array(folder / f"{name}.npy", array.dtype, array.shape)[:] = array
    facts = {name: sum(getattr(part, name) for part in coded) for name in ("n_clipped", "n_raised")}
    digests = {name: digest_pieces(folder / f"{name}.npy") for name in SHARD_FILES}
    write_record(folder / "facts.json", {"n_firings": len(latents), **facts, **more_facts, "digests": digests})


def _offsets(counts: Array) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


@contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; sync its files and rename it to ``path`` if the block ends without an error."""
    temporary = path.with_name(f".tmp-{path.name}")
    for leftover in (temporary, path):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
