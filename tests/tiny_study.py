"""A whole study in seconds: made-up sentences, a recipe for a tiny subject model, and the commands as a user has them.

The hookpoint is a normalised token embedding, so latents stand for words: some are found by every seed, contexts
are plentiful, and the n-gram baseline has something to say.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd

import cli as program
from autointerp.journal.journal import Journal
from sae.common.records import write_record
from sae.settings import Settings
from sae.study.harvest import harvest_runs
from sae.study.run import Run, Study
from sae.study.stage import Compute
from sae.study.train import train_studies

HOOKPOINT = "layers.1.input_layernorm"
NUM_LATENTS, K = 64, 2
VOCABULARY = """the a one two dog fox cat import def return class self value name for in while if not print add(a, b)
items.items() point.x print(name) lazy dictionary trained again shared features brown quick jumps over state"""


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        (line,) = self.out.splitlines()
        found: dict[str, Any] = json.loads(line)
        assert found["schema"] == 1
        return found

    def well(self) -> Ran:
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def failed_in_one_line(self, *words: object, code: int = 1) -> str:
        """The error: one line on standard error that holds all of ``words``, the same in the JSON object if any."""
        assert self.code == code, f"exit code {self.code}\n{self.out}\n{self.err}"
        *before, line = self.err.splitlines()
        assert line.startswith("error: "), self.err
        assert not any("error" in earlier or "Traceback" in earlier for earlier in before), self.err
        for word in words:
            assert str(word) in line, line
        assert not self.out or self.json == {"schema": 1, "error": line.removeprefix("error: ")}
        return line


def cli(*arguments: object) -> Ran:
    """``python cli.py …`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["cli.py", *(str(a) for a in arguments)]
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            program.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def write_texts(folder: Path, n_lines: int = 500) -> Path:
    """Two files of made-up sentences, about 12 tokens a line."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for name in ("one.txt", "two.md"):
        lines = (" ".join(rng.choices(VOCABULARY.split(), k=rng.randint(3, 9))) for _ in range(n_lines))
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def write_recipe(path: Path, model: Path, texts: Path, **training: object) -> Path:
    """A recipe for a study of ``model`` on ``texts``; ``training`` replaces values of that table."""
    values = {
        "num_latents": NUM_LATENTS,
        "k": K,
        "tokens": 16_000,
        "batch_tokens": 256,
        "learning_rate": 5e-3,
        "warmup_steps": 5,
        "checkpoint_steps": 10,
        **training,
    }
    lines = [
        *("[subject]", f'model = "{model}"', f'hookpoint = "{HOOKPOINT}"', 'dtype = "float32"'),
        *("[corpus]", 'kind = "text"', f'source = ["{texts}"]', "context = 32"),
        *("[training]", *(f"{key} = {value}" for key, value in values.items())),
        *("[harvest]", "window = 8"),
        *("[contexts]", "n_explain = 12", "n_active = 10", "n_inactive = 10", "n_strata = 2"),
        *("min_explain = 4", "min_active = 6"),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def harvested_study(
    root: Path, model: Path, *, num_latents: int = 32, controls: bool = False, **contexts: int
) -> list[Run]:
    """One run of a made-up model on the source of a module, trained and harvested; its control SAEs too if asked for.

    ``contexts`` are values of that table of settings. Returns the run, and the controls after it.
    """
    settings = Settings().with_values(
        subject={"model": str(model), "hookpoint": "layers.1.mlp", "dtype": "float32"},
        corpus={"kind": "text", "source": (argparse.__file__,), "context": 64},
        training={"num_latents": num_latents, "k": 4, "tokens": 20_000, "batch_tokens": 1024},
        harvest={"tokens": 30_000},
        contexts=contexts,
    )
    (runs,) = train_studies([Study("run", settings, (0,))], root, Compute("cpu", 1), controls=controls)
    harvest_runs(runs, Compute("cpu", 1))
    return runs


def change_record(path: Path, **values: object) -> None:
    """Change values of a record as the program would write it, with a digest that fits."""
    record = json.loads(path.read_text())
    write_record(path, {key: value for key, value in record.items() if key != "digest"} | values)


def tree(root: Path, *, under: str = "*") -> dict[str, str]:
    """Hashes of the files below ``root`` by path; left out are locks, SQLite files and remembered hashes of text
    files (only of those that are old enough), which may differ."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for top in sorted(root.glob(under))
        for path in ([top] if top.is_file() else sorted(top.rglob("*")))
        if path.is_file() and ".sqlite" not in path.name and not path.name.endswith((".lock", "hashes.json"))
    }


def journal(path: Path, *, times: bool = False) -> dict[str, list[dict[str, Any]]]:
    """The rows of a journal's explanations and verdicts, without times unless asked for."""
    with Journal(path) as opened:
        tables = {"explanation": opened.explanations(), "verdict": opened.verdicts()}
    left_out = [] if times else ["created"]
    return {name: records(table.drop(columns=left_out)) for name, table in tables.items()}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows that can be compared: a NaN, which equals nothing, becomes ``None``."""
    plain = table.astype(object)
    return [{str(k): v for k, v in row.items()} for row in plain.where(plain.notna(), None).to_dict("records")]
