"""Measure the requests a second that the LLM client sustains, compared with delphi's client on the same server.

    python benchmarks/llm_client.py [--requests 6000] [--rounds 3] [--json] [--out x.json]

A server in a process of its own answers every request the same, at once or after a latency. Ours is the product's own
path: the judge's prompts, the answer cache, verdicts and costs in the journal. delphi's is its HTTP client under its
pipeline. ``sdk`` is the ``openai`` package alone, with typed answers. ``raw`` is aiohttp alone: the most that a client
in Python, and this server, can reach. These two keep nothing. The sides run one after the other in every round, and a
side's figure is the median of its rounds.

Next to the rate is the processor time of a request in the client's process. The rate on a quiet machine is about its
inverse; on a machine that others use, trust the processor time.

With a latency of 50 ms, the upper limit is concurrency / latency; the table shows the share of it that is reached.
``raw`` does not reach all of it either: timers are late by a millisecond or two, the server's as well as the client's.
delphi is installed into ``.venv-delphi``, made here; or name a Python that has it with ``--peers-python``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_side_ours import messages
from outcome import about, leave, parser_of
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent / ".venv-delphi"
ALONE = ("sdk", "raw")
SIDES = ("ours", "delphi", *ALONE)
LATENCY = 0.05


@contextmanager
def server(latency: float) -> Iterator[str]:
    """The address of a server that answers after ``latency`` seconds."""
    command = [sys.executable, str(HERE / "llm_server.py"), "--latency", str(latency)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait()


def measured(side: str, url: str, requests: int, concurrency: int, python: str) -> dict[str, float]:
    """One side's figures: ``rate`` in requests a second, ``cost`` in processor seconds a request."""
    with tempfile.TemporaryDirectory() as folder:
        if side == "delphi":
            path = Path(folder) / "messages.json"
            path.write_text(json.dumps(messages(requests)))
            command = [python, str(HERE / "llm_side_delphi.py"), str(path), url, str(concurrency)]
        else:
            command = [sys.executable, str(HERE / "llm_side_ours.py"), side, url, str(requests), str(concurrency)]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"error: {side} ended:\n{ran.stderr}")
    found = json.loads(ran.stdout)
    n = len(messages(requests))
    if found["answered"] != n:
        raise SystemExit(f"error: {side} has {found['answered']} answers to {n} requests")
    return {"rate": n / found["seconds"], "cost": found["processor"] / n}


def compared(
    sides: Sequence[str], latency: float, requests: int, concurrency: int, rounds: int, python: str
) -> dict[str, dict[str, float]]:
    """The medians of each side, all of them on one server."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with server(latency) as url:
        for _ in range(rounds):
            for side in sides:
                found[side].append(measured(side, url, requests, concurrency, python))
    return {
        side: {name: statistics.median(one[name] for one in of) for name in ("rate", "cost")}
        for side, of in found.items()
    }


def rows_of(found: dict[str, dict[str, float]], name: str, latency: float, concurrency: int) -> list[dict[str, Any]]:
    ours, peer = found["ours"], found.get("delphi")

    def share_of(one: dict[str, float] | None) -> float | None:
        return None if one is None or not latency else round(one["rate"] * latency / concurrency, 3)

    setting = f"{concurrency} at once, latency {latency * 1000:g} ms"
    rows = [
        {
            "name": name,
            "setting": setting,
            "ours": round(ours["rate"]),
            "peer": None if peer is None else round(peer["rate"]),
            "peer_name": None if peer is None else "delphi",
            "unit": "requests/s",
            "ratio": None if peer is None else round(ours["rate"] / peer["rate"], 2),
            "peak_mib": None,
            "share": share_of(ours),
            "peer_share": share_of(peer),
            **{side: round(found[side]["rate"]) if side in found else None for side in ALONE},
            **{f"{side}_share": share_of(found.get(side)) for side in ALONE},
        }
    ]
    if not latency:
        rows.append(
            {
                **rows[0],
                "name": "processor time",
                "ours": round(1000 * ours["cost"], 3),
                "peer": None if peer is None else round(1000 * peer["cost"], 3),
                "unit": "ms/request",
                "ratio": None if peer is None else round(peer["cost"] / ours["cost"], 2),
                **{side: round(1000 * found[side]["cost"], 3) if side in found else None for side in ALONE},
            }
        )
    return rows


def peers_python(given: str | None) -> str:
    """A Python that has delphi's client; makes the environment if there is none."""
    if given is not None:
        return given
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".ready").exists():
        print(f"installing delphi's client into {ENVIRONMENT} …", file=sys.stderr)
        venv.create(ENVIRONMENT, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        pinned = [word for name in ("", "-peers") for word in ("-c", str(HERE.parent / f"constraints{name}.txt"))]
        # Its client needs httpx, its pipeline tqdm; what the rest of the package wants would be gigabytes.
        subprocess.run([*pip, *pinned, "httpx", "tqdm"], check=True)
        subprocess.run([*pip, *pinned, "--no-deps", "eai-delphi"], check=True)
        (ENVIRONMENT / ".ready").touch()
    return str(python)


def shown(rows: Sequence[dict[str, Any]], console: Console) -> None:
    of = "of concurrency / latency"
    table = Table("what", "setting", "ours", "delphi", "ratio", *ALONE, f"{of}: ours", "delphi", *ALONE)
    for row in rows:
        texts = [row["name"], row["setting"], f"{row['ours']:,} {row['unit']}"]
        texts += [
            "" if row["peer"] is None else f"{row['peer']:,}",
            "" if row["ratio"] is None else f"{row['ratio']} ×",
        ]
        texts += ["" if row[side] is None else f"{row[side]:,}" for side in ALONE]
        shares = ("share", "peer_share", *(f"{side}_share" for side in ALONE))
        texts += ["" if row[name] is None else f"{row[name]:.0%}" for name in shares]
        table.add_row(*texts)
    console.print(table)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=6000, help="of each side in each round, without latency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 16, 32], help="with latency")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--peers-python", help="a Python that has delphi, httpx and tqdm")
    asked = parser.parse_args()
    python = peers_python(asked.peers_python) if "delphi" in asked.sides else ""
    sides = list(dict.fromkeys(["ours", *asked.sides]))
    begun = time.time()
    rows = rows_of(compared(sides, 0.0, asked.requests, 64, asked.rounds, python), "throughput", 0.0, 64)
    for concurrency in asked.concurrency:
        requests = int(concurrency / LATENCY * 4 / 100) * 100  # about four seconds
        found = compared(sides, LATENCY, requests, concurrency, asked.rounds, python)
        rows += rows_of(found, "with latency", LATENCY, concurrency)
    leave(asked, rows, about(begun), lambda: shown(rows, Console(width=140)))


if __name__ == "__main__":
    main()
