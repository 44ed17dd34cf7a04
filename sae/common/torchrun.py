"""The ranks of one training: how they meet, what they hand each other, and how they end together.

How a training is split is told in :mod:`sae.common.ranks`; here is how that is carried out, with gloo between CPUs and
NCCL between GPUs.

Whatever one rank alone must do (tokenise, write records) the others wait for without a time limit; they cannot
wait for the dead. A rank that fails claims the right to speak in torchrun's store, says its one line and ends; torchrun
ends the rest. A rank whose torchrun is gone ends itself, so that nothing is left that writes.
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

_COLLECTIVE = timedelta(minutes=30)  # longest that one rank may be behind the others within the training itself
_SMALL = 1 << 20  # elements; smaller tensors travel together
_LAST_WORDS = timedelta(seconds=10)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


class RankLost(UserError):
    """Another rank of the job is gone."""


class TorchrunJob(Job):
    """One of several processes. Made by :func:`join_process_group`."""

    def __init__(self, mode: Mode, device: torch.device) -> None:
        self.rank, self.size, self.mode, self.device = launch.rank(), launch.size(), mode, device
        self._store = _store()
        self._told = 0
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
        self._told += 1
        return self.first(f"record {self._told}", lambda: record)

    def check_alike(self, tensors: Sequence[Tensor]) -> None:
        if self.mode == "seeds":
            return
        sums = torch.stack([t.reshape(-1).contiguous().view(torch.uint8).sum(dtype=torch.int64) for t in tensors]).cpu()
        both = torch.cat([sums, -sums])
        with _lost_ranks():
            dist.all_reduce(both, dist.ReduceOp.MAX)
        if not torch.equal(both[: len(sums)], -both[len(sums) :]):
            raise UserError(
                "the ranks no longer hold the same weights, so their processors do not compute alike; "
                "use ranks of one kind, or --parallel seeds"
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

    # --- what the batches travel by -----------------------------------------------------------------------

    def numbers(self, values: Sequence[int] | None) -> list[int]:
        """Rank 0's whole numbers, on every rank; the others give None."""
        length = torch.tensor([len(values or ())])
        with _lost_ranks():
            dist.broadcast(length, 0)
            message = torch.tensor(values or [0] * int(length), dtype=torch.int64)
            if len(message):
                dist.broadcast(message, 0)
        return message.tolist()

    def broadcast(self, x: Tensor | None) -> Tensor:
        """Rank 0's tensor, on every rank, as memory of its own; the others' argument is not read."""
        head = self.numbers([_DTYPES.index(x.dtype), *x.shape] if self.rank == 0 and x is not None else None)
        if self.rank or x is None:
            x = torch.empty(head[1:], dtype=_DTYPES[head[0]], device=self.device)
        x = x.contiguous()
        with _lost_ranks():
            dist.broadcast(_bytes(x), 0)
        return x

    def give(self, x: Tensor) -> None:
        """Send a tensor to rank 0, which has to ``take`` it."""
        with _lost_ranks():
            dist.send(_bytes(x.to(self.device).contiguous()), 0)

    def take(self, owner: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """On rank 0: the tensor that ``owner`` gives, which has to be of that shape."""
        x = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        with _lost_ranks():
            dist.recv(_bytes(x), owner)
        return x


# --- beginning and ending ---------------------------------------------------------------------------------


def rank_device(device: str) -> str:
    """This rank's device, where the user said ``device``: each rank of a machine has a GPU of its own."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if device not in ("auto", "cuda"):
        raise BadInput(f"--device {device}: under torchrun every rank takes a GPU of its own; give cuda or cpu")
    if not torch.cuda.is_available():
        raise BadInput("--device cuda: there is no GPU that torch can use here; try --device cpu")
    if launch.local_rank() >= torch.cuda.device_count():
        raise BadInput(
            f"torchrun starts more processes than this machine has GPUs ({torch.cuda.device_count()}); "
            f"give --nproc-per-node {torch.cuda.device_count()}"
        )
    return f"cuda:{launch.local_rank()}"


@contextmanager
def join_process_group(mode: Mode, device: str) -> Iterator[TorchrunJob]:
    """Meet the other ranks, for as long as the block lasts. ``device`` is where this rank computes."""
    here = torch.device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    _end_with_torchrun()
    with _lost_ranks():
        # What steers the job lies in main memory on any machine, so there is always gloo beside NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "cpu:gloo", timeout=_COLLECTIVE)
    # In place of the hook that torch has just set, which calls others with standard error led into a buffer.
    sys.excepthook = lambda *error: end_rank(1, lambda: sys.__excepthook__(*error))
    job = TorchrunJob(mode, here)
    yield job
    job.barrier()
    dist.destroy_process_group()


def end_rank(code: int, speak: Callable[[], None]) -> NoReturn:
    """End this rank after a failure. Of all ranks that fail, only the first one's ``speak`` is called.

    A failure that all ranks meet (a bad recipe) is told once; and one that ends the others by way of a broken
    connection is told by the rank that it happened to.
    """
    try:
        store = _store()
        mine = store.add("failed", 1) == 1
    except (RuntimeError, KeyError, ValueError):
        store, mine = None, launch.rank() == 0
    if mine:
        speak()
        sys.stdout.flush()
        sys.stderr.flush()
    try:
        if store is not None and mine:
            store.set("said", "1")
        elif store is not None:
            store.wait(["said"], _LAST_WORDS)  # torchrun ends all ranks once one has ended
    except RuntimeError:
        pass
    os._exit(code)  # not by way of the process group's destructors, which may wait for the other ranks


def _store() -> dist.Store:
    """The store that lives in torchrun itself, and so outlives every rank."""
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
    except RuntimeError as error:  # gloo, NCCL and the store raise nothing finer
        if is_out_of_memory(error):
            raise
        reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).split(". ")[0]
        raise RankLost(
            f"rank {launch.rank()} lost the others ({reason}); one may have been killed, for want of memory perhaps: "
            "give the same command again, and it goes on from the last checkpoint"
        ) from error


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor: bytes are what every backend can carry."""
    return x.reshape(-1).view(torch.uint8)
