"""Read the source files of the Python standard library: a corpus that every machine has.

A committed manifest lists the files of one Python version, each with its SHA-256. Tests and the generated character
maps of ``encodings/`` are excluded.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MANIFEST = Path(__file__).with_name("stdlib_manifest.json")

_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "ensurepip"})
_GENERATED_MARKS = ("gencodec.py", "Python Character Mapping Codec")
_HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class StdlibFile:
    """A library file: its path below the library's root, and whether its bytes match the manifest."""

    path: str
    text: str
    as_listed: bool

    @property
    def is_held_out(self) -> bool:
        """Whether the bundled model's training skips the file: one in twenty, by a hash of the path."""
        return hashlib.sha256(self.path.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def write_manifest(path: Path = MANIFEST) -> int:
    """Write the manifest of this Python's library. Returns the number of files."""
    root = stdlib_root()
    files: dict[str, str] = {}
    for relative in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        *folders, name = relative.split("/")
        if any(part in _SKIPPED or part.startswith("config-") for part in folders):
            continue
        if name.startswith("_sysconfigdata"):  # contains paths of the build machine
            continue
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


def read_stdlib() -> tuple[list[StdlibFile], list[str]]:
    """Return the files of the manifest, in its order, and the paths that this Python's library does not have."""
    listed: dict[str, str] = json.loads(MANIFEST.read_text())["files"]
    files, missing = [], []
    for relative, digest in listed.items():
        try:
            data = (stdlib_root() / relative).read_bytes()
            files.append(StdlibFile(relative, data.decode(), hashlib.sha256(data).hexdigest() == digest))
        except (OSError, UnicodeDecodeError):
            missing.append(relative)
    return files, missing
