"""Several ranks on one machine without the weight of torchrun: one process that imports torch once and then forks.

    python small_ranks.py FOLDER

For each scenario of ``rank_work`` it stands in for torchrun: it holds the store, gives every rank its environment, ends
all when one has failed, and writes what became of them to ``FOLDER/SCENARIO/ended.json``. Before that it does alone
what the ranks will do together, which also saves them compiling the kernels: all of it with one thread, since what has
threads cannot be forked.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rank_work
import torch
import torch.distributed as dist

from autointerp.command_line.ending import one_line_errors
from sae.common import progress

PATIENCE = 60.0


def run_ranks(work: Callable[[Path], object], ranks: int, folder: Path) -> None:
    """Fork ``ranks`` processes that do ``work``, each with its standard output and error in files of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    # The store comes after the forks: a process that is forked while a thread of the store holds a lock waits for ever.
    reads, writes = os.pipe()
    children = [_fork(work, rank, ranks, reads, folder) for rank in range(ranks)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writes, store.port.to_bytes(4, "big") * ranks)
    codes: dict[int, int] = {}
    while len(codes) < ranks:
        for rank, child in enumerate(children):
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        if any(codes.values()) or time.monotonic() - begun > PATIENCE:
            for rank, child in enumerate(children):
                if rank not in codes:
                    os.kill(child, signal.SIGTERM)
        time.sleep(0.01)
    report = {"codes": [codes[rank] for rank in range(ranks)], "seconds": time.monotonic() - begun}
    (folder / "ended.json").write_text(json.dumps(report))
    os.close(reads)
    os.close(writes)


def _fork(work: Callable[[Path], object], rank: int, ranks: int, reads: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    port = int.from_bytes(os.read(reads, 4), "big")
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    progress.console.quiet = rank != 0  # which a rank that torchrun started finds out by itself
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    code = 1
    try:
        with one_line_errors(as_json=True):
            work(folder)
        code = 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what runs the tests may have turned off
    root = Path(sys.argv[1])
    rank_work.alone(root / "alone")
    for scenario, n in rank_work.RANKS.items():
        run_ranks(getattr(rank_work, scenario), n, root / scenario)
