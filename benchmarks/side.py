"""One side of the training comparison: a process that trains a number of steps when asked.

Requests and answers are lines of JSON. A side that is not asked waits in a read, and takes no processor time from the
other. This module imports nothing but PyTorch, since it also runs where only the peers are installed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Task:
    """What to train, and how."""

    side: str
    """ours, sparsify or dictionary_learning"""
    mode: str
    """float32, bfloat16 or int8: ours with rounded encoder products, a peer under bfloat16 autocast"""
    d_in: int
    num_latents: int
    k: int
    tokens: int
    """in a batch"""
    seeds: int
    threads: int
    device: str

    def line(self) -> str:
        return json.dumps(asdict(self))


class Asked:
    """The asking end, as the side sees it."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print must not come between the answers
        self.task = Task(**json.loads(sys.stdin.readline()))
        torch.set_num_threads(self.task.threads)

    def ready(self, about: dict[str, str]) -> None:
        self._say({"about": {"torch": torch.__version__, **about}})

    def rounds(self) -> Iterator[int]:
        """The number of steps asked for, again and again until the other end hangs up."""
        for line in sys.stdin:
            yield int(json.loads(line)["steps"])

    def answer(self, seconds: float) -> None:
        """``seconds`` for all steps of all seeds of the round."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.task.device != "cpu":
            peak = torch.cuda.max_memory_allocated()
        self._say({"seconds": seconds, "peak": peak})

    def _say(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")


def now(device: str) -> float:
    """The time when all that was asked of the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
