"""Time the harvest (tokens/s, memory), compared with its forward pass and with delphi's cache.

    python benchmarks/harvest.py [--tokens 250000 1000000] [--shapes 2048x8 8192x32] [--rounds 3] [--out x.json]

The bundled subject model in float32 on its own text, the hookpoint of `make demo`, and TopK dictionaries with random
weights: how many latents fire does not depend on what they have learnt. Every side is a process of its own, run alone:

- *ours*: ``sae.firings.harvest.harvest`` to a firing store that is ready for look-ups, index included, for one
  dictionary and for three in one pass; no cache of activations;
- *bare*: the same forward pass and the same encoding, with nothing recorded: an upper limit;
- *delphi*: ``LatentCache.run`` and ``save_splits`` (5 splits), the dictionary opened by sparsify, as its documentation
  has it; it runs the model to its last layer.

Times are of the second of two calls in the process, the first being a small one (compiling, growing heaps). delphi and
its dependencies are installed into ``build/delphi``, next to the peers' environment (``make test-peers`` makes that);
or name a Python that has them with ``--delphi-python``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outcome import about, keep, parser_of
from rich.console import Console
from rich.table import Table
from training import peers_python

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DELPHI = ROOT / "build" / "delphi"
# Its own dependencies are not all needed, and some would bring another PyTorch.
DELPHI_PACKAGES = ("eai-delphi==0.1.3", "faiss-cpu", "sentence-transformers", "blobfile", "lxml", "orjson", "asyncer")
SEQUENCES = 8  # in delphi's batch
SMALL = 16_384


def prepared(folder: Path, shape: str, tokens: int) -> None:
    """What all sides work on: the model's folder, tokens in the order of the harvest, and three dictionaries."""
    from sae.dictionaries.architectures.topk import TopKSae
    from sae.dictionaries.checkpoint import save_sae
    from sae.dictionaries.formats import About

    source = our_source(folder)
    stream = next(iter(source.streams.values()))
    m, k = map(int, shape.split("x"))
    sample = stream.rows(source.corpus.order(0, 0)[:8]).flatten(0, 1).float()
    for name in "abc":
        sae = TopKSae.init(stream.width, m, k, ord(name), sample)
        save_sae(folder / name, sae, About("bundled", stream.hookpoint, source.corpus.context, 0))
    order = source.corpus.order(0, 0)[: -(-tokens // source.corpus.context)]
    np.save(folder / "tokens.npy", source.corpus.rows(order).astype(np.int64))
    (folder / "about.json").write_text(json.dumps({"hookpoint": stream.hookpoint, "context": source.corpus.context}))


def our_source(folder: Path) -> Any:
    from sae.study.recipes import settings_from
    from sae.study.stage import Compute, open_source

    recipe = ROOT / "eval_runs" / "recipes" / "demo.toml"
    settings = settings_from(recipe, subject={"dtype": "float32"})
    return open_source([settings], folder / "root", Compute("cpu", torch.get_num_threads()), cache="none")


def ours(folder: Path, tokens: int, names: str) -> None:
    """Harvest ``tokens`` tokens for the dictionaries ``names``, from nothing."""
    from sae.dictionaries.checkpoint import load_sae
    from sae.firings.harvest import harvest

    source = our_source(folder)
    stream = next(iter(source.streams.values()))
    shutil.rmtree(folder / "stores", ignore_errors=True)
    saes = {name: load_sae(folder / name) for name in names}
    harvest(stream, saes, {name: folder / "stores" / name for name in names}, dict.fromkeys(names, ""), tokens, 32, 0)


def bare(folder: Path, tokens: int, names: str) -> None:
    """The forward pass and the encoding of the same tokens in the same pieces."""
    from sae.dictionaries.checkpoint import load_sae

    source = our_source(folder)
    stream, corpus = next(iter(source.streams.values())), source.corpus
    saes = [load_sae(folder / name) for name in names]
    order = corpus.order(0, 0)[: -(-tokens // corpus.context)]
    with torch.inference_mode():
        for start in range(0, len(order), corpus.block_rows):
            x = stream.rows(order[start : start + corpus.block_rows]).flatten(0, 1)
            for sae in saes:
                sae.encode_fast(x)


def delphi(folder: Path, tokens: int, names: str) -> None:
    """delphi's cache of the first dictionary, written to disk."""
    from functools import partial

    from delphi.latents.cache import LatentCache
    from delphi.sparse_coders.load_sparsify import sae_dense_latents
    from sparsify import SparseCoder
    from transformers import AutoModel

    about = json.loads((folder / "about.json").read_text())
    model = AutoModel.from_pretrained(subject_folder(), dtype=torch.float32, trust_remote_code=False)
    coder = SparseCoder.load_from_disk(str(folder / names[0]), device="cpu")
    encode = {about["hookpoint"]: partial(sae_dense_latents, sae=coder)}
    cache = LatentCache(model, encode, batch_size=SEQUENCES)
    cache.run(tokens, torch.from_numpy(np.load(folder / "tokens.npy")))
    shutil.rmtree(folder / "delphi", ignore_errors=True)
    cache.save_splits(5, folder / "delphi")


def subject_folder() -> Path:
    """The bundled model's folder, found without our own packages."""
    return next((ROOT / "sae" / "activations" / "bundled").glob("*/config.json")).parent


SIDES = {"ours": ours, "bare": bare, "delphi": delphi}


def side(name: str, folder: Path, tokens: int, names: str, threads: int) -> dict[str, Any]:
    """What one side says of itself, in the process that was started for it."""
    torch.set_num_threads(threads)
    SIDES[name](folder, SMALL, names)
    begun = time.perf_counter()
    SIDES[name](folder, tokens, names)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def started(name: str, folder: Path, tokens: int, names: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Run one side alone."""
    python, path = sys.executable, str(ROOT)
    if name == "delphi":
        python, path = asked.delphi_python or delphi_python(), str(DELPHI)
    command = [python, __file__, "--side", name, "--folder", str(folder), "--names", names]
    command += ["--tokens", str(tokens), "--threads", str(asked.threads)]
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if answer.returncode:
        raise SystemExit(f"error: {name} at {tokens} tokens ended; what it said is above")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def delphi_python() -> str:
    """The peers' Python; installs delphi next to it if it is missing."""
    python = peers_python(None)
    if not (DELPHI / ".ready").exists():
        print(f"installing delphi into {DELPHI} …", file=sys.stderr)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(DELPHI), *DELPHI_PACKAGES], check=True)
        (DELPHI / ".ready").touch()
    return python


def compare(shape: str, tokens: int, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one setting; a ratio above 1 is in our favour."""
    todo = [("ours", "a"), ("bare", "a"), ("ours", "abc"), ("bare", "abc")]
    todo += [("delphi", "a")] if "delphi" in asked.sides else []
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        prepared(Path(folder), shape, tokens)
        found: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in todo}
        for _ in range(asked.rounds):
            for name, names in todo:
                found[name, names].append(started(name, Path(folder), tokens, names, asked))
    seconds = {key: statistics.median(one["seconds"] for one in of) for key, of in found.items()}
    peak = {key: max(one["peak"] for one in of) for key, of in found.items()}
    rows = []
    for names in ("a", "abc"):
        own = "ours", names
        for peer in (("bare", names), ("delphi", "a")):
            if peer not in seconds:
                continue
            # delphi has one dictionary a hookpoint: for three it goes over the text three times.
            times = len(names) if peer[0] == "delphi" else 1
            m, k = shape.split("x")
            rows.append(
                {
                    "name": "harvest",
                    "setting": f"M {int(m):,}, k {k}, {len(names)} SAE{'s' * (len(names) > 1)}, {tokens:,} tokens",
                    "ours": round(tokens / seconds[own]),
                    "peer": round(tokens / (times * seconds[peer])),
                    "peer_name": peer[0],
                    "unit": "tokens/s",
                    "ratio": round(times * seconds[peer] / seconds[own], 3),
                    "peak_mib": round(peak[own] / 2**20),
                    "peer_peak_mib": round(peak[peer] / 2**20),
                }
            )
    return rows


def shown(rows: Sequence[dict[str, Any]], console: Console, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("", "compared with", "ours", "theirs", "ratio", "MiB", "their MiB"):
        table.add_column(name, justify="left" if name in ("", "compared with") else "right")
    for row in rows:
        numbers = f"{row['ours']:,}", f"{row['peer']:,}", f"{row['ratio']:.2f} ×"
        table.add_row(row["setting"], row["peer_name"], *numbers, f"{row['peak_mib']:,}", f"{row['peer_peak_mib']:,}")
    console.print(table)


def others(path: Path, about: dict[str, Any], measured: set[str]) -> list[dict[str, Any]]:
    """The rows of settings that were not measured now, where those in ``path`` are of the same machine and day."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    same = before["date"][:10] == about["date"][:10] and all(before[x] == about[x] for x in ("processor", "threads"))
    return [row for row in before["rows"] if same and row["setting"] not in measured]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[250_000, 1_000_000])
    parser.add_argument("--shapes", nargs="+", metavar="MxK", default=["2048x8", "8192x32"])
    parser.add_argument("--sides", nargs="*", choices=("delphi",), default=["delphi"], help="peers; none: bare alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", help="where the stores are written; default: the system's place")
    parser.add_argument("--delphi-python", help="a Python that has eai-delphi and eai-sparsify")
    for name in ("--side", "--names", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        found = side(asked.side, Path(asked.folder), asked.tokens[0], asked.names, asked.threads)
        print("\n" + json.dumps(found))
        return
    begun, rows = time.time(), []
    for shape in asked.shapes:
        for tokens in asked.tokens:
            rows += compare(shape, tokens, asked)
    head = about(begun, threads=asked.threads)
    if asked.out is not None:
        kept = others(asked.out, head, {row["setting"] for row in rows})
        keep(asked.out, {**head, "rows": [*kept, *rows]})
    if asked.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        shown(rows, Console(width=120), f"{head['processor']}, {asked.threads} threads, tokens/s")


if __name__ == "__main__":
    main()
