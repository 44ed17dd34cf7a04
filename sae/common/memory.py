"""Measure the free main memory, and recognise errors that mean it ran out. Imports no torch."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from sae.common import launch


def free_host_bytes() -> int | None:
    """Return the bytes that the processes here can still allocate, swap included; ``None`` if unknown."""
    shared = [bound // launch.local_size() for bound in (_available(), _within_group()) if bound is not None]
    own = _within_limit()
    return min(shared if own is None else [*shared, own], default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
        return found["MemAvailable"] + found.get("SwapFree", 0)
    except (OSError, KeyError, ValueError):
        return None


def _within_group() -> int | None:
    """Return the bytes left by a container's limit (cgroups v2)."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.split()[0] == "file")
        return None if limit == "max" else int(limit) - used + cached
    except (OSError, ValueError, IndexError):
        return None


def _within_limit() -> int | None:
    """Return the bytes left by ``ulimit -v``."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return None if limit == resource.RLIM_INFINITY else max(0, limit - pages * resource.getpagesize())


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or in main memory."""
    message, torch = str(error), sys.modules.get("torch")
    return isinstance(error, MemoryError | (torch.OutOfMemoryError if torch else MemoryError)) or (
        isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in message or "not enough memory" in message)
    )
