"""Several ranks: they train what one process trains, and end together. The ranks' side is in ``rank_work``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_work import ARCHITECTURES_IN_DATA, steps_of
from safetensors.torch import load_file
from test_firings import files

from sae.common import launch
from sae.common.errors import BadInput
from sae.common.parallel import choose_mode, join_ranks
from sae.common.ranks import ALONE
from sae.common.torchrun import RankLost, _lost_ranks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each scenario, with what its ranks left there."""
    folder = tmp_path_factory.mktemp("ranks")
    folders = HERE.parents[2], HERE.parents[1], HERE.parent / "firings", HERE.parent / "training"
    places = os.pathsep.join(map(str, folders))
    environment = {
        **os.environ,
        "PYTHONPATH": places,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "small_ranks.py"), str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr
    return folder


def well(folder: Path) -> Path:
    """``folder``, where all ranks ended well."""
    assert set(read(folder / "ended.json")["codes"]) == {0}, said(folder)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def said(folder: Path, stream: str = "err") -> list[str]:
    """What all ranks of a scenario said, line by line, but for how the work was split."""
    text = "".join(path.read_text() for path in sorted(folder.glob(f"{stream}-*")))
    return [line for line in text.splitlines() if "--parallel data: " not in line]


# --- seeds over ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "seeds"),
    [("seeds_over_ranks", 3), ("three_ranks_two_seeds", 2), ("seeds_with_different_last_steps", 3)],
)
def test_seeds_over_ranks_equal_one_process_bitwise(ran: Path, scenario: str, seeds: int) -> None:
    there = well(ran / scenario)
    for seed in range(seeds):
        one, other = load_file(ran / f"alone/seeds/{seed}.safetensors"), load_file(there / f"{seed}.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert read(ran / f"alone/seeds/{seed}.json")["rows"] == read(there / f"{seed}.json")["rows"]


def test_every_seed_resumes_from_its_own_step(ran: Path) -> None:
    there = well(ran / "seeds_with_different_last_steps")
    assert [read(there / f"{seed}.json")["resumed_from"] for seed in range(3)] == [20, 30, 0]


def test_a_harvest_over_ranks_equals_one_process_bytewise(ran: Path) -> None:
    """Into new stores and into one that is added to; and each rank reads its own part of the text."""
    there, alone = well(ran / "harvest_over_ranks"), ran / "alone/harvest"
    for name in "ab":
        one, other = (files(root / name / "firings") for root in (alone, there))
        assert one == other
        assert len(one) > 10
    asked = [read(there / f"asked-{rank}.json") for rank in range(3)]
    assert all(asked)
    assert sorted(row for of_rank in asked for row in of_rank) == sorted(read(alone / "asked-0.json"))


def test_only_rank_0_speaks(ran: Path) -> None:
    there = well(ran / "a_quiet_end")
    assert (there / "err-1").read_text() == ""
    assert said(there)[0] == "something to say"
    assert [json.loads(line) for line in said(there, "out")] == [{"schema": 1, "command": "train", "rank": 0}]


# --- data over ranks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES_IN_DATA)
def test_data_over_ranks_equals_one_process_approximately(ran: Path, architecture: str) -> None:
    there = well(ran / f"data_{architecture}")
    rows: list[dict[str, float]] = []
    for seed in range(2):
        one, other = (load_file(root / f"{seed}.safetensors") for root in (ran / "alone" / architecture, there))
        for name in one:
            assert one[name].dtype == torch.float64
            assert float((one[name] - other[name]).norm() / one[name].norm()) < 1e-6, name
        rows, others = (read(root / f"{seed}.json")["rows"] for root in (ran / "alone" / architecture, there))
        for row, of_ranks in zip(rows, others, strict=True):
            assert of_ranks == pytest.approx(row, rel=1e-6)
    assert len(rows) == steps_of(architecture)
    assert any(row["auxk"] > 0 for row in rows)


def test_data_over_ranks_resumes_bitwise_after_a_kill(ran: Path) -> None:
    assert -9 in read(ran / "data_killed/ended.json")["codes"]
    straight, resumed = well(ran / "data_undisturbed"), ran / "data_killed"
    well(ran / "data_resumed")
    assert read(resumed / "0.json")["resumed_from"] == 20
    assert read(resumed / "0.json")["rows"] == read(straight / "0.json")["rows"]
    one, other = load_file(straight / "0.safetensors"), load_file(resumed / "0.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = [p.name for root in (straight, resumed) for p in sorted((root / "run_a/training-state").iterdir())]
    assert states == ["step-00000040.safetensors", "step-00000050.safetensors"] * 2


@pytest.mark.parametrize(("scenario", "alone", "seeds"), [("data", "data_undisturbed", 1), ("seeds", "alone/seeds", 3)])
def test_ranks_agree_on_the_step_of_an_interrupt(ran: Path, scenario: str, alone: str, seeds: int) -> None:
    there = well(ran / f"{scenario}_interrupted")
    for seed in range(seeds):
        one, other = (load_file(root / f"{seed}.safetensors") for root in (ran / alone, there))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert read(there / f"{seed}.json")["resumed_from"] == 25


# --- the activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["held", "cached"])
def test_every_block_is_computed_by_one_rank(ran: Path, kind: str) -> None:
    there = well(ran / "one_pass_for_all_ranks") / kind
    one = load_file(ran / f"alone/{kind}/0.safetensors")
    for rank in range(2):
        other = load_file(there / f"{rank}.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    passes = [read(there / f"{rank}.json") for rank in range(2)]
    alone = read(ran / f"alone/{kind}/0.json")
    assert min(map(len, passes)) >= len(alone) // 2 - 1  # the work is shared
    if kind == "held":
        assert sorted(passes[0] + passes[1]) == sorted(alone)
    else:  # one block is damaged on the way, and computed again
        assert len(alone) == 5
        assert len(passes[0] + passes[1]) == 6
        assert {tuple(block) for block in passes[0] + passes[1]} == {tuple(block) for block in alone}


# --- endings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("the_same_mistake_everywhere", "this is wrong; do that"),
        ("a_mistake_before_they_meet", "--parallel 'sideways': give seeds or data"),
        ("a_mistake_on_one_rank", "only rank 1 sees this; mend it"),
        ("what_they_hand_each_other", "the weights differ between the ranks"),
        ("a_death", "rank 0 lost the other ranks ("),
    ],
)
def test_an_error_ends_all_ranks_with_one_line(ran: Path, scenario: str, words: str) -> None:
    there = ran / scenario
    ended = read(there / "ended.json")
    assert 0 not in ended["codes"]
    assert ended["seconds"] < 30
    if scenario == "a_death" and not said(there):
        return  # the one that was left was ended before it noticed
    (line,) = said(there)
    assert line.startswith("error: " + words)
    (result,) = said(there, "out")
    assert json.loads(result) == {"schema": 1, "error": line.removeprefix("error: ")}


def test_a_defect_shows_its_traceback_once(ran: Path) -> None:
    assert 0 not in read(ran / "a_defect_on_one_rank/ended.json")["codes"]
    lines = said(ran / "a_defect_on_one_rank")
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "AssertionError: ours to mend"
    assert sum(line.startswith("Traceback") for line in lines) == 1


# --- without torchrun -----------------------------------------------------------------------------------------


def test_how_a_training_is_split() -> None:
    assert choose_mode(None, seeds=3, ranks=2)[0] == "seeds"
    assert choose_mode(None, seeds=2, ranks=2)[0] == "seeds"
    mode, line = choose_mode(None, seeds=1, ranks=2)
    assert mode == "data"
    assert (
        line
        == "2 ranks, --parallel data: each step's tokens are split over the ranks, equal to one process up to rounding"
    )
    assert choose_mode("data", seeds=3, ranks=2)[0] == "data"
    mode, line = choose_mode("seeds", seeds=1, ranks=2)
    assert mode == "seeds"
    assert "1 of 2 ranks train a seed" in line


def test_one_process_alone() -> None:
    assert not launch.launched()
    with join_ranks(None, 3, "auto") as (job, device):
        assert (job, device) == (ALONE, "auto")
    with (
        pytest.raises(BadInput, match=r"--parallel data needs several processes.*torchrun"),
        join_ranks("data", 3, "cpu"),
    ):
        pass


def test_who_am_i(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # of some other launcher: not ours to go by
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (launch.launched(), launch.rank(), launch.local_rank()) == (False, 0, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (launch.launched(), launch.rank(), launch.local_rank()) == (True, 3, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launch.launched()


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.common.torchrun import rank_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rank_device("auto") == rank_device("cpu") == "cpu"
    with pytest.raises(BadInput, match="no GPU"):
        rank_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_device("auto") == rank_device("cuda") == "cuda:1"
    assert rank_device("cpu") == "cpu"
    with pytest.raises(BadInput, match="its own GPU"):
        rank_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadInput, match="--nproc-per-node 2"):
        rank_device("auto")


def test_out_of_memory_is_no_lost_rank() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"), _lost_ranks():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RankLost, match="lost the other ranks"), _lost_ranks():
        raise RuntimeError("Connection closed by peer")


def test_a_finished_rank_skips_finalization() -> None:
    code = "import atexit, cli; atexit.register(print, 'finalized'); cli.main()"
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code, "train", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert "Usage" in ended.stdout
    assert "finalized" not in ended.stdout
