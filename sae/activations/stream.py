"""Read activations as a stream: computed once, for all hookpoints together.

The sums of a forward pass may differ in the last bit with the shape of a batch. So a sequence is always computed with
the others of its block (see :mod:`sae.text.corpus`): training, harvest and a resumed run see the same bits. A block
that any hookpoint lacks is computed for all of them, and kept on disk (:mod:`sae.activations.cache`) or, without space,
a few blocks at a time in memory, which is enough for reading in order.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from sae.activations.cache import ActivationCache
from sae.activations.skipping import MEDIAN_BLOCKS, Skip, compute_norms
from sae.activations.subject import Subject
from sae.common.errors import BadInput, NotFinite, UserError
from sae.common.files import digest
from sae.common.ranks import Job
from sae.text.corpus import MIXED_BLOCKS, Corpus

Streams = Sequence["ActivationStream"]
BlockSource = Callable[[Streams, int], Mapping[str, torch.Tensor]]


class ActivationStream:
    """The activations of one hookpoint over a corpus, by sequence.

    Attributes:
        hookpoint: the resolved name (see :meth:`Subject.resolve`).
        others: streams of other hookpoints of the same subject and corpus, whose caches are filled on the way.
        skip: the tokens that dictionaries do not see (:meth:`find_kept`); :meth:`rows` returns them all the same.
    """

    def __init__(self, subject: Subject, corpus: Corpus, hookpoint: str, cache: ActivationCache | None = None) -> None:
        self.subject = subject
        self.corpus = corpus
        self.hookpoint = subject.resolve(hookpoint)
        self.cache = cache
        self.width = subject.width(self.hookpoint)
        self.context = corpus.context
        self.device = subject.device
        self.others: list[ActivationStream] = []
        self.skip = Skip()
        subject.check_context(corpus.context)
        # Without a cache on disk, holds one group of an order (see Corpus.order).
        self._held: OrderedDict[int, torch.Tensor] = OrderedDict()

    def rows(self, index: np.ndarray) -> torch.Tensor:
        """Return the activations of sequences ``index`` [n]: [n, T, D] in the subject's precision on its device.

        Reading along :meth:`Corpus.order` computes each block once. Raises NotFinite for NaN or infinity.
        """
        return read_rows([self], index)[0]

    def find_kept(self, index: np.ndarray, values: torch.Tensor) -> torch.Tensor:
        """Return which tokens of :meth:`rows` (``values`` [n, T, D]) dictionaries see: bool [n, T], on their device.

        Special tokens are never among them.
        """
        kept = torch.from_numpy(self.find_kept_by_token(index)).to(values.device)
        return kept & ~self.skip.by_norm(values)

    def find_kept_by_token(self, index: np.ndarray) -> np.ndarray:
        """Return :meth:`find_kept` without the limit on norms, which needs no activations: bool [n, T]."""
        tokens = self.corpus.rows(index)
        return ~(self.corpus.is_special(tokens) | self.skip.by_token(tokens))

    def measure_median_norm(self) -> float:
        """Return the median norm of the kept tokens of the corpus's first blocks, which are a fixed random draw."""
        norms = []
        for number in range(min(MEDIAN_BLOCKS, self.corpus.n_blocks)):
            index = self.corpus.block(number)
            values = self.rows(index)
            norms.append(compute_norms(values)[self.find_kept(index, values)])
        found = torch.cat(norms)
        if not len(found):
            raise BadInput("--skip-positions and --exclude-tokens skip all of the text; skip fewer tokens")
        return float(found.median())

    def keep(self, number: int, values: torch.Tensor) -> None:
        """Keep a block's activations on disk or, if they do not fit, in memory."""
        if self.cache is None or not self.cache.put(number * self.corpus.block_rows, values):
            self._held[number] = values

    def _slots(self, blocks: np.ndarray, places: np.ndarray) -> np.ndarray:
        return blocks * self.corpus.block_rows + places

    def _stored(self, blocks: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return which sequences are on disk: bool [n]."""
        if self.cache is None:
            return np.zeros(len(blocks), dtype=bool)
        return self.cache.has(self._slots(blocks, places))

    def _read(self, out: torch.Tensor, blocks: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Copy the sequences on disk into ``out`` [n, T, D]; return which are still missing, bool [n]."""
        stored = self._stored(blocks, places)
        if self.cache is not None and stored.any():
            values, whole = self.cache.get(self._slots(blocks[stored], places[stored]))
            _assign(out, stored, values.to(self.device))
            stored[stored] = whole
        return ~stored

    def _would_keep(self, number: int) -> bool:
        """Return whether the cache lacks a block that fits."""
        if self.cache is None:
            return False
        slots = number * self.corpus.block_rows + np.arange(len(self.corpus.block(number)))
        return self.cache.takes(slots) and not self.cache.has(slots).all()


def open_streams(
    subject: Subject, corpus: Corpus, hookpoints: Sequence[str], caches: Mapping[str, ActivationCache]
) -> dict[str, ActivationStream]:
    """Open one stream per hookpoint, by its resolved name; each fills the others' caches too."""
    names = dict.fromkeys(subject.resolve(hookpoint) for hookpoint in hookpoints)
    streams = {name: ActivationStream(subject, corpus, name, caches.get(name)) for name in names}
    for stream in streams.values():
        stream.others = [other for other in streams.values() if other is not stream]
    return streams


def read_rows(streams: Streams, index: np.ndarray, source: BlockSource | None = None) -> list[torch.Tensor]:
    """Return the activations of sequences ``index`` [n] for each of ``streams``, in one pass: [n, T, D] each.

    ``source`` computes missing blocks (default :func:`compute_block`), so that processes can share the work.
    """
    corpus = streams[0].corpus
    index = np.asarray(index, dtype=np.int64)
    blocks, places = corpus.place(index)
    outs, wanted = [], []
    for stream in streams:
        shape = (len(index), stream.context, stream.width)
        outs.append(torch.empty(shape, dtype=stream.subject.dtype, device=stream.device))
        wanted.append(stream._read(outs[-1], blocks, places))
    for block in _in_turn(blocks, wanted, streams):
        asking = [i for i in range(len(streams)) if (wanted[i] & (blocks == block)).any()]
        held = {i: streams[i]._held.pop(block) for i in asking if block in streams[i]._held}
        lacking = [streams[i] for i in asking if i not in held]
        computed = _compute_and_keep(lacking, block, source or compute_block) if lacking else {}
        for i in asking:
            values = held[i] if i in held else computed[streams[i].hookpoint]
            if i in held:
                streams[i]._held[block] = values  # now the most recently used
            mine = wanted[i] & (blocks == block)
            _assign(outs[i], mine, values[torch.from_numpy(places[mine]).to(values.device)])
            while len(streams[i]._held) > MIXED_BLOCKS:
                streams[i]._held.popitem(last=False)
    return outs


def find_missing_blocks(streams: Streams, index: np.ndarray) -> list[int]:
    """Return the blocks that :func:`read_rows` would compute, in its order, apart from damaged ones on disk."""
    blocks, places = streams[0].corpus.place(np.asarray(index, dtype=np.int64))
    wanted = [~stream._stored(blocks, places) for stream in streams]
    return [
        block
        for block in _in_turn(blocks, wanted, streams)
        if any(block in blocks[w] and block not in s._held for s, w in zip(streams, wanted, strict=True))
    ]


def _in_turn(blocks: np.ndarray, wanted: Sequence[np.ndarray], streams: Streams) -> list[int]:
    """Return the ``blocks`` [n] that any stream wants, each once: those in memory first, then by last use."""
    last_use = {int(b): i for i, b in enumerate(blocks)}
    asked = {int(b) for b in blocks[np.any(wanted, axis=0)]}
    return sorted(asked, key=lambda b: (not any(b in s._held for s in streams), last_use[b]))


def _compute_and_keep(streams: Streams, number: int, source: BlockSource) -> Mapping[str, torch.Tensor]:
    """Compute a block in one forward pass for ``streams`` and for other streams whose caches lack it."""
    known = list(streams)
    known += [other for other in streams[0].others if other not in streams and other._would_keep(number)]
    values = source(known, number)
    for stream in known:
        if stream.hookpoint in values:
            stream.keep(number, values[stream.hookpoint])
    return values


def compute_block(streams: Streams, number: int) -> dict[str, torch.Tensor]:
    """Compute a block in one forward pass: {hookpoint: [n, T, D]}. Raises NotFinite for NaN or infinity."""
    subject, corpus = streams[0].subject, streams[0].corpus
    rows = corpus.block(number)
    found = subject.activations(corpus.rows(rows), [stream.hookpoint for stream in streams])
    for hookpoint, values in found.items():
        if torch.isfinite(values.sum(dtype=torch.float32)) or torch.isfinite(values).all():
            continue
        bad = rows[~torch.isfinite(values).flatten(1).all(dim=1).cpu().numpy()]
        kind = "NaN" if torch.isnan(values).any() else "infinity"
        cure = (
            "its weights are damaged: download them again"
            if subject.dtype == torch.float32
            else "use subject.dtype float32 (or bfloat16 in place of float16)"
        )
        raise NotFinite(
            f"model {subject.source!r} gives {kind} at {hookpoint} in block {number} of the corpus "
            f"(sequence {bad[0]} and {len(bad) - 1} more); {cure}"
        )
    return found


def _assign(out: torch.Tensor, mask: np.ndarray, values: torch.Tensor) -> None:
    out[torch.from_numpy(mask).to(out.device)] = values.to(out.dtype)


class TrainingBatches:
    """The training batches: ``len`` steps of [B, D] float32, each reproducible on its own.

    A step takes whole sequences in the order of their epoch, without special tokens and those with an excluded id or
    norm, so B is slightly less than ``tokens_per_step``; positions skipped in every sequence are made up for by more
    sequences. A longer training starts with the same steps. ``fingerprint`` is the SHA-256 of the sequences of all
    steps and of the tokens that are skipped: those that the stream ``masked_by`` skips, by default ``stream`` itself.
    What a transcoder predicts is masked by its input, so that the rows of both are the same tokens.
    """

    def __init__(
        self,
        stream: ActivationStream,
        tokens: int,
        batch_tokens: int,
        order_seed: int = 0,
        masked_by: ActivationStream | None = None,
    ) -> None:
        self.stream = stream
        self.masked_by = masked_by or stream
        self.order_seed = order_seed
        corpus = stream.corpus
        per_sequence = corpus.context - self.masked_by.skip.positions
        self.sequences_per_step = max(1, round(batch_tokens / per_sequence))
        self.tokens_per_step = self.sequences_per_step * per_sequence
        self._steps = max(1, -(-tokens // self.tokens_per_step))
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: corpus.order(epoch, order_seed))

    def __len__(self) -> int:
        return self._steps

    @functools.cached_property
    def fingerprint(self) -> str:
        corpus = self.stream.corpus
        last_epoch = (self._steps * self.sequences_per_step - 1) // corpus.n_sequences
        # The orders too: a seed's generator may change between versions of NumPy.
        orders = [digest(self._order(epoch).tolist()) for epoch in sorted({0, last_epoch})]
        made_from = [corpus.fingerprint, corpus.special_ids, self.order_seed, self.sequences_per_step, self._steps]
        return digest([*made_from, orders, *self.masked_by.skip.record().values()])

    def sequences(self, step: int) -> np.ndarray:
        """Return the sequences of a step, int64 [sequences_per_step]."""
        first = step * self.sequences_per_step
        epochs, places = np.divmod(np.arange(first, first + self.sequences_per_step), self.stream.corpus.n_sequences)
        taken = [self._order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(taken)

    def __getitem__(self, step: int) -> torch.Tensor:
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        return read_batches([self], step)[0]

    def describe(self, step: int, row: int | None = None) -> str:
        """Describe where a step's batch, or one row of it, comes from, for an error message."""
        corpus, index = self.stream.corpus, self.sequences(step)
        if row is not None and (places := self.places(step)) is not None:
            index = index[places[row : row + 1, 0]]
        blocks = [str(block) for block in np.unique(corpus.place(index)[0])]
        more = f" and {len(index) - 1} more" if len(index) > 1 else ""
        listed = ", ".join(blocks[:4]) + (f" and {len(blocks) - 4} more" if len(blocks) > 4 else "")
        return f"sequence {index[0]}{more} of the corpus, block{'s' * (len(blocks) > 1)} {listed}"

    def places(self, step: int) -> np.ndarray | None:
        """Return where the B rows of a step are: its sequence in the step, and the position there, int64 [B, 2].

        ``None`` under a limit on norms, which only the activations can tell.
        """
        if self.masked_by.skip.norm_limit is not None:
            return None
        return np.argwhere(self.masked_by.find_kept_by_token(self.sequences(step)))

    @property
    def hookpoint(self) -> str:
        return self.stream.hookpoint

    @property
    def sequence_source(self) -> tuple[object, ...]:
        """What decides which sequences each step takes."""
        return self.stream.corpus.fingerprint, self.stream.subject, self.sequences_per_step, self.order_seed

    @property
    def rows_source(self) -> tuple[str, str]:
        """What decides which rows of a step's sequences a batch has: the hookpoint, and the one of the mask."""
        return self.stream.hookpoint, self.masked_by.hookpoint


def get_streams(batches: Sequence[TrainingBatches]) -> list[ActivationStream]:
    """Return the streams of ``batches`` and of their masks, each once."""
    return list({stream.hookpoint: stream for b in batches for stream in (b.stream, b.masked_by)}.values())


def read_batches(
    batches: Sequence[TrainingBatches], step: int, source: BlockSource | None = None
) -> list[torch.Tensor]:
    """Return ``batches[i][step]`` for each i, from one forward pass; batches of one hookpoint and mask share it.

    All must share their steps. Raises NotFinite for NaN or infinity, UserError if all tokens of the step are special or
    skipped.
    """
    first = batches[0]
    if any(other.sequence_source != first.sequence_source for other in batches):
        raise ValueError("these batches do not take the same sequences")
    streams = get_streams(batches)
    index = first.sequences(step)
    try:
        rows = read_rows(streams, index, source)
    except NotFinite as error:
        raise NotFinite(f"step {step + 1} of the training: {error}") from None
    of_hookpoint = {stream.hookpoint: values for stream, values in zip(streams, rows, strict=True)}
    found: dict[tuple[str, str], torch.Tensor] = {}
    for b in batches:
        if b.rows_source in found:
            continue
        values, mask = of_hookpoint[b.stream.hookpoint], b.masked_by
        kept = mask.find_kept(index, of_hookpoint[mask.hookpoint])
        if not kept.any():
            what, also = ("special or skipped", " or skip fewer tokens") if mask.skip else ("special", "")
            raise UserError(f"step {step + 1} has {what} tokens only; use a corpus of text{also}")
        found[b.rows_source] = (values.flatten(0, 1) if kept.all() else values[kept]).float()
    return [found[b.rows_source] for b in batches]


class Reader:
    """Reads batches for a job, all of whose ranks must read the same batches of the same steps in the same order.

    Each rank computes some of the blocks that a step lacks; rank 0, which alone keeps the cache on disk, puts them
    together and sends the batch to all. Every rank sees the bits that one process would compute.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._n_given_out = 0

    def __call__(self, batches: Sequence[TrainingBatches], step: int) -> list[torch.Tensor]:
        """Return the step's batch of each, [B, D], as :func:`read_batches` does, on every rank."""
        job = self._job
        if job.size == 1:
            return read_batches(batches, step)
        streams = get_streams(batches)
        numbers = job.numbers(find_missing_blocks(streams, batches[0].sequences(step)) if job.rank == 0 else None)
        owners = {number: (self._n_given_out + i) % job.size for i, number in enumerate(numbers)}
        self._n_given_out += len(numbers)
        found: dict[tuple[str, str], torch.Tensor | None] = dict.fromkeys(b.rows_source for b in batches)
        if job.rank == 0:
            read = read_batches(batches, step, lambda wanted, number: self._block(streams, wanted, number, owners))
            if any(owners.values()):
                raise RuntimeError(f"step {step} did not take all of the blocks that the ranks computed for it")
            found |= {b.rows_source: x for b, x in zip(batches, read, strict=True)}
        else:
            for number in (n for n, owner in owners.items() if owner == job.rank):
                values = compute_block(streams, number)
                for stream in streams:
                    job.give(values[stream.hookpoint])
        sent = {rows: job.broadcast(x) for rows, x in found.items()}
        return [sent[b.rows_source] for b in batches]

    def _block(
        self, streams: Streams, wanted: Streams, number: int, owners: dict[int, int]
    ) -> Mapping[str, torch.Tensor]:
        """Return a block on rank 0: its own work, or another rank's."""
        owner = owners.pop(number, 0)  # a block found damaged on disk only now has no other owner
        if owner == 0:
            return compute_block(wanted, number)
        rows = len(streams[0].corpus.block(number))
        return {s.hookpoint: self._job.take(owner, (rows, s.context, s.width), s.subject.dtype) for s in streams}
