"""The common part of the benchmarks: options, date and machine, and output."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the benchmark's docstring as it is, and takes ``--json`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--out", type=Path, help="also write them to this file, with date and machine")
    return parser


def prompts_parser(description: str | None, prompts: Path) -> argparse.ArgumentParser:
    """A parser of a benchmark that asks a server about a run's contexts with the files of several folders."""
    parser = parser_of(description)
    parser.add_argument("--run", default="demo_a")
    parser.add_argument("--root", type=Path, default=Path("eval_runs"))
    parser.add_argument("--llm-url", required=True)
    parser.add_argument("--llm-model")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[prompts], help="folders like prompts/")
    return parser


def about(begun: float | None = None, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Date and machine, ``more``, and where it ``begun`` (:func:`time.time`) the minutes that it took."""
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "processor": processor(device), **more}
    return found if begun is None else {**found, "minutes": round((time.time() - begun) / 60, 1)}


def leave(asked: argparse.Namespace, rows: Rows, head: dict[str, Any], show: Callable[[], None]) -> None:
    """Write ``rows`` under ``head`` where ``--out`` says, and print them: as JSON, or as ``show`` does."""
    if asked.out is not None:
        keep(asked.out, {**head, "rows": list(rows)})
    if asked.json:
        print(json.dumps(list(rows), indent=1, ensure_ascii=False))
    else:
        show()


def keep(path: Path, record: dict[str, Any]) -> None:
    """Write one JSON object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def processor(device: str = "cpu") -> str:
    """The name of what computes."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    fields = {key.strip(): value.strip() for key, value in pairs}
    name = fields.get("model name", platform.processor())
    flags = fields.get("flags", "").split()
    low_bits, vectors = ("amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16"), ("avx512f", "avx2")
    known = [flag for flag in low_bits if flag in flags] or [flag for flag in vectors if flag in flags][:1]
    return f"{name} ({', '.join(known)})" if known else name
