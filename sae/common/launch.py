"""Read this process's rank from torchrun's environment variables, without importing torch."""

from __future__ import annotations

import os


def launched() -> bool:
    """Return whether torchrun started this process and others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and size() > 1


def size() -> int:
    """Return the number of ranks: 1 without torchrun."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Return this process's rank; 0 without torchrun. Only rank 0 prints."""
    return _number("RANK", 0) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def local_size() -> int:
    """Return the number of ranks on this machine, which share its memory: 1 without torchrun."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def local_rank() -> int:
    return _number("LOCAL_RANK", 0) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default
