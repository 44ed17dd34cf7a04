"""The commands of the pages: whether they exist, and how they are run small, against stand-ins that anyone can see."""

from __future__ import annotations

import contextlib
import io
import shlex
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import typer.main
from doc_pages import REPOSITORY, SHELL, Block
from tiny_study import Ran, cli

import cli as program
from autointerp.command_line.values import spread_lists

SMALL = "--context 128 --num-latents 128 --k 2 --tokens 30k --batch-tokens 1024"

STAND_INS = {
    "EleutherAI/pythia-160m": "{model}",
    "layers.6.mlp": "layers.2.mlp",
    "~/my-model": "{model}",
    "~/corpus/": "{texts}",
    "--num-latents 8192 --k 32 --tokens 50M": SMALL,
    "--context 128 --num-latents 2048 --k 8 --tokens 4M": SMALL,
    "--latents 300": "--latents 3",
    "--latents 100": "--latents 3",
    "http://127.0.0.1:8000/v1": "{server}",
    "~/saes/seed_0": "eval_runs/run_a",
    "~/saes/seed_1": "eval_runs/run_b",
}
"""What stands in a page → what is run in its place: the bundled model, a few files, a few latents, a made-up server."""

_OTHERS = {".venv/bin/pre-commit": None, "pip": None, "git": None, "cd": None, "uv": None, "torchrun": "cli.py"}
"""Programs of others, and behind which of their words a command of ours begins."""


def words_of(line: str) -> list[str]:
    """A command without comment, dots that stand for more, and settings of the environment."""
    words = [word for word in shlex.split(line, comments=True) if word != "…"]
    while words and "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    return words


def ours(line: str) -> list[str] | None:
    """What follows ``python cli.py`` in a command, ``None`` where it is not that program's.

    Raises AssertionError for a command that nobody could check.
    """
    words = words_of(line)
    if not words:
        return None
    if words[0] == "make":
        targets = {t.split(":")[0] for t in (REPOSITORY / "Makefile").read_text().splitlines() if ":" in t}
        assert set(words[1:]) <= targets, f"no such target: {line}"
        return None
    if words[:2] == ["python", "cli.py"]:
        return words[2:]
    if words[0] == "python":
        assert (REPOSITORY / words[1]).is_file(), f"no such script: {line}"
        return None
    assert words[0] in _OTHERS, f"not a command that this test knows: {line}"
    begins = _OTHERS[words[0]]
    return words[words.index(begins) + 1 :] if begins in words else None


def check(arguments: Sequence[str], line: str) -> None:
    """Raise AssertionError where ``cli.py`` has no such command, flag or value; missing ones may be meant by dots."""
    commands: dict[str, Any] = typer.main.get_command(program.app).commands  # type: ignore[attr-defined]
    assert arguments, line
    if arguments[0] == "--help":
        return
    assert arguments[0] in commands, f"no command {arguments[0]!r}: {line}"
    command = commands[arguments[0]]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for word in (word for word in arguments[1:] if " " not in word):  # what has one is somebody else's flags, in quotes
        flag = word.split("=")[0]
        assert not flag.startswith("-") or flag in known or flag[1:2].isdigit(), f"no flag {flag}: {line}"
    if "…" not in line and "--help" not in arguments:
        command.make_context(arguments[0], spread_lists(list(arguments))[1:])


def flags() -> set[str]:
    """Every flag of every command."""
    commands: dict[str, Any] = typer.main.get_command(program.app).commands  # type: ignore[attr-defined]
    found = (f for command in commands.values() for p in command.params for f in (*p.opts, *p.secondary_opts))
    return {"--help", *found}


@dataclass
class Reader:
    """Does what the pages say, in the working folder."""

    values: Mapping[str, str]
    """of the names in braces among the stand-ins"""
    used: set[str] = field(default_factory=set)
    """the stand-ins that were needed"""
    ran: list[tuple[Block, str, Ran]] = field(default_factory=list)

    def stood_in(self, text: str) -> str:
        for written, stand_in in STAND_INS.items():
            if written in text:
                self.used.add(written)
                text = text.replace(written, stand_in.format(**self.values))
        return text

    def read(self, block: Block, names: dict[str, Any]) -> None:
        """Run a block: its commands, or its Python in the page's ``names``. Others are left alone."""
        if block.not_run is not None:
            return
        if block.language == "python":
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                try:
                    exec(compile(self.stood_in(block.text), block.place, "exec"), names)
                except Exception:
                    raise AssertionError(f"{block.place}\n{traceback.format_exc()}") from None
        if block.language not in SHELL:
            return
        for line in block.commands():
            arguments = ours(self.stood_in(line))
            assert arguments is not None, f"{block.place}: {line!r} cannot be run here; mark it <!-- not run: … -->"
            ran = cli(*arguments)
            self.ran.append((block, line, ran))
            assert ran.code == block.code, f"{block.place}: {line}\nexit code {ran.code}\n{ran.out}\n{ran.err}"
