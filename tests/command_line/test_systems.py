"""Linux and macOS are supported, Windows is refused in one line.

The tests run on one system only, so the other is imitated: what it lacks is hidden.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cli as program

REPOSITORY = Path(program.__file__).parent

ON_WINDOWS = """
import runpy, sys
sys.platform = "win32"
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.argv[0] = "cli.py"
"""

ON_MACOS = """
import ctypes, os, resource, sys
from pathlib import Path
import datasets, numba, openai, pandas, torch, transformers  # what they do on macOS is theirs to know
for name in ("posix_fallocate", "posix_fadvise", "sched_getaffinity", "memfd_create", "pidfd_open", "copy_file_range"):
    vars(os).pop(name, None)
sys.platform = "darwin"
def only_on_macos(event, arguments):
    if event == "open" and str(arguments[0]).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])
sys.addaudithook(only_on_macos)
ctypes.CDLL = None  # no prctl
torch.backends.cpu.get_cpu_capability = lambda: "DEFAULT"  # Apple silicon
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize("start", ["runpy.run_path('cli.py')", "runpy.run_module('autointerp', run_name='__main__')"])
def test_windows_is_refused_in_one_line(start: str) -> None:
    ran = python(ON_WINDOWS + start, "--help")
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert "WSL" in line


@pytest.mark.parametrize("threads", ["0", "00", "x", "-1", "1.5", ""])
def test_a_bad_number_of_threads_is_refused(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", threads)
    ran = python("import runpy; runpy.run_path('cli.py', run_name='__main__')", "--help")
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: NUMBA_NUM_THREADS must be a whole number")


@pytest.mark.parametrize("imported", ["import sae", "import sae.study.run", "from autointerp import Run"])
def test_an_import_on_windows_says_why(imported: str) -> None:
    refused = python(ON_WINDOWS + imported)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("ImportError: this program runs on Linux and macOS; on Windows")


def test_a_study_needs_nothing_that_macos_lacks(recipe: Path, tmp_path: Path) -> None:
    """Training, the activation cache, the firing store, the journal with its lock, and memory figures."""
    code = f"""{ON_MACOS}
sys.path.insert(0, "tests")
from tiny_study import cli
from autointerp.llm.local.server import choose_cache_gib
from sae.common.memory import free_host_bytes
from sae.common.progress import peak_memory_bytes
recipe, root = sys.argv[1:]
assert free_host_bytes() is None
assert choose_cache_gib(None, 1 << 30) >= 1
assert peak_memory_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "bytes on macOS"
cli("train", "--recipe", recipe, "--seeds", 0, 1, "--no-controls", "--activation-cache", "1M", "--root", root).well()
cli("align", "--no-nulls", "--root", root).well()
cli("explain", "--latents", 3, "--root", root).well()
cli("score", "--root", root).well()
print("done")
"""
    ran = python(code, recipe, tmp_path / "runs")
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


def test_the_keeper_of_a_server_runs_without_prctl() -> None:
    code = f"""{ON_MACOS}
from autointerp.llm.local import keeper
sys.exit(keeper.main(os.getppid(), 1.0, [sys.executable, "-c", "raise SystemExit(7)"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE) as process:
        assert process.wait(120) == 7
