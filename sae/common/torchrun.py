"""Communicate between the ranks that torchrun started: gloo between CPUs, NCCL between GPUs.

:mod:`sae.common.ranks` describes how work is split. Ranks wait for rank 0 without a time limit. Only the first rank
that fails prints its error; torchrun then ends the others. A rank whose torchrun is gone ends itself.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sae.common import launch
from sae.common.errors import BadInput, UserError
from sae.common.memory import is_out_of_memory
from sae.common.ranks import Job, Mode

T = TypeVar("T")

_COLLECTIVE = timedelta(minutes=30)  # longest that one rank may lag behind the others during training
_SMALL = 1 << 20  # elements; smaller tensors are sent together
_LAST_WORDS = timedelta(seconds=10)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


class RankLost(UserError):
    """Another rank has died."""


class TorchrunJob(Job):
    """One of several ranks. Made by :func:`join_process_group`."""

    def __init__(self, mode: Mode, device: torch.device) -> None:
        self.rank, self.size, self.mode, self.device = launch.rank(), launch.size(), mode, device
        self._store = _store()
        self._n_records = 0
        if mode == "data":
            self.record = {"ranks": {"parallel": mode, "number": self.size}}

    @property
    def writes(self) -> bool:
        return self.mode == "seeds" or self.rank == 0

    def share(self, seeds: Sequence[T]) -> list[T]:
        return list(seeds) if self.mode == "data" else list(seeds[self.rank :: self.size])

    def rows(self, x: Tensor) -> Tensor:
        if self.mode == "seeds":
            return x
        return x[self.rank * len(x) // self.size : (self.rank + 1) * len(x) // self.size]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        if self.mode == "seeds":
            return
        small: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() < _SMALL:
                small.setdefault(tensor.dtype, []).append(tensor)
        with _lost_ranks():
            for tensor in (t for t in tensors if t.numel() >= _SMALL):
                dist.all_reduce(tensor)
            for parts in small.values():
                together = torch.cat([part.reshape(-1) for part in parts])
                dist.all_reduce(together)
                for part, total in zip(parts, together.split([part.numel() for part in parts]), strict=True):
                    part.copy_(total.view_as(part))

    def least_of(self, tensor: Tensor) -> None:
        if self.mode == "data":
            with _lost_ranks():
                dist.all_reduce(tensor, dist.ReduceOp.MIN)

    def alike(self, tensors: Sequence[Tensor], record: T) -> T:
        if self.mode == "seeds":
            return record
        for tensor in tensors:
            tensor.copy_(self.broadcast(tensor))
        self._n_records += 1
        return self.first(f"record {self._n_records}", lambda: record)

    def check_alike(self, tensors: Sequence[Tensor]) -> None:
        if self.mode == "seeds":
            return
        sums = torch.stack([t.reshape(-1).contiguous().view(torch.uint8).sum(dtype=torch.int64) for t in tensors]).cpu()
        both = torch.cat([sums, -sums])
        with _lost_ranks():
            dist.all_reduce(both, dist.ReduceOp.MAX)
        if not torch.equal(both[: len(sums)], -both[len(sums) :]):
            raise UserError(
                "the weights differ between the ranks, because their processors round differently; "
                "use machines of one kind, or --parallel seeds"
            )

    def gather(self, values: Tensor) -> list[Tensor]:
        if self.mode == "seeds":
            return [values]
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(values)
        with _lost_ranks():
            dist.all_reduce(lengths)
            padded = values.new_zeros(int(lengths.max()))
            padded[: len(values)] = values
            everyone = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(everyone, padded)
        return [one[: int(n)] for one, n in zip(everyone, lengths, strict=True)]

    @property
    def place(self) -> int:
        return self.rank if self.mode == "data" else 0

    def least(self, number: int) -> int:
        value = torch.tensor([number])
        with _lost_ranks():
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    def first(self, name: str, work: Callable[[], T]) -> T:
        if self.rank == 0:
            value = work()
            self._store.set(name, json.dumps(value))
            return value
        with _lost_ranks():
            while not self._store.check([name]):
                time.sleep(0.02)
            return json.loads(self._store.get(name))

    @contextmanager
    def first_then_others(self, name: str) -> Iterator[None]:
        if self.rank:
            self.first(name, lambda: None)
        yield
        if self.rank == 0:
            self.first(name, lambda: None)

    def barrier(self) -> None:
        self.least(0)

    def numbers(self, values: Sequence[int] | None) -> list[int]:
        length = torch.tensor([len(values or ())])
        with _lost_ranks():
            dist.broadcast(length, 0)
            message = torch.tensor(values or [0] * int(length), dtype=torch.int64)
            if len(message):
                dist.broadcast(message, 0)
        return message.tolist()

    def broadcast(self, x: Tensor | None) -> Tensor:
        head = self.numbers([_DTYPES.index(x.dtype), *x.shape] if self.rank == 0 and x is not None else None)
        if self.rank or x is None:
            x = torch.empty(head[1:], dtype=_DTYPES[head[0]], device=self.device)
        x = x.contiguous()
        with _lost_ranks():
            dist.broadcast(_bytes(x), 0)
        return x

    def give(self, x: Tensor) -> None:
        with _lost_ranks():
            dist.send(_bytes(x.to(self.device).contiguous()), 0)

    def take(self, owner: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        with _lost_ranks():
            dist.recv(_bytes(x), owner)
        return x


def rank_device(device: str) -> str:
    """Return this rank's device for the user's ``--device``: each rank of a machine has its own GPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if device not in ("auto", "cuda"):
        raise BadInput(f"--device {device}: under torchrun each rank uses its own GPU; give cuda or cpu")
    if not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no GPU on this machine; try --device cpu")
    if launch.local_rank() >= torch.cuda.device_count():
        raise BadInput(
            f"torchrun starts more processes than this machine has GPUs ({torch.cuda.device_count()}); "
            f"give --nproc-per-node {torch.cuda.device_count()}"
        )
    return f"cuda:{launch.local_rank()}"


@contextmanager
def join_process_group(mode: Mode, device: str) -> Iterator[TorchrunJob]:
    """Join the other ranks while the block runs. ``device`` is where this rank computes."""
    here = torch.device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    _end_with_torchrun()
    with _lost_ranks():
        # Control messages are in main memory, so gloo is always needed too.
        dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "cpu:gloo", timeout=_COLLECTIVE)
    # Replace the hook that torch has just set, which buffers standard error.
    sys.excepthook = lambda *error: end_rank(1, lambda: sys.__excepthook__(*error))
    job = TorchrunJob(mode, here)
    yield job
    job.barrier()
    dist.destroy_process_group()


def end_rank(code: int, speak: Callable[[], None]) -> NoReturn:
    """End this rank after a failure; ``speak`` prints the error and is called only on the first rank that fails."""
    try:
        store = _store()
        mine = store.add("failed", 1) == 1
    except (RuntimeError, KeyError, ValueError):
        store, mine = None, launch.rank() == 0
    if mine:
        speak()
        sys.stdout.flush()
        sys.stderr.flush()  # before torchrun ends all ranks
    try:
        if store is not None and mine:
            store.set("said", "1")
        elif store is not None:
            store.wait(["said"], _LAST_WORDS)  # torchrun ends all ranks once one has ended
    except RuntimeError:
        pass
    leave_rank(code)


def leave_rank(code: int) -> NoReturn:
    """End this rank's process without Python's finalization.

    Finalization sometimes aborts in a thread of the process group after all work is done, and its destructors may wait
    for the other ranks.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _store() -> dist.Store:
    """Connect to torchrun's own store, which outlives every rank."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(minutes=5)
    )
    return dist.PrefixStore(f"sae/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _end_with_torchrun() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, name="torchrun-watch", daemon=True).start()


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo, NCCL and the store, which have no error class
        if is_out_of_memory(error):
            raise
        reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).split(". ")[0]
        raise RankLost(
            f"rank {launch.rank()} lost the other ranks ({reason}); one may have been killed, perhaps out of memory: "
            "run the same command to resume from the last checkpoint"
        ) from error


def _bytes(x: Tensor) -> Tensor:
    """View a contiguous tensor as bytes, which every backend can send."""
    return x.reshape(-1).view(torch.uint8)
