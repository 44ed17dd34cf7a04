"""Delete runs, and files that no run uses any more: corpora, cached activations, alignments and reports.

A plan is shown first, then carried out in an order that lets the same command finish a killed deletion. Nothing outside
the root is deleted: a link is removed, not its target. The cache of paid answers always stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sae.common.errors import BadInput, NotFound, UserError, suggest
from sae.study.run import Run, all_runs, check_name, split_readable
from sae.study.stage import lock_study

_PAGE_TITLE = b": which latents come back, and what they mean</title>"  # of autointerp/report/html/page.html


@dataclass(frozen=True)
class Part:
    """One file or folder to delete. ``kind``: ``run``, ``alignment``, ``report``, ``corpus`` or ``activations``."""

    kind: str
    path: Path
    n_bytes: int


@dataclass(frozen=True)
class Plan:
    """The parts to delete under ``root``, in order, and sentences about things that stay."""

    root: Path
    parts: list[Part] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        parts = [{"kind": p.kind, "path": str(p.path.relative_to(self.root)), "bytes": p.n_bytes} for p in self.parts]
        return {"parts": parts, "bytes": self.n_bytes, "kept": self.kept}


def plan_deletion(name: str, root: Path) -> Plan:
    """Plan to delete a run, or a study and its controls, with their alignments and HTML reports.

    Raises NotFound if there is none, BadInput if the name is invalid or the folder is a link.
    """
    check_name(name)
    runs, kept = _named(name, root)
    plan = Plan(root, kept=kept, runs=runs)
    names = {run.name for run in runs}
    _add(plan, "alignment", [path for path in _pair_files(root) if names & set(path.stem.split("--"))])
    reports = [root / "reports" / f"{run.name}.html" for run in runs]
    _add(plan, "report", [path for path in reports if _is_report(path)])
    if link := next((run.folder for run in runs if run.folder.is_symlink()), None):
        raise BadInput(f"{str(link)!r} is a link; delete it by hand")
    _add(plan, "run", [run.folder for run in runs])
    return _with_cache_kept(plan)


def plan_pruning(root: Path) -> Plan:
    """Plan to delete the files that no run uses any more."""
    plan = Plan(root)
    every = all_runs(root)
    names = {run.name for run in every}
    _add(plan, "alignment", [path for path in _pair_files(root) if not set(path.stem.split("--")) <= names])
    reports = [path for path in sorted((root / "reports").glob("*.html")) if path.stem not in names]
    _add(plan, "report", [path for path in reports if _is_report(path)])
    runs, damaged = split_readable(every)
    if damaged:
        plan.kept.append(f"all corpora stay, because the corpus of this run is unknown: {next(iter(damaged.values()))}")
        return _with_cache_kept(plan)
    users: dict[str, list[Run]] = {}
    for run in runs:
        users.setdefault(str(run.record["corpus"].get("key")), []).append(run)
    for folder in sorted(path for path in (root / "corpora").glob("*") if path.is_dir()):
        if folder.name not in users:
            _add(plan, "corpus", [folder])
        elif all(run.is_trained and run.stage_path("firing").exists() for run in users[folder.name]):
            _add(plan, "activations", sorted((folder / "activations").glob("*")))
    return _with_cache_kept(plan)


@contextmanager
def lock_runs(root: Path, name: str | None = None) -> Iterator[None]:
    """Hold the locks of a run or study (of all studies by default); raise UserError if a command is running."""
    if name is None:
        runs, studies = all_runs(root), {path.name[1:-5] for path in root.glob(".*.lock")}
    else:
        runs = _named(check_name(name), root)[0]
        studies = {study for run in runs if (study := _study(run))}
    with ExitStack() as locks:
        for study in sorted(studies):
            locks.enter_context(lock_study(root, study))
        for run in runs if name is not None else ():
            lock = run.folder / f".{run.journal_path.name}.lock"  # held by `explain` and `score`
            if lock.is_file():
                try:
                    locks.enter_context(FileLock(lock, timeout=0))
                except Timeout:
                    raise UserError(f"another command explains or scores run {run.name!r}; wait for it") from None
        yield


def delete(plan: Plan) -> None:
    """Delete the parts of a plan; missing ones are skipped."""
    for part in plan.parts:
        if part.kind == "run" and part.path.exists():
            for child in sorted(part.path.iterdir(), key=lambda path: path.name == "run.json"):  # run.json last
                _remove(child)
            part.path.rmdir()
        elif part.kind == "corpus":
            _delete_corpus(part.path)
        else:
            _remove(part.path)


def disk_bytes(path: Path) -> int:
    """Return the disk space of a file or folder, without following links."""
    with suppress(OSError):
        found = path.lstat().st_blocks * 512
        if path.is_dir() and not path.is_symlink():
            found += sum(disk_bytes(child) for child in path.iterdir())
        return found
    return 0


def _named(name: str, root: Path) -> tuple[list[Run], list[str]]:
    """Return the run of this name, else the runs of the study, controls first, and sentences on damaged ones."""
    every = all_runs(root)
    if name in (run.name for run in every) or _is_left_over(root / name):
        return [Run(name, root)], []
    readable, _ = split_readable(every)
    found = [run for run in readable if name in (run.study, _of_study(run))]
    if not found:
        known = sorted({run.name for run in every} | {_study(run) for run in every} - {""})
        hint = f"did you mean {suggest(name, known)}?" if known else "there are no runs"
        raise NotFound(f"no run and no study under {str(root)!r} is called {name!r}; {hint}")
    damaged = sorted(run.name for run in every if run not in readable and run.name.startswith(f"{name}_"))
    kept = [f"run {other} stays, because its run.json is damaged; `--delete {other}` deletes it" for other in damaged]
    return sorted(found, key=lambda run: (run.study == name, len(run.name), run.name)), kept


def _is_left_over(folder: Path) -> bool:
    """Return whether a folder is the rest of a killed deletion: empty, or only temporary files."""
    return folder.is_dir() and not folder.is_symlink() and all(f.name.startswith(".") for f in folder.iterdir())


def _study(run: Run) -> str:
    """Return the run's study, from its name if the record is damaged."""
    try:
        return run.study
    except (BadInput, OSError):
        return run.name.rpartition("_")[0]


def _of_study(run: Run) -> str:
    """Return the study that the run belongs to; for a control, the study of its parent."""
    try:
        return run.parent_study
    except BadInput:  # settings of another version
        return run.study


def _pair_files(root: Path) -> list[Path]:
    folder = root / "alignments"
    files = [*folder.glob("*--*"), *(folder / "behaviour").glob("*--*")]
    return sorted(path for path in files if path.suffix in (".parquet", ".json") and not path.name.startswith("."))


def is_page(path: Path) -> bool:
    """Return whether a file is an HTML report of this program."""
    return path.is_file() and _PAGE_TITLE in path.read_bytes()


def _is_report(path: Path) -> bool:
    """Return whether a page is this program's report of the run that the file is named after."""
    is_ours = not path.is_symlink() and is_page(path)
    return is_ours and f"Latents of <bdi>{path.stem}</bdi>".encode() in path.read_bytes()


def _add(plan: Plan, kind: str, paths: Sequence[Path]) -> None:
    """Add parts, except those that a link leads to outside the root."""
    for path in paths:
        if path.parent.resolve().is_relative_to(plan.root.resolve()):
            plan.parts.append(Part(kind, path, disk_bytes(path)))
        else:
            plan.kept.append(f"{path} stays, because it is outside {plan.root}")


def _with_cache_kept(plan: Plan) -> Plan:
    if (plan.root / "cache.sqlite").is_file():
        plan.kept.append("cache.sqlite stays: it holds paid answers of language models")
    return plan


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _delete_corpus(folder: Path) -> None:
    """Delete a corpus that no command is making: its record first, so that the rest is never taken for a corpus."""
    if folder.is_symlink():
        folder.unlink()
        return
    try:
        with FileLock(folder / ".lock", timeout=0):
            (folder / "corpus.json").unlink(missing_ok=True)
            for child in folder.iterdir():
                if child.name != ".lock":
                    _remove(child)
    except Timeout:
        raise UserError(f"another command is making corpus {folder.name}; wait for it, then run this again") from None
    shutil.rmtree(folder)
