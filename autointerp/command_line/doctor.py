"""The command doctor: check the files of runs, the machine and the servers, a line each with what to do."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec

from autointerp.command_line import options as opt
from autointerp.command_line.ending import end, finish
from autointerp.command_line.options import Output, Server, llm_options, takes_groups
from sae.common.amounts import human
from sae.common.errors import UserError, make_printable

if TYPE_CHECKING:
    from sae.study.run import Run

P = ParamSpec("P")
_LITTLE_SPACE = 2 << 30
_OLD = "no digests, as an older version wrote it: damage stays unnoticed until it is made again"


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    what: str
    state: Literal["ok", "note", "bad"]
    says: str


@takes_groups
def doctor(*, sae: opt.CheckedSaes = None, server: Server, output: Output) -> None:
    """Check the files of runs, the free space, the CPU or GPU, vLLM and an LLM endpoint if one is given.

    The exit code is 1 if something is damaged, missing or does not answer.

    \b
    python cli.py doctor --sae run_a
    python cli.py doctor --llm-url http://127.0.0.1:8000/v1
    """
    from sae.study.run import Run, all_runs

    runs = [Run.open(name, output.root) for name in sae] if sae else all_runs(output.root)
    found = []
    for check in (*_check_runs(runs, output.root), *_check_machine(output.root), *_check_servers(server)):
        found.append(check)
        if not output.as_json:
            print(make_printable(f"{check.state:5}{check.what}: {check.says}"), flush=True)
    finish(output.as_json, "doctor", lambda: {"checks": [asdict(check) for check in found]}, lambda: None)
    if n_bad := sum(check.state == "bad" for check in found):
        end(1, f"error: doctor: {n_bad} of {len(found)} checks failed; each line above says what to do")


def _check(what: str, examine: Callable[P, str], *given: P.args, **named: P.kwargs) -> Check:
    """Return what ``examine`` says, or its error."""
    try:
        says = examine(*given, **named)
        return Check(what, "note" if says.startswith("no ") else "ok", says)
    except (UserError, OSError) as error:
        return Check(what, "bad", str(error))


def _check_runs(runs: Sequence[Run], root: Path) -> Iterator[Check]:
    from sae.study.run import split_readable

    readable, damaged = split_readable(runs)
    yield from (Check(f"{name} record", "bad", line) for name, line in damaged.items())
    for run in readable:
        seed = "imported" if run.seed is None else f"seed {run.seed}"
        yield Check(f"{run.name} record", "ok", f"study {run.study}, {seed}")
        if not run.is_trained:
            yield Check(f"{run.name} weights", "note", "no weights yet: the training or import is unfinished")
            continue
        yield _check(f"{run.name} weights", _examine_weights, run)
        if (run.firings_folder / "store.json").is_file():
            yield _check(f"{run.name} firing store", _examine_store, run)
        yield _check(f"{run.name} tables", _examine_tables, run)
        if run.journal_path.is_file():
            yield _check(f"{run.name} journal", _examine_journal, run)
        for path in sorted((root / "alignments").glob(f"{run.name}--*.parquet")):
            yield _check(f"alignment {path.stem}", _examine_alignment, path)
    for key in sorted({run.record["corpus"]["key"] for run in readable}):
        yield _check(f"corpus {key}", _examine_corpus, root / "corpora" / key)
    if (cache := root / "cache.sqlite").is_file():
        yield _check("cache.sqlite", _examine_cache, cache)


def _examine_weights(run: Run) -> str:
    sae = run.sae()
    digests = "digests match" if run.is_sealed else _OLD
    return f"{digests}; {sae.architecture}, {sae.num_latents} latents, width {sae.d_in}"


def _examine_store(run: Run) -> str:
    from sae.common.errors import BadInput
    from sae.firings.store import HARVEST_AGAIN

    store = run.store()
    if store.provenance["weights"] != run.weights_digest:
        raise BadInput(f"{str(store.folder)!r} was harvested from other weights; {HARVEST_AGAIN}")
    return f"{'digests match' if store.check() else _OLD}; {human(store.n_tokens)} tokens"


def _examine_tables(run: Run) -> str:
    from sae.common.files import read_table
    from sae.study.harvest import is_harvested

    paths = [path for path in sorted(run.folder.glob("*.parquet")) if len(read_table(path)) >= 0]
    stale = (run.firings_folder / "store.json").is_file() and not is_harvested(run)
    return "no current firing table; run `harvest`" if stale else f"{len(paths)} can be read"


def _examine_journal(run: Run) -> str:
    from autointerp.journal.journal import open_journal

    with open_journal(run, upgrade=False) as journal:
        journal.check()
        return f"{len(journal.explanations())} explanations, {len(journal.verdicts(['truth']))} verdicts"


def _examine_alignment(path: Path) -> str:
    from sae.alignment.alignment import read_alignment

    return f"{len(read_alignment(path.parent, *path.stem.split('--')).a)} latents matched"


def _examine_corpus(folder: Path) -> str:
    from sae.text.corpus import Corpus

    corpus = Corpus.open(folder)
    corpus.check()
    corpus.decode(corpus.tokens[0])
    documents = len(corpus.document_ends)
    state = "digests match" if corpus.has_digests else _OLD
    return f"{state}; {human(corpus.n_tokens)} tokens, {human(documents)} documents"


def _examine_cache(path: Path) -> str:
    from autointerp.llm.client import ResponseCache

    cache = ResponseCache(path, upgrade=False)
    try:
        return f"{cache.check()} answers"
    finally:
        cache.close()


def _check_machine(root: Path) -> Iterator[Check]:
    import torch

    from sae.common.memory import free_host_bytes
    from sae.common.precision import is_emulated

    free = shutil.disk_usage(root if root.is_dir() else Path.cwd()).free
    little = free < _LITTLE_SPACE
    advice = "; free some space, or choose another --root" if little else ""
    yield Check("disk", "note" if little else "ok", f"{human(free)}B free under {str(root)!r}{advice}")
    memory = free_host_bytes()
    yield Check("memory", "ok", "unknown" if memory is None else f"{human(memory)}B free")
    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        able = [name for name in ("int8", "bfloat16", "float16") if not is_emulated(name, device)]
        name = f"{os.cpu_count()} cores" if device == "cpu" else torch.cuda.get_device_name(device)
        yield Check(device, "ok", f"{name}; products in float32{''.join(f', {kind}' for kind in able)}")
    if not torch.cuda.is_available():
        yield Check("GPU", "note", "no GPU that this PyTorch can use; everything runs on the CPU")


def _check_servers(server: Server) -> Iterator[Check]:
    from autointerp.llm.local.model import find_python

    vllm = _check("vLLM", lambda: str(find_python(server.vllm_python)))
    asked = server.vllm_python is not None or server.vllm is not None
    yield vllm if asked or vllm.state == "ok" else Check(vllm.what, "note", vllm.says)
    if server.llm_url:
        yield _check(f"LLM endpoint {', '.join(server.llm_url)}", lambda: asyncio.run(_ask(server)))


async def _ask(server: Server) -> str:
    """Connect to the endpoint without asking its model anything."""
    from tempfile import TemporaryDirectory

    from autointerp.llm.client import open_client

    with TemporaryDirectory() as folder:
        async with open_client(llm_options(server), Path(folder) / "cache.sqlite") as client:
            return f"answers, with model {client.model}"
