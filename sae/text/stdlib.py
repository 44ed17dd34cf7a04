"""The text of the Python standard library: a corpus that is on every machine that can run this program.

The library differs a little between Python versions, so a committed manifest names the files that are
read, each with the SHA-256 of its bytes where the manifest was made. On another Python the same paths
are read, those that are gone are left out, and :class:`StdlibText` says how many files match.

Left out: tests (they repeat themselves and dwarf the library) and the character maps of
``encodings/``, which a generator wrote: tables of hexadecimal numbers, not text.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MANIFEST = Path(__file__).with_name("stdlib_manifest.json")

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "ensurepip"}
)
_GENERATED_MARKS = ("gencodec.py", "Python Character Mapping Codec")
_HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class StdlibFile:
    """One library file that was read: its path below the library's root, its text, and whether its
    bytes are those of the manifest."""

    path: str
    text: str
    held_out: bool
    as_listed: bool


@dataclass(frozen=True)
class StdlibText:
    """The files read, in the manifest's order, and the paths that this Python lacks."""

    files: tuple[StdlibFile, ...]
    missing: tuple[str, ...]

    @property
    def n_changed(self) -> int:
        return sum(not f.as_listed for f in self.files)


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(path: str) -> bool:
    """Whether the file is kept from the subject model's training: one in twenty, by a hash of the path,
    so that neither its content nor the file order has a say."""
    return hashlib.sha256(path.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def _listable(root: Path) -> list[str]:
    paths = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        folders = relative.parts[:-1]
        if any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in folders):
            continue
        if relative.name.startswith("_sysconfigdata"):  # holds the build machine's paths
            continue
        paths.append(relative.as_posix())
    return sorted(paths)


def write_manifest(path: Path = MANIFEST) -> int:
    """Write the manifest from the running interpreter's library. Returns the number of files listed."""
    root = stdlib_root()
    files: dict[str, str] = {}
    for relative in _listable(root):
        data = (root / relative).read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        generated = relative.startswith("encodings/") and any(m in text[:600] for m in _GENERATED_MARKS)
        if text.strip() and not generated:
            files[relative] = hashlib.sha256(data).hexdigest()
    manifest = {"schema": 1, "python": ".".join(sysconfig.get_python_version().split(".")[:2]), "files": files}
    path.write_text(json.dumps(manifest, indent=0) + "\n")
    return len(files)


def read_stdlib(root: Path | None = None) -> StdlibText:
    """Read every file of the manifest that the running interpreter's library has."""
    root = root or stdlib_root()
    listed: dict[str, str] = json.loads(MANIFEST.read_text())["files"]
    files, missing = [], []
    for relative, digest in listed.items():
        try:
            data = (root / relative).read_bytes()
            text = data.decode()
        except (OSError, UnicodeDecodeError):
            missing.append(relative)
            continue
        same = hashlib.sha256(data).hexdigest() == digest
        files.append(StdlibFile(relative, text, is_held_out(relative), same))
    return StdlibText(tuple(files), tuple(missing))
