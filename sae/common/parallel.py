"""Join the other ranks of a command that torchrun started, or work alone; choose the meaning of ``--parallel``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from sae.common import launch
from sae.common.commands import replace_program_name
from sae.common.errors import BadInput
from sae.common.progress import say
from sae.common.ranks import ALONE, Job, Mode


@contextmanager
def join_ranks(parallel: str | None, seeds: int, device: str) -> Iterator[tuple[Job, str]]:
    """Join the other ranks, if any, while the block runs; yield the job and this rank's device (None: choose)."""
    if parallel is not None and not launch.launched():
        raise BadInput(
            f"--parallel {parallel} needs several processes; start them with "
            f"`{replace_program_name('torchrun --standalone --nproc-per-node 2 cli.py train')} …`"
        )
    with _join(*choose_mode(parallel, seeds, launch.size()), device) as joined:
        yield joined


def join_ranks_at_text(device: str) -> AbstractContextManager[tuple[Job, str]]:
    """Join the other ranks for work that is split by pieces of the text."""
    line = f"{launch.size()} ranks: the text is split over them, the same files as from one process"
    return _join("seeds", line, device)


@contextmanager
def _join(mode: Mode, line: str, device: str) -> Iterator[tuple[Job, str]]:
    if not launch.launched():
        yield ALONE, device
        return
    from sae.common.torchrun import join_process_group, rank_device

    say(line)
    device = rank_device(device)
    with join_process_group(mode, device) as job:
        yield job, device


def choose_mode(asked: str | None, seeds: int, ranks: int) -> tuple[Mode, str]:
    """Choose how to split a training, and the progress line that says so. ``asked`` is the flag, or None."""
    if asked not in (None, "seeds", "data"):
        raise BadInput(f"--parallel {asked!r}: give seeds or data")
    mode: Mode = "data" if asked == "data" or (asked is None and seeds < ranks) else "seeds"
    if mode == "data":
        what = "each step's tokens are split over the ranks, equal to one process up to rounding"
    elif seeds < ranks:
        what = f"{seeds} of {ranks} ranks train a seed, the others only help with the subject model"
    else:
        what = "the seeds are split over the ranks, the same weights as one process"
    return mode, f"{ranks} ranks, --parallel {mode}: {what}"
