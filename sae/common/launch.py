"""Which of the processes that torchrun started this one is.

Read from the environment and without torch, since the commands' help and what is said on standard error need it
before anything else is imported.
"""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether torchrun started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and size() > 1


def size() -> int:
    """How many ranks there are: 1 without torchrun."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This process's number among all ranks; 0 without torchrun. Only rank 0 speaks."""
    return _number("RANK", 0) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def local_size() -> int:
    """How many ranks this machine has, which share its memory: 1 without torchrun."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def local_rank() -> int:
    """This process's number among those on its machine."""
    return _number("LOCAL_RANK", 0) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default
