"""Every flag of every command, fed with bad values: one line and an exit code, never a traceback."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import typer
from fake_server import FakeServer, Reply, error
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_study import cli, write_recipe

import cli as program
from sae.common.errors import UserError

COMMANDS: Any = typer.main.get_command(program.app)
FLAGS = [
    (name, max(parameter.opts, key=len))
    for name, command in COMMANDS.commands.items()
    for parameter in command.params
    if parameter.opts[0].startswith("-") and name != "demo"
]
BASE = {
    "train": "--recipe short.toml --no-controls",
    "harvest": "",
    "align": "run_a run_b",
    "sweep": "sweep.toml --dry-run",
    "import": "--from runs/run_a --name theirs --study run",
    "export": "--sae run_a --table scores --format csv --to scores.csv",
    "explain": "--sae run_a --explainer ngram --latents 2",
    "score": "--sae run_a",
    "report": "",
    "show": "--latent 3",
    "compare": "run_a run_b",
    "runs": "",
    "doctor": "",
    "llm": "--llm-url http://127.0.0.1:9",
}
HOSTILE = [
    *("", " ", "x", "nan", "inf", "-inf", "-1", "0", "1", "1.5", "1e400", "1e-400", "1e15", "true", "None", "-", "--"),
    *("9" * 20, "-" + "9" * 20, "9" * 5000, str(2**31), str(2**63), str(2**64 - 1), "0x10", "١", "½", "2M2", "$5", "$"),
    *(
        "é日本",
        "a\0b",
        "\udcff",
        "\x1b[2J",
        "a\nb",
        "%s{x}",
        "x" * 300,
        "x" * 5000,
        "x/" * 3000,
        "[1, 2]",
        "a=b",
        "=",
    ),
    *(
        ".",
        "..",
        "../run_a",
        "runs/run_a",
        "/",
        "~",
        "~nosuchuser/x",
        "pipe",
        "loop",
        "short.toml",
        "runs",
        "cache.sqlite",
    ),
]
# One argument on the command line has at most 128 KiB; what a shell cannot pass (NUL) is tried too.
values = st.sampled_from(HOSTILE) | st.text(max_size=30) | st.integers().map(str) | st.floats().map(str)


@pytest.fixture
def place(tiny_root: Path, tiny_llama_dir: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a finished study, recipes, a pipe and a loop of links. Nothing is trained, and no hub is asked."""

    def stop(*_: object, **__: object) -> NoReturn:
        raise UserError("nothing is trained here")

    def unreachable(*_: object, **__: object) -> NoReturn:
        raise ConnectionError("no network here")

    folder = tiny_root.parent
    recipe = write_recipe(folder / "short.toml", tiny_llama_dir, tiny_recipe.parent / "texts")
    sweep = "\n[sweep]\ntraining.k = [1, 2]\n"
    (folder / "sweep.toml").write_text(recipe.read_text().replace("k = 2\n", "") + sweep)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sae.training.trainer.train_groups", stop)
    monkeypatch.setattr("sae.study.probe.probe", stop)
    for look_up in ("model_info", "dataset_info"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{look_up}", unreachable)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


SECRET = "sekret-0123456789abcdef"
HEADERS = [
    *(["api-key={}"], ["Authorization=Bearer {}"], ["Authorization=Bearer", "{}"], ["Authorization=", "Bearer {}"]),
    *(["{}"], ["={}"], ["{}="], ["{}=="], ["Authorization: Bearer {}"], ["Host={}"], ["a={}", "--llm-header", "A={}"]),
    *(
        ["api-key={}é"],
        ["api-key={}\n"],
        ["api-key={}\0"],
        ["api-key={}\udcff"],
        ["a={}$UNSET_VARIABLE"],
        ["-{}", "{}"],
    ),
]


@pytest.fixture(scope="module")
def echo() -> Iterator[FakeServer]:
    """A server that puts what it was sent into answers and errors."""

    def answer(_: object) -> Reply:
        said = f"[EXPLANATION]: {server.requests[-1].headers}"
        return error(400, said) if len(server.requests) % 2 else Reply(said)

    with FakeServer(answer) as server:
        yield server


@pytest.mark.fuzz
@settings(
    max_examples=max(1, int(os.environ.get("FUZZ", "0"))) * 20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.sampled_from(["explain --sae run_a --latents 2", "score --sae run_a", "doctor", "sweep sweep.toml"]),
    st.sampled_from(["--llm-header", "--judge-header"]),
    st.sampled_from(HEADERS),
    st.booleans(),
)
@example("explain --sae run_a --latents 2", "--llm-header", ["api-key={}"], False)
@example("score --sae run_a", "--llm-header", ["Authorization=Bearer {}"], True)
@example("score --sae run_a", "--llm-header", ["Authorization=Bearer", "{}"], False)
def test_no_header_is_shown_or_stored(
    place: Path, echo: FakeServer, command: str, flag: str, shape: list[str], is_attached: bool
) -> None:
    words = [word.format(SECRET) for word in shape]
    words = [f"{flag}={words[0]}", *words[1:]] if is_attached else [flag, *words]
    sent = len(echo.requests)
    ran = cli(*command.split(), "--root", "runs", "--llm-url", echo.url, *words)
    torch.set_num_threads(1)
    assert "Traceback" not in ran.err
    assert SECRET not in ran.out + ran.err
    files = [path for path in (place / "runs").rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    if (command[:3], flag, shape) == ("exp", "--llm-header", ["api-key={}"]) and len(echo.requests) > sent:
        assert echo.requests[-1].headers["api-key"] == SECRET


def check(command: str, flag: str, value: str) -> None:
    ran = cli(command, *BASE[command].split(), *([] if flag == "--root" else ["--root", "runs"]), flag, value)
    torch.set_num_threads(1)
    assert ran.code in (0, 1, 2, 3), ran
    assert "Traceback" not in ran.err
    if ran.code in (1, 2):
        assert ran.err.splitlines()[-1].startswith("error: ")


@pytest.mark.usefixtures("place")
def test_every_flag_refuses_an_empty_value() -> None:
    for command, flag in FLAGS:
        for words in ([flag, ""], [f"{flag}="]) if flag.startswith("--") and flag != "--vllm-args" else []:
            ran = cli(command, *BASE[command].split(), *words)
            assert ran.code in (1, 2), (command, words, ran)


@pytest.mark.fuzz
@pytest.mark.usefixtures("place")
@settings(
    max_examples=max(1, int(os.environ.get("FUZZ", "0"))) * 60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.sampled_from(FLAGS), values)
@example(("train", "--seeds"), "9" * 20)
@example(("train", "--threads"), str(2**31))
@example(("train", "--context"), "9" * 20)
@example(("train", "--recipe"), "pipe")
@example(("train", "--text"), "~nosuchuser/x")
@example(("harvest", "--sae"), "/runs/run_a")
@example(("align", "--root"), "loop")
@example(("explain", "--concurrency"), str(10**12))
@example(("explain", "--requests-per-second"), "inf")
@example(("score", "--ci-half-width"), "nan")
def test_hostile_values_never_crash(of: tuple[str, str], value: str) -> None:
    check(*of, value)
