"""How much main memory is free for this process: by the system, by its container, by its own limits. No torch."""

from __future__ import annotations

import resource
from pathlib import Path

from sae.common import launch


def free_host_bytes() -> int | None:
    """What is free for this process, swap included; ``None`` where the system does not tell.

    Processes that torchrun started on one machine share what it has.
    """
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
    """What a container's limit leaves (control groups, version 2)."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.split()[0] == "file")
        return None if limit == "max" else int(limit) - used + cached
    except (OSError, ValueError, IndexError):
        return None


def _within_limit() -> int | None:
    """What ``ulimit -v`` leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return None if limit == resource.RLIM_INFINITY else max(0, limit - pages * resource.getpagesize())
