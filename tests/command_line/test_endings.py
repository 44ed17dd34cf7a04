"""How a command ends if its output, its folder or the system fails it: one line, exit code 1, nothing more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def shell(script: str, root: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``script``, in which ``$RUN`` is the program and ``$ROOT`` the folder of a finished study."""
    (cwd or root).mkdir(exist_ok=True)
    known = {"RUN": f"{sys.executable} {REPOSITORY / 'cli.py'}", "ROOT": str(root), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, **known},
        cwd=cwd or root,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("$RUN runs --root $ROOT > /dev/full", "no space left"),
        ("$RUN show --latent 3 --json --root $ROOT > /dev/full", "no space left"),
        ("$RUN runs --root $ROOT >&-", "standard output is closed"),
        ("$RUN runs --delete run --json --root $ROOT <&-", "nothing was deleted"),
        ("mkdir gone; cd gone; rmdir ../gone; $RUN train --root x", "the current folder"),
        (
            "ulimit -f 1; $RUN export --sae run_a --table scores --format csv --to big.csv --root $ROOT",
            "the disk is full",
        ),
    ],
)
def test_a_failing_system_is_one_line(script: str, words: str, root: Path) -> None:
    ran = shell(script, root)
    assert ran.returncode == 1, ran
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize("command", ["runs", "report --json", "--help"])
def test_a_reader_that_leaves_ends_quietly(command: str, root: Path) -> None:
    ran = shell(f"$RUN {command} {'' if command == '--help' else '--root $ROOT'} | true", root)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_no_columns_still_print(root: Path) -> None:
    ran = shell("COLUMNS=0 $RUN runs --root $ROOT", root)
    assert "run_a" in ran.stdout
