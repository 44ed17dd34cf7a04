"""Recording which latent fires where, for every seed of a study in one pass over the subject model.

The forward pass is what a harvest costs, so each piece of activations goes through every SAE that still
lacks it. Work is cut into shards of fixed size along the corpus order. A shard is encoded, written beside
its final place and renamed, so after a kill at any instant the shards on disk are whole, and because what
a shard holds depends on nothing but its place in the order, they are exactly those of an undisturbed
harvest. Harvesting more tokens later adds shards to the same order.

Shards are sorted by latent as they are written; :mod:`sae.firings.index` merges them into the by-latent
index. ``store.json`` comes last and makes the store complete (see :mod:`sae.firings.store` for the files).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae.common.errors import BadInput, SettingsDiffer, UserError
from sae.common.files import mapping_differences, read_json, write_json
from sae.common.progress import say, track
from sae.common.ranks import ALONE
from sae.common.ranks import Job as RankJob
from sae.firings.index import SORTED_FILES, Piece, build_index
from sae.firings.shards import Coded, Shard, ShardWriter, atomic_folder
from sae.firings.store import SCHEMA, STORE_FILE, Array, Ints, read_record

if TYPE_CHECKING:
    import torch

    from sae.activations.stream import ActivationStream
    from sae.dictionaries.sae import Sae
    from sae.text.corpus import Corpus

PLAN_FILE = "plan.json"
SHARD_BLOCKS = 16  # blocks (see Corpus.order) in a shard: two of them a kill costs, and are held in memory
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # the positive range of float16


def harvest(
    stream: ActivationStream,
    saes: Mapping[str, Sae],
    folders: Mapping[str, Path],
    tokens: int,
    window: int,
    order_seed: int,
    weights: Mapping[str, str] | None = None,
    ranks: RankJob = ALONE,
) -> None:
    """Record the firings of ``saes`` over the first ``tokens`` tokens of the corpus order, in one pass.

    Args:
        stream: activations of the subject model on the corpus.
        saes: the dictionaries by run name; all of the stream's width.
        folders: each run's firing store.
        tokens: how many tokens, rounded up to whole sequences; at most the corpus.
        window: tokens in a window; what is left over at the end of a sequence is not harvested.
        order_seed: the seed of the corpus order (epoch 0).
        weights: each run's weights digest, recorded as provenance; computed here where it is not given.
        ranks: the processes that harvest together, each some of the shards; all call this with the same arguments.

    Runs whose store already holds as many tokens take no part. Raises :class:`SettingsDiffer` where a
    finished store was harvested from something else, and a one-line :class:`UserError` for activations
    that are not finite and for a full disk: what was finished by then stays.
    """
    corpus = stream.corpus
    if window < 1 or window > corpus.context:
        raise BadInput(f"window {window} does not fit in sequences of {corpus.context} tokens; choose 1 to that")
    per_sequence = corpus.context // window * window
    n_sequences = min(-(-tokens // per_sequence), corpus.n_sequences)
    if n_sequences * per_sequence > 2**32:
        raise BadInput(f"{tokens} tokens are more than one firing store can hold; harvest at most {2**32}")
    order = corpus.order(0, order_seed)
    study = _provenance(stream, order, order_seed, window)
    pieces = _pieces(n_sequences, study["sequences_per_shard"])
    jobs = []
    for name, sae in saes.items():
        digest = (weights or {}).get(name) or digest_weights(sae)
        job = _Job(name, sae, folders[name], {**study, "num_latents": sae.num_latents, "weights": digest}, pieces)
        jobs.append(job)
    label = f"harvest {' '.join(saes)}"
    begun = ranks.first(f"{label} begun", lambda: [job.name for job in jobs if job.begin()])
    pending = [job for job in jobs if job.name in begun]
    if not pending:
        return
    order = order[:n_sequences]
    # Rank 0 looks at what is there before any rank adds to it.
    lacking = ranks.first(f"{label} lacking", lambda: [[job.name for job in pending if job.lacks(p)] for p in pieces])
    missing = [(p, [job for job in pending if job.name in names]) for p, names in zip(pieces, lacking, strict=True)]
    missing = [(piece, jobs) for piece, jobs in missing if jobs]
    with _disk_full_is_told(pending[0].folder):
        _encode_missing(stream, missing, order, window, ranks)
        ranks.barrier()
        for job in pending if ranks.rank == 0 else []:
            job.finish(corpus, order)
    ranks.barrier()


def digest_weights(sae: Sae) -> str:
    """SHA-256 over architecture, k and every weight of ``sae``. 64 hex characters."""
    state = hashlib.sha256(f"{sae.architecture} {getattr(sae, 'k', '')}".encode())
    for tensor in sae.weights().values():
        state.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return state.hexdigest()


class _Job:
    """One run's harvest: what is on disk, what is missing, and how it becomes a store."""

    def __init__(self, name: str, sae: Sae, folder: Path, provenance: dict[str, Any], pieces: list[Piece]) -> None:
        self.name, self.sae, self.folder, self.provenance, self.pieces = name, sae, folder, provenance, pieces
        self.shards = folder / "shards"
        self.kept: dict[str, Any] | None = None  # the finished, smaller store that this harvest grows

    def begin(self) -> bool:
        """Take up what is there. Returns whether there is anything left to do."""
        if (self.folder / STORE_FILE).is_file():
            store = read_record(self.folder / STORE_FILE)
            differences = mapping_differences(store["provenance"], self.provenance)
            if differences:
                raise SettingsDiffer(
                    f"firings of run {self.name!r} were harvested otherwise ({'; '.join(differences)}); "
                    f"harvest with the same settings, or remove {str(self.folder)!r} first"
                )
            if store["n_sequences"] >= self.pieces[-1].stop:
                self._tidy(store)
                return False
            self.kept = store
        plan = {"schema": SCHEMA, "provenance": self.provenance}
        path = self.folder / PLAN_FILE
        if self.kept is None and self.shards.is_dir() and not _same_plan(path, plan):
            say(f"harvest {self.name}: an unfinished harvest with other settings is discarded")
            shutil.rmtree(self.folder)
        write_json(path, plan)
        self.shards.mkdir(exist_ok=True)
        return True

    def lacks(self, piece: Piece) -> bool:
        return not (self.shards / piece.name).is_dir()

    def finish(self, corpus: Corpus, order: Ints) -> None:
        """Merge the shards into the by-latent index and declare the store complete."""
        index = f"index-{len(order):08d}"
        with atomic_folder(self.folder / index) as temporary:
            label = f"index {self.name} by latent"
            totals = build_index(temporary, self.folder, self.provenance, self.kept, self.pieces, corpus, order, label)
        facts = [self._facts(piece) for piece in self.pieces]
        shards = [
            {"name": piece.name, "n_sequences": piece.stop - piece.start, "n_firings": fact["n_firings"]}
            for piece, fact in zip(self.pieces, facts, strict=True)
        ]
        corpus_path = os.path.relpath(corpus.folder.resolve(), self.folder.resolve())
        store = {
            "schema": SCHEMA,
            "provenance": self.provenance,
            "n_sequences": len(order),
            **totals,
            "n_clipped": sum(fact["n_clipped"] for fact in facts),
            "n_raised": sum(fact["n_raised"] for fact in facts),
            "index": index,
            "corpus_path": Path(corpus_path).as_posix(),
            "shards": shards,
        }
        write_json(self.folder / STORE_FILE, store)
        self._tidy(store)

    def _facts(self, piece: Piece) -> dict[str, int]:
        return read_json(self.shards / piece.name / "facts.json")

    def _tidy(self, store: dict[str, Any]) -> None:
        """Remove what a finished store does not need; also what a kill left behind after the last line."""
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
    """Encode and write this rank's part of the shards that some runs lack."""
    corpus = stream.corpus
    used = corpus.context // window * window
    left = sum(piece.stop - piece.start for piece, _ in missing) * used
    done = len(order) * used - left
    names = dict.fromkeys(job.name for _, lacking in missing for job in lacking)
    bar_of = track(f"harvest {' '.join(names)}", len(order) * used, "tokens", done=done)
    with bar_of as bar, ShardWriter(window) as writer:
        for turn, (piece, lacking) in enumerate(missing):
            if turn % ranks.size != ranks.rank:
                # About now another rank is done with it.
                bar.advance((piece.stop - piece.start) * used)
                continue
            parts: list[list[Coded]] = [[] for _ in lacking]
            for start in range(piece.start, piece.stop, corpus.block_rows):
                rows = order[start : min(start + corpus.block_rows, piece.stop)]
                activations = stream.rows(rows)[:, :used].flatten(0, 1)
                ordinary = ~corpus.is_special(corpus.rows(rows)[:, :used]).ravel()
                for job, coded in zip(lacking, parts, strict=True):
                    coded.append(_encode(job.name, job.sae, activations, ordinary))
                bar.advance(len(rows) * used)
            shards = [
                Shard(job.shards / piece.name, coded, job.sae.num_latents)
                for job, coded in zip(lacking, parts, strict=True)
            ]
            writer.hand_over(shards)


def _encode(name: str, sae: Sae, activations: torch.Tensor, ordinary: Array) -> Coded:
    """Firings of ``activations`` [B, D] at the tokens where ``ordinary`` [B] holds."""
    from sae.dictionaries.entries import tokens_at_once

    _check_products(name, sae, activations)
    n = tokens_at_once(sae.num_latents)
    parts = [_encode_part(name, sae, *of) for of in zip(activations.split(n), _split(ordinary, n), strict=True)]
    latents, strengths, counts = (np.concatenate([part[i] for part in parts]) for i in range(3))
    clipped, raised = (sum(getattr(part, field) for part in parts) for field in ("n_clipped", "n_raised"))
    return Coded(latents, strengths, counts, clipped, raised)


def _check_products(name: str, sae: Sae, activations: torch.Tensor) -> None:
    """Raise BadInput where a pre-activation of ``activations`` [B, D], or a part of its sum, could overflow float32.

    A sum that overflows in both directions is NaN, and a latent whose pre-activation is NaN would seem not to fire.
    """
    import torch

    token = float(activations.double().norm(dim=1).max()) + float(sae.b_dec.double().norm())
    row = float(sae.W_enc.norm(dim=1, dtype=torch.float64).max())
    if not token * row + float(sae.b_enc.abs().max()) < torch.finfo(torch.float32).max:
        raise BadInput(
            f"harvest: the SAE of run {name!r} overflows float32 on these activations (encoder rows as long as "
            f"{row:.3g}, tokens as long as {token:.3g}); give the model and hookpoint that it was trained on"
        )


def _split(values: Array, n: int) -> list[Array]:
    return [values[start : start + n] for start in range(0, len(values), n)]


def _encode_part(name: str, sae: Sae, activations: torch.Tensor, ordinary: Array) -> Coded:
    """:func:`_encode` of so few tokens that M slots for each do no harm: one may fire for nearly all latents."""
    import torch

    latent_type, count_type = choose_index_types(sae.num_latents)
    with torch.inference_mode():
        strengths, indices = sae.encode_fast(activations)
    values, latents = strengths.float().cpu().numpy(), indices.cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(
            f"harvest: the SAE of run {name!r} gives activations that are not finite; train or import another"
        )
    fires = (values > 0) & ordinary[:, None]
    kept = values[fires]
    # A firing too weak for float16 stays a firing, and one too strong stays finite; both are counted.
    return Coded(
        latents=latents[fires].astype(latent_type),
        activations=np.clip(kept, _SMALLEST, _LARGEST).astype(np.float16),
        counts=fires.sum(1, dtype=count_type),
        n_clipped=int((kept > _LARGEST).sum()),
        n_raised=int((kept < _SMALLEST).sum()),
    )


def choose_index_types(num_latents: int) -> tuple[type[np.unsignedinteger[Any]], type[np.unsignedinteger[Any]]]:
    """The narrowest types for a latent's number and for how many latents fire at one token."""
    return np.uint16 if num_latents <= 2**16 else np.uint32, np.uint16 if num_latents < 2**16 else np.uint32


def _pieces(n_sequences: int, per_shard: int) -> list[Piece]:
    return [Piece(start, min(start + per_shard, n_sequences)) for start in range(0, n_sequences, per_shard)]


def _provenance(stream: ActivationStream, order: Ints, order_seed: int, window: int) -> dict[str, Any]:
    """What the firings of every run of the study depend on."""
    corpus = stream.corpus
    return {
        "corpus": corpus.key,
        "corpus_fingerprint": corpus.fingerprint,
        "subject": stream.subject.fingerprint,
        "dtype": str(stream.subject.dtype).removeprefix("torch."),
        "hookpoint": stream.hookpoint,
        "order_seed": order_seed,
        # The order itself too: a seed's generator may change between versions of NumPy.
        "order": hashlib.sha256(np.ascontiguousarray(order, dtype="<i8").data).hexdigest(),
        "context": corpus.context,
        "window": window,
        "sequences_per_shard": SHARD_BLOCKS * corpus.block_rows,
    }


def _same_plan(path: Path, plan: dict[str, Any]) -> bool:
    try:
        return read_record(path) == plan
    except (OSError, UserError):
        return False


@contextmanager
def _disk_full_is_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"harvest: no space left for {str(folder)!r}; free some and run the same command, finished shards are kept"
        ) from None
