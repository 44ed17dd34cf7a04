"""What is served, under which name, by which interpreter: known before anything is started, or refused in one line."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
from fake_vllm_python import FakeVllm
from hypothesis import given
from hypothesis import strategies as st

from autointerp.llm.local import model as vllm_model
from autointerp.llm.local.model import VllmModel, find_model, find_python, split_arguments
from autointerp.llm.local.server import OneServer, open_server
from autointerp.llm.options import VLLM_TIMEOUT, LlmOptions
from sae.activations.bundled import BUNDLED
from sae.common.errors import BadInput, NotFound, Unavailable
from sae.common.hub import OnHub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like a checkpoint."""
    made = tmp_path / "trained" / "final"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "tokenizer_config.json").write_text('{"chat_template": "a"}')
    (made / "model.safetensors").write_bytes(bytes(3_000_000))
    return made


# --- the model's name -------------------------------------------------------------------------------------------


def test_the_bundled_model_has_its_own_name() -> None:
    found = find_model("bundled")
    assert found.place == str(BUNDLED)
    assert found.name.startswith("pystdlib-4m-")
    assert found == find_model(str(BUNDLED))


def test_a_folder_format_is_recognised_by_its_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_model(str(folder))
    assert found.name.startswith("final-")
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "final"))
    assert find_model(str(copy)).name == found.name
    link = tmp_path / "newest"
    link.symlink_to(copy)
    assert find_model(str(link)).name == found.name
    monkeypatch.chdir(copy.parent)
    assert find_model("final") == dataclasses.replace(found, place=str(copy))


@pytest.mark.parametrize("what", ["config.json", "tokenizer_config.json", "model.safetensors", "new.jinja"])
def test_equal_folder_names_do_not_mix_models(what: str, folder: Path) -> None:
    """Two fine-tunings of one model have the same configuration, and more."""
    before = find_model(str(folder)).name
    changed = folder / what
    if what == "model.safetensors":
        changed.write_bytes(bytes(2_999_999) + b"\x01")
    else:
        changed.write_text('{"chat_template": "b"}')
    assert find_model(str(folder)).name != before


def test_notes_beside_a_model_do_not_rename_it(folder: Path) -> None:
    before = find_model(str(folder)).name
    (folder / "README.md").write_text("notes")
    (folder / "trainer_state.json").write_text("{}")
    assert find_model(str(folder)).name == before


def test_a_name_on_the_hub_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def on_hub(name: str, _: object) -> OnHub:
        asked.append(name)
        return OnHub(name.partition("@")[0], "c0ffee", offline="cached" in name)

    monkeypatch.setattr(vllm_model, "find_on_hub", on_hub)
    assert find_model("some/model") == VllmModel("some/model", "some/model", None, is_local=False)
    found = find_model("some/cached@v2")
    assert found == VllmModel("some/cached", "some/cached@v2", "v2", is_local=True)
    assert found.list_words() == ["--model", "some/cached", "--revision", "v2"]
    assert asked == ["some/model", "some/cached@v2"]


def test_arguments_that_change_answers_change_the_name(folder: Path) -> None:
    plain = find_model(str(folder)).name
    for same in ("--max-model-len 4096", "-tp 2 --gpu_memory_utilization=0.5", "--enforce-eager"):
        assert find_model(str(folder), same).name == plain
    names = {
        find_model(str(folder), other).name
        for other in ("--quantization fp8", "--quantization awq", "--dtype float32 --max-model-len 64", "--seed -1")
    }
    assert len(names) == 4
    assert all(name.startswith(f"{plain}+") for name in names)
    assert find_model(str(folder), "--dtype float32").name in names, "what changes nothing is not in the name"
    assert find_model(str(folder), "--quantization fp8", "mine").name == "mine"


# --- what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./none", "/none", "a/b/c", "", "~/none/there"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(NotFound, match="does not exist; give a model's folder, a hub name or 'bundled'"):
        find_model(name)


def test_a_folder_that_is_no_model(folder: Path) -> None:
    with pytest.raises(BadInput, match="is a file"):
        find_model(str(folder / "config.json"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="holds no weights"):
        find_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match=r"it has no config\.json"):
        find_model(str(folder))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--max-model-len '4", "cannot be read"),
        ("4096", "'4096' is not an option"),
        ("--host 0.0.0.0", "must not hold --host"),
        ("--ho 0.0.0.0", "must not hold --ho"),
        ("--enforce-eager --port=80", "must not hold --port"),
        ("--served_model_name x", "must not hold --served-model-name"),
        ("--api-key sk-secret", "must not hold --api-key"),
        ("--hf-token=hf_secret", "set HF_TOKEN in the environment"),
        ("--model x", "must not hold --model"),
    ],
)
def test_arguments_that_are_not_the_users(given: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as error:
        split_arguments(given)
    assert "secret" not in str(error.value)


words = st.text("abc '\"$-=0_", min_size=1, max_size=6)


@given(st.lists(words, max_size=4))
def test_arguments_are_those_of_a_shell(found: list[str]) -> None:
    asked = ["-O", *found]
    assert split_arguments(shlex.join(asked)) == tuple(asked)


# --- the interpreter --------------------------------------------------------------------------------------------


def test_the_interpreter_that_was_named_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (FakeVllm(tmp_path / str(n)).python for n in range(3))
    monkeypatch.setattr(vllm_model, "OWN_PYTHON", third)
    named = {"AUTOINTERP_VLLM_PYTHON": str(second)}
    assert find_python(first, named) == first
    assert find_python(None, named) == second
    assert find_python(None, {}) == third
    monkeypatch.setenv("PATH", str(first.parent))
    assert find_python(Path(first.name), {}) == first


def test_an_interpreter_without_vllm_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_model, "OWN_PYTHON", tmp_path / "none")
    told = r"vLLM is not installed in .* run `make vllm`, or name an interpreter that has it with --vllm-python"
    with pytest.raises(Unavailable, match=told):
        find_python(None, {})
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    with pytest.raises(Unavailable, match=told):
        find_python(link, {})
    for origin, named, values in (
        ("--vllm-python", tmp_path / "no", {}),
        ("AUTOINTERP_VLLM_PYTHON", None, {"AUTOINTERP_VLLM_PYTHON": "/no/python"}),
    ):
        with pytest.raises(NotFound, match=f"{origin} .* is not a program"):
            find_python(named, values)


def test_program_that_is_no_interpreter_has_no_vllm(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    with pytest.raises(Unavailable, match="not installed"):
        find_python(broken, {})


# --- what the options ask for -----------------------------------------------------------------------------------


def test_explainer_and_judge_each_have_their_place() -> None:
    both = LlmOptions(vllm="a", model="called", judge_vllm="b", judge_model="other")
    assert (both.for_judge().vllm, both.for_judge().model) == ("b", "other")
    assert both.is_named
    same = LlmOptions(vllm="a", model="called")
    assert (same.for_judge().vllm, same.for_judge().model) == ("a", "called")
    mixed = LlmOptions(vllm="a", judge_url="http://b", judge_model="m").for_judge()
    assert (mixed.vllm, mixed.url, mixed.model) == (None, "http://b", "m")
    mixed = LlmOptions(url="http://a", model="m", judge_vllm="b").for_judge()
    assert (mixed.vllm, mixed.url, mixed.model) == ("b", None, None)
    alone = LlmOptions(judge_vllm="b")
    assert not alone.is_named
    assert alone.for_judge().is_named


def test_two_places_for_one_are_refused() -> None:
    with pytest.raises(BadInput, match="--vllm starts a server, --llm-url names one"):
        LlmOptions(vllm="a", url="http://b")
    with pytest.raises(BadInput, match="--judge-vllm starts a server, --judge-url names one"):
        LlmOptions(judge_vllm="a", judge_url="http://b")
    with pytest.raises(BadInput, match=r"--judge-model 'b'.*one model alone"):
        LlmOptions(vllm="a", judge_model="b")


def test_the_words_name_the_servers_again() -> None:
    options = LlmOptions(
        vllm="some/model@v2", judge_vllm="b", vllm_python=Path("p"), vllm_args="-tp 2", vllm_timeout=60, model="m"
    )
    assert options.list_words() == [
        *("--llm-model", "m", "--vllm", "some/model@v2", "--judge-vllm", "b"),
        *("--vllm-python", "p", "--vllm-args", "-tp 2", "--vllm-timeout", "60"),
    ]
    assert LlmOptions(url="u", vllm_python=Path("p"), vllm_timeout=VLLM_TIMEOUT).list_words() == ["--llm-url", "u"]


def test_one_model_one_server(folder: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(tmp_path / "fake")
    options = LlmOptions(vllm=str(folder), judge_vllm="bundled", vllm_python=vllm.python)
    same = LlmOptions(vllm=str(folder), judge_vllm=str(folder), vllm_python=vllm.python)
    with OneServer() as servers:
        first = servers.get(options, tmp_path)
        assert servers.get(same.for_judge(), tmp_path) is first
        asyncio.run(first.ready())
        other = servers.get(options.for_judge(), tmp_path)
        assert not vllm.living()
        assert other is not first
        asyncio.run(other.ready())
        assert vllm.living()
    assert not vllm.living()


def test_the_log_lies_under_the_root(folder: Path, tmp_path: Path) -> None:
    python = FakeVllm(tmp_path / "fake").python
    options = LlmOptions(vllm=str(folder), model="../../some/model x", vllm_python=python)
    log = OneServer().get(options, tmp_path).log
    assert log.parent == tmp_path / "logs"
    assert log.name == "vllm-..-..-some-model-x.log"
    with pytest.raises(BadInput, match="--vllm-timeout 0"):
        OneServer().get(dataclasses.replace(options, vllm_timeout=0), tmp_path)


def test_an_ended_server_differs_from_an_unreachable_one(folder: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(tmp_path / "fake")
    options = LlmOptions(vllm=str(folder), vllm_python=vllm.python)

    async def work(end: bool) -> None:
        async with open_server(options, tmp_path) as server:
            await server.ready()
            if end:
                os.kill(vllm.starts()[-1]["pids"][0], signal.SIGKILL)
                while server.running:
                    await asyncio.sleep(0.05)
            raise Unavailable("no LLM server answers")

    with pytest.raises(Unavailable, match="was ended by SIGKILL while it was being asked; let it take less"):
        asyncio.run(work(end=True))
    with pytest.raises(Unavailable, match="no LLM server answers"):
        asyncio.run(work(end=False))
    assert not vllm.living()
