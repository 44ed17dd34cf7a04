"""``--vllm``: a real vLLM server as the child of a command, on the bundled model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_vllm import command, trained
from vllm_server import EAGER

from autointerp.journal.journal import Journal
from sae.study.run import Run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]


def processes_of(root: Path) -> list[str]:
    """The command lines of all processes that say they work for a server with its log under ``root``."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            opened = {str(link.readlink()) for link in (folder / "fd").iterdir()} if folder.name.isdigit() else set()
            if any(name.startswith(str(root / "logs")) for name in opened):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def test_a_vllm_child_explains_judges_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm-cache"))
    run = trained(tmp_path / "runs")
    # Explained by n-grams alone: a small model may fail at all of it, and beside it n-grams judge their own.
    judged = Run.open("run_a", Path(shutil.copytree(run.root, tmp_path / "judged" / "runs")))
    served = ("--vllm", "bundled", "--vllm-args", EAGER)
    chosen = ("--sae", "run_a", "--latents", 4)
    code, found, said = command(run.root, "explain", *chosen, *served)
    assert code == (3 if found["n_failed"] else 0), said
    assert found["n_done"] + found["n_failed"] == 4
    name = found["backend"].removeprefix("llm (").removesuffix(")")
    assert name.startswith("pystdlib-4m-")
    assert f"vLLM serves {name} after " in said
    (log,) = (run.root / "logs").glob("vllm-*.log")
    assert "Application startup complete" in log.read_text()
    assert "POST /v1" not in log.read_text(), "it does not grow with the questions"
    assert not processes_of(run.root)
    with Journal(run.journal_path) as journal:
        usage = journal.usage().set_index("stage").loc["explain"]
        assert set(journal.explanations(explainer="llm")["model"]) == {name}
    assert usage["requests"] >= 4
    assert usage["cached_tokens"] > 0, "prompts begin alike, and the server says what it had read before"

    if not found["n_failed"]:
        code, found, said = command(run.root, "explain", *chosen, *served)
        assert (code, found["n_new"]) == (0, 0)
        assert "vLLM serves" not in said

    assert command(judged.root, "explain", *chosen, "--explainer", "ngram")[0] == 0
    code, found, said = command(judged.root, "score", *served, "--protocol", "single", "--control-latents", 1)
    assert code == (3 if found["n_failed"] else 0), said
    assert said.count("vLLM serves") == 1
    with Journal(judged.journal_path) as journal:
        verdicts = journal.verdicts()
    assert set(verdicts["model"]) == {name}
    assert verdicts["p"].notna().any()
    assert not processes_of(judged.root)
