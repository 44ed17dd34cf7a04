"""A checkpoint that brings Python code of its own: it runs only with ``--trust-remote-code``, and nobody is asked."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from autointerp.llm.tokens import load_local_tokenizer
from sae.activations.subject import Subject, load_tokenizer
from sae.common.errors import BadInput

MAPS: dict[str, Any] = {
    "config": {"AutoConfig": "evil.EvilConfig"},
    "model": {"AutoModel": "evil.EvilModel"},
    "both": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel", "AutoTokenizer": ["evil.T", "evil.T"]},
    "of another repository": {"AutoConfig": "nobody/evil--evil.EvilConfig", "AutoModel": "nobody/evil--evil.EvilModel"},
}


class Evil:
    """A copy of a checkpoint with code in it, which writes ``marker`` if it is ever run."""

    def __init__(self, folder: Path, marker: Path) -> None:
        self.folder, self.marker = folder, marker

    def edit(self, file: str, **values: Any) -> Evil:
        path = self.folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return self


@pytest.fixture
def evil(tiny_neox_dir: Path, tmp_path: Path) -> Evil:
    marker = tmp_path / "the code was run"
    folder = Path(shutil.copytree(tiny_neox_dir, tmp_path / "model"))
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nclass EvilConfig: pass\nclass EvilModel: pass\n"
    )
    return Evil(folder, marker)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Questions at the terminal, each of which would be answered with yes."""
    questions: list[str] = []

    def answer(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return questions


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(BadInput) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in (*parts, "its own Python code", "is not run", "part of transformers"):
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", MAPS)
def test_code_of_an_unknown_model_is_refused(kind: str, evil: Evil, asked: list[str]) -> None:
    evil.edit("config.json", model_type="evil", auto_map=MAPS[kind])
    refused(lambda: Subject.load(str(evil.folder)), str(evil.folder), "its model", "config.json")
    assert (asked, evil.marker.exists()) == ([], False)


def test_a_known_configuration_without_model_class_is_refused(evil: Evil, asked: list[str]) -> None:
    kind = next(name for name in CONFIG_MAPPING if CONFIG_MAPPING[name] not in MODEL_MAPPING)
    evil.edit("config.json", model_type=kind, auto_map=MAPS["model"])
    refused(lambda: Subject.load(str(evil.folder)), str(evil.folder), "its model")
    assert (asked, evil.marker.exists()) == ([], False)


@pytest.mark.parametrize("kind", MAPS)
def test_transformers_own_class_is_used(kind: str, evil: Evil, tiny_neox_dir: Path, asked: list[str]) -> None:
    evil.edit("config.json", auto_map=MAPS[kind])
    loaded = Subject.load(str(evil.folder))
    assert type(loaded.model).__module__.startswith("transformers.")
    assert loaded.hookpoints() == Subject.load(str(tiny_neox_dir)).hookpoints()
    assert (asked, evil.marker.exists()) == ([], False)


def test_a_damaged_configuration_is_called_damaged(evil: Evil) -> None:
    evil.edit("config.json", auto_map=MAPS["both"], hidden_size="wide")
    with pytest.raises(BadInput, match=r"no usable config\.json") as caught:
        Subject.load(str(evil.folder))
    assert "Python code" not in str(caught.value)


def test_code_of_a_tokenizer_is_not_run(evil: Evil, asked: list[str], tiny_neox_dir: Path) -> None:
    """With a tokenizer.json transformers' own class reads it; without, and of an unknown model, there is none."""
    evil.edit(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="EvilTokenizer"
    )
    assert load_tokenizer(str(evil.folder))[1] == load_tokenizer(str(tiny_neox_dir))[1]
    assert Subject.load(str(evil.folder)).source == str(evil.folder)
    load_local_tokenizer(str(evil.folder))
    evil.edit("config.json", model_type="evil", auto_map=MAPS["both"])
    refused(lambda: load_tokenizer(str(evil.folder)), str(evil.folder), "its tokenizer", "tokenizer_config.json")
    assert load_local_tokenizer(str(evil.folder)) is None
    assert (asked, evil.marker.exists()) == ([], False)


@pytest.mark.parametrize("value", ["evil.EvilConfig", ["evil.EvilConfig"], {"AutoConfig": 3}, {"AutoConfig": None}, 7])
def test_auto_map_of_wrong_shape_is_one_line(value: Any, evil: Evil, asked: list[str]) -> None:
    for file, values in (("config.json", {"model_type": "evil"}), ("tokenizer_config.json", {})):
        evil.edit(file, auto_map=value, **values)
        with pytest.raises(BadInput) as caught:
            Subject.load(str(evil.folder))
        assert "\n" not in str(caught.value)
    assert (asked, evil.marker.exists()) == ([], False)


@pytest.mark.parametrize("stdin", ["terminal", "closed"])
def test_no_question_reaches_a_terminal(stdin: str, evil: Evil, tmp_path: Path) -> None:
    """The command itself, at a terminal on which yes is already typed, and with no standard input at all."""
    evil.edit("config.json", model_type="evil", auto_map=MAPS["both"])
    command = [sys.executable, "cli.py", "train", "--name", "x", "--model", str(evil.folder), "--hookpoint", "layers.1"]
    command += ["--seeds", "0", "--text", str(Path(__file__).parent), "--root", str(tmp_path / "runs")]
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"y\ny\ny\n")
        ran = subprocess.run(
            command if stdin == "terminal" else ["sh", "-c", 'exec "$@" <&-', "sh", *command],
            stdin=theirs,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[3],
            timeout=600,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert ran.returncode == 1, ran.stderr
    assert "is not run" in ran.stderr
    assert "y/N" not in ran.stdout + ran.stderr
    assert not evil.marker.exists()


REMOTE = """
from transformers import GPTNeoXConfig, GPTNeoXModel

class EvilConfig(GPTNeoXConfig):
    model_type = "evil"

class EvilModel(GPTNeoXModel):
    config_class = EvilConfig
"""


def test_code_runs_for_those_who_trust_it(evil: Evil, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = evil.folder / "evil.py"
    code.write_text(code.read_text().splitlines()[0] + REMOTE)
    evil.edit("config.json", model_type="evil", auto_map={**MAPS["config"], **MAPS["model"]})
    loaded = Subject.load(str(evil.folder), trust_remote_code=True)
    assert type(loaded.model).__name__ == "EvilModel"
    assert evil.marker.exists()
    code.write_text(code.read_text() + "# changed\n")
    assert Subject.load(str(evil.folder), trust_remote_code=True).fingerprint != loaded.fingerprint
