"""Training: the gradient against automatic differentiation, resuming against not having stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sae.common.errors import BadInput, SettingsDiffer, UserError
from sae.common.ranks import ALONE, Job
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.sae import AuxK, Objective, Sae, total_variance
from sae.settings import TrainingSettings
from sae.training import state as training_state
from sae.training import trainer
from sae.training.learner import Plan, TrainLog
from sae.training.trainer import Group, train_groups

D, M, K, B = 12, 40, 4, 64


class Batches(Sequence[torch.Tensor]):
    """Sparse combinations of fixed directions, computed from the step's number; stops at ``fail_at``."""

    fingerprint = "synthetic"

    def __init__(self, steps: int, fail_at: int | None = None, pause: float = 0.0, directions_in_all: int = 24) -> None:
        self.steps, self.fail_at, self.pause = steps, fail_at, pause
        directions = torch.randn(directions_in_all, D, generator=torch.Generator().manual_seed(99))
        self.directions = torch.nn.functional.normalize(directions, dim=1)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> torch.Tensor:  # type: ignore[override]
        if step == self.fail_at:
            raise KeyboardInterrupt
        time.sleep(self.pause)
        generator = torch.Generator().manual_seed(step)
        n = len(self.directions)
        active = torch.rand(B, n, generator=generator) < 2.4 / n
        return (active * torch.rand(B, n, generator=generator)) @ self.directions + 0.5


def fresh(*seeds: int) -> list[TopKSae]:
    return [TopKSae.init(D, M, K, seed, Batches(1)[0]) for seed in seeds]


def folders(root: Path, n: int) -> list[Path]:
    return [root / f"run_{'abc'[i]}" / "training-state" for i in range(n)]


def settings(**values: object) -> TrainingSettings:
    given = {"num_latents": M, "k": K, "batch_tokens": B, "checkpoint_steps": 4, "learning_rate": 0.01, **values}
    return TrainingSettings.model_validate(given)


def train(
    batches: trainer.Batches,
    saes: Sequence[Sae],
    settings: TrainingSettings,
    state_folders: Sequence[Path],
    job: Job = ALONE,
) -> list[TrainLog]:
    """Train one group: ``saes``, one per seed, on ``batches`` [B, D]."""
    return train_groups([Group(batches, saes, settings, state_folders)], job)[0]


def same(a: TopKSae, b: TopKSae) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters().values(), b.parameters().values(), strict=True))


# --- the gradient ---------------------------------------------------------------------------------------------


def dense_loss(weights: Mapping[str, torch.Tensor], x: torch.Tensor, k: int, auxk: AuxK | None) -> list[torch.Tensor]:
    """FVU and AuxK as their equations read, over dense [B, M] activations."""

    def largest(values: torch.Tensor, n: int) -> torch.Tensor:
        return torch.where(values >= values.topk(n).values[:, -1:], values, 0)

    pre = ((x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]).relu()
    error = x - (largest(pre, k) @ weights["W_dec"] + weights["b_dec"])
    variance = (x - x.mean(0)).square().sum()
    extra = torch.zeros(())
    if auxk is not None:
        dead = pre * auxk.dead
        reconstruction = largest(dead, min(auxk.k, int(auxk.dead.sum()))) @ weights["W_dec"]
        extra = (reconstruction - error.detach()).square().sum() / variance
    return [error.square().sum() / variance, extra]


@pytest.mark.parametrize(("n_dead", "k_aux"), [(0, 6), (1, 6), (5, 6), (30, 6), (M, 6), (30, 40)])
def test_the_whole_gradient_is_that_of_autograd(n_dead: int, k_aux: int) -> None:
    torch.manual_seed(n_dead)
    sae = fresh(0)[0].to(dtype=torch.float64)
    sae.b_enc += 0.05 * torch.randn(M, dtype=torch.float64)
    sae.W_dec *= 1.5  # the gradient is right for rows of any length
    x = Batches(1)[0].double()
    dead = torch.zeros(M, dtype=torch.bool)
    dead[torch.randperm(M)[:n_dead]] = True  # some of them are among the top k of this batch all the same
    auxk = AuxK(dead, k_aux, 0.4)
    loss, gradient = sae.loss_and_gradient(x, Objective(total_variance(x), len(x), auxk))

    weights = {name: w.clone().requires_grad_() for name, w in sae.parameters().items()}
    fvu, extra = dense_loss(weights, x, K, auxk if n_dead else None)
    (fvu + 0.4 * extra).backward()
    torch.testing.assert_close(loss.fvu, fvu.detach())
    assert float(loss.auxk) == pytest.approx(float(extra.detach()))
    assert set(gradient) == set(weights)
    for name, weight in weights.items():
        assert weight.grad is not None
        torch.testing.assert_close(gradient[name], weight.grad, rtol=1e-10, atol=1e-13)


def test_auxk_reaches_the_encoder_of_silent_latents() -> None:
    sae = fresh(0)[0]
    sae.b_enc[:20] -= 0.02
    x = Batches(1)[0]
    silent = sae.loss_and_gradient(x, Objective(total_variance(x), len(x)))[0].firings == 0
    if not silent.any():
        pytest.fail("the example needs latents that do not fire")
    gradient = sae.loss_and_gradient(x, Objective(total_variance(x), len(x), AuxK(silent, 6, 1 / 32)))[1]
    assert (gradient["W_enc"][silent].abs().sum(1) > 0).any()
    assert (gradient["b_enc"][silent] != 0).any()
    without = sae.loss_and_gradient(x, Objective(total_variance(x), len(x)))[1]
    assert (without["W_enc"][silent] == 0).all()


def test_a_slot_filled_with_zero_is_no_firing() -> None:
    sae = fresh(0)[0]
    sae.b_enc.fill_(-100.0)
    x = Batches(1)[0]
    loss, gradient = sae.loss_and_gradient(x, Objective(total_variance(x), len(x)))
    assert (loss.firings == 0).all()
    assert (gradient["W_enc"] == 0).all()


# --- the schedule ---------------------------------------------------------------------------------------------


def test_plan() -> None:
    plan = Plan.of(TrainingSettings(num_latents=2**12, tokens=10_000_000), steps=20_000, d_in=256)
    assert plan.peak_rate == pytest.approx(4e-4)
    assert plan.warmup == 1000
    assert plan.dead_tokens == 500_000
    assert plan.k_aux == 128
    assert Plan.of(TrainingSettings(tokens=10**9), 10, 256).dead_tokens == 10_000_000
    short = Plan.of(TrainingSettings(learning_rate=1.0), steps=50, d_in=256)
    assert short.warmup == 5
    rates = [short.rate(step) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert rates[-1] == pytest.approx(1 / 45)
    assert Plan.of(TrainingSettings(learning_rate=1.0), steps=3, d_in=4).rate(0) == 1.0


# --- training -------------------------------------------------------------------------------------------------


def test_it_learns_and_keeps_its_log(tmp_path: Path) -> None:
    saes = fresh(0, 1)
    logs = train(Batches(300), saes, settings(tokens=300 * B, checkpoint_steps=100), folders(tmp_path, 2))
    for sae, log in zip(saes, logs, strict=True):
        table = log.table()
        columns = ["step", "tokens", "loss", "fvu", "auxk", "sparsity", "sparsity_coefficient", "l0", "dead_fraction"]
        assert list(table) == [*columns, "learning_rate"]
        assert table["tokens"].iloc[-1] == 300 * B
        assert table["fvu"].iloc[-1] < table["fvu"].iloc[0] / 3
        assert 0 < table["l0"].iloc[-1] <= K
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
        assert [p.name for p in sorted((tmp_path / "run_a" / "training-state").iterdir())] == [
            "step-00000200.safetensors",
            "step-00000300.safetensors",
        ]
    assert not same(*saes)


def test_about_two_hundred_rows(tmp_path: Path) -> None:
    log = train(Batches(450), fresh(0), settings(checkpoint_steps=1000), folders(tmp_path, 1))[0]
    assert len(log.rows) == 225
    assert log.rows[-1]["step"] == 450


def test_auxk_revives_dead_latents(tmp_path: Path) -> None:
    last = []
    for i, coefficient in enumerate((0.0, 1 / 32)):
        sae = fresh(0)[0]
        sae.b_enc[:30] -= 0.6  # too low for the top k, but not for a positive pre-activation now and then
        values = settings(tokens=300 * B, dead_tokens=5 * B, auxk=coefficient)
        last.append(train(Batches(300), [sae], values, folders(tmp_path / str(i), 1))[0].rows[-1])
    assert last[0]["dead_fraction"] - last[1]["dead_fraction"] > 0.1
    assert last[1]["fvu"] < last[0]["fvu"]


def test_training_is_that_of_autograd_and_torch_adam(tmp_path: Path) -> None:
    """The whole recipe over again, densely and step by step, in float64."""
    steps, rate, dead_tokens = 40, 0.01, 3 * B
    sae = fresh(0)[0].to(dtype=torch.float64)
    sae.b_enc[:25] -= 0.5
    weights = {name: torch.nn.Parameter(w.clone()) for name, w in sae.parameters().items()}
    optimiser = torch.optim.Adam(weights.values(), lr=rate, betas=(0.9, 0.999), eps=6.25e-10)
    silent, with_auxk, batches = torch.zeros(M), 0, Batches(steps)
    for step in range(steps):
        x = batches[step].double()
        auxk = AuxK(silent >= dead_tokens, D // 2, 1 / 32)
        with_auxk += int(auxk.dead.sum() > D // 2)
        fvu, extra = dense_loss(weights, x, K, auxk if auxk.dead.any() else None)
        optimiser.zero_grad()
        (fvu + extra / 32).backward()
        decoder = weights["W_dec"]
        assert decoder.grad is not None
        decoder.grad -= (decoder.grad * decoder.data).sum(1, keepdim=True) * decoder.data
        for group in optimiser.param_groups:
            group["lr"] = rate * ((step + 1) / 4 if step < 4 else (steps - step) / (steps - 4))
        with torch.no_grad():
            pre = ((x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]).relu()
            fired = ((pre >= pre.topk(K).values[:, -1:]) & (pre > 0)).any(0)
        optimiser.step()
        decoder.data /= decoder.data.norm(dim=1, keepdim=True)
        silent = torch.where(fired, 0, silent + B)
    assert with_auxk > 5
    values = settings(tokens=steps * B, learning_rate=rate, dead_tokens=dead_tokens)
    train(batches, [sae], values, folders(tmp_path, 1))
    for name, weight in sae.parameters().items():
        torch.testing.assert_close(weight, weights[name].data, rtol=1e-6, atol=1e-8)


def test_seed_trains_the_same_alone_or_with_others(tmp_path: Path) -> None:
    together, alone = fresh(0, 1), fresh(1)
    train(Batches(20), together, settings(), folders(tmp_path / "together", 2))
    train(Batches(20), alone, settings(), folders(tmp_path / "alone", 1))
    assert same(together[1], alone[0])


# --- resuming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(3,), (4,), (11,), (6, 14, 19)])
def test_resuming_is_bit_for_bit(tmp_path: Path, stops: tuple[int, ...]) -> None:
    straight = fresh(0, 1)
    values = settings(tokens=20 * B, dead_tokens=3 * B)  # AuxK is at work
    expected = train(Batches(20), straight, values, folders(tmp_path / "straight", 2))
    assert any(row["auxk"] > 0 for row in expected[0].rows)
    broken = folders(tmp_path / "broken", 2)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(Batches(20, fail_at=stop), fresh(0, 1), values, broken)
    resumed = fresh(0, 1)
    logs = train(Batches(20), resumed, values, broken)
    assert logs[0].resumed_from == stops[-1] // 4 * 4
    for a, b, log, reference in zip(straight, resumed, logs, expected, strict=True):
        assert same(a, b)
        assert log.rows == reference.rows
    again = fresh(0, 1)
    assert train(Batches(20), again, values, broken)[0].resumed_from == 20
    assert same(again[0], straight[0])
    training_state.discard_states(broken[0])
    assert not broken[0].exists()


def test_each_seed_resumes_from_its_own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = fresh(0, 1)
    train(Batches(12), straight, settings(), folders(tmp_path / "straight", 2))
    broken, written = folders(tmp_path / "broken", 2), []
    save = training_state.save_file

    def dies_at_the_sixth(*arguments: object, **named: object) -> None:
        written.append(arguments)
        if len(written) == 6:  # the second seed's third state
            raise KeyboardInterrupt
        save(*arguments, **named)

    monkeypatch.setattr(training_state, "save_file", dies_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        train(Batches(12), fresh(0, 1), settings(), broken)
    monkeypatch.undo()
    assert (broken[0] / "step-00000012.safetensors").exists()
    assert not (broken[1] / "step-00000012.safetensors").exists()
    resumed = fresh(0, 1)
    assert [log.resumed_from for log in train(Batches(12), resumed, settings(), broken)] == [12, 8]
    assert all(map(same, straight, resumed))


def test_a_growing_study_keeps_existing_states(tmp_path: Path) -> None:
    """Seeds 0 and 1 wait at their last step while seed 2 catches up, and are not trained or written again till then."""
    straight, places = fresh(0, 1, 2), folders(tmp_path / "grown", 3)
    train(Batches(20), straight, settings(), folders(tmp_path / "straight", 3))
    with pytest.raises(KeyboardInterrupt):
        train(Batches(20, fail_at=15), fresh(0, 1), settings(), places[:2])
    before = [path.read_bytes() for folder in places[:2] for path in sorted(folder.iterdir())]
    with pytest.raises(KeyboardInterrupt):
        train(Batches(20, fail_at=6), fresh(0, 1, 2), settings(), places)
    assert [path.read_bytes() for folder in places[:2] for path in sorted(folder.iterdir())] == before
    grown = fresh(0, 1, 2)
    assert [log.resumed_from for log in train(Batches(20), grown, settings(), places)] == [12, 12, 4]
    assert all(map(same, straight, grown))


def test_damaged_state_falls_back_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit, among the weights: the file opens, and only its checksum tells."""
    straight, places = fresh(0), folders(tmp_path, 1)
    train(Batches(12), straight, settings(), places)
    last = places[0] / "step-00000012.safetensors"
    stored = bytearray(last.read_bytes())
    stored[-1000] ^= 1
    last.write_bytes(stored)
    capsys.readouterr()
    resumed = fresh(0)
    assert train(Batches(12), resumed, settings(), places)[0].resumed_from == 8
    assert "run_a: its state of step 12 cannot be read (it does not match its checksum)" in capsys.readouterr().err
    assert same(resumed[0], straight[0])


def test_later_states_do_not_crowd_out_new_ones(tmp_path: Path) -> None:
    """Both states are damaged; begun afresh, the last two are kept all the same."""
    places = folders(tmp_path, 1)
    train(Batches(12), fresh(0), settings(), places)
    for path in places[0].iterdir():
        path.write_bytes(b"no state")
    with pytest.raises(KeyboardInterrupt):
        train(Batches(12, fail_at=6), fresh(0), settings(), places)
    assert [path.name for path in places[0].iterdir()] == ["step-00000004.safetensors"]


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    places = folders(tmp_path, 1)
    train(Batches(8), fresh(0), settings(), places)
    identity = training_state._read(places[0] / "step-00000008.safetensors").record["identity"]
    _, state = training_state.latest_state(places[0], identity)
    assert state is not None
    for tensors, record in (
        ({**state.tensors, "new": torch.zeros(1)}, state.record),
        (state.tensors, {**state.record, "new": 1}),
    ):
        training_state.write_state(places[0], 8, training_state.State(tensors, record))
        with pytest.raises(
            SettingsDiffer, match=r"run_a: the unfinished training .* another version.*delete"
        ) as caught:
            train(Batches(8), fresh(0), settings(), places)
        assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, places = fresh(0), folders(tmp_path / "full", 1)
    train(Batches(12), straight, settings(), folders(tmp_path / "straight", 1))
    save = training_state.save_file

    def fills_the_disk(tensors: dict[str, torch.Tensor], path: Path, **named: object) -> None:
        if "00000012" in path.name:
            path.write_bytes(b"half a sta")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, path, **named)

    monkeypatch.setattr(training_state, "save_file", fills_the_disk)
    with pytest.raises(UserError, match=r"the disk is full.*free some space and run the same command again"):
        train(Batches(12), fresh(0), settings(), places)
    monkeypatch.undo()
    assert sorted(path.name for path in places[0].iterdir()) == [
        "step-00000004.safetensors",
        "step-00000008.safetensors",
    ]
    resumed = fresh(0)
    assert train(Batches(12), resumed, settings(), places)[0].resumed_from == 8
    assert same(resumed[0], straight[0])


def test_an_unreadable_state_falls_back_to_the_previous(tmp_path: Path) -> None:
    straight, places = fresh(0), folders(tmp_path, 1)
    train(Batches(12), straight, settings(), places)
    last = places[0] / "step-00000012.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    resumed = fresh(0)
    assert train(Batches(12), resumed, settings(), places)[0].resumed_from == 8
    assert same(resumed[0], straight[0])


_KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from test_trainer import Batches, folders, fresh, settings, train
train(Batches(40, pause=0.05), fresh(0, 1), settings(), folders(Path(sys.argv[1]), 2))
"""


def test_killed_for_real(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = _KILLED.format(tests=str(here), root=str(here.parents[1]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")], env=environment)
    places = folders(tmp_path / "killed", 2)
    deadline = time.monotonic() + 120
    while not (places[1] / "step-00000008.safetensors").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    straight, resumed = fresh(0, 1), fresh(0, 1)
    train(Batches(40), straight, settings(), folders(tmp_path / "straight", 2))
    logs = train(Batches(40), resumed, settings(), places)
    assert 8 <= logs[0].resumed_from < 40
    assert all(map(same, straight, resumed))


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    places = folders(tmp_path, 1)
    train(Batches(8), fresh(0), settings(), places)
    with pytest.raises(SettingsDiffer, match=r"run_a: .*settings\.learning_rate: 0\.01 there, 0\.02 now.*delete"):
        train(Batches(8), fresh(0), settings(learning_rate=0.02), places)
    with pytest.raises(SettingsDiffer, match="initial_weights"):
        train(Batches(8), fresh(1), settings(), places)
    train(Batches(8), fresh(0), settings(checkpoint_steps=3), places)


# --- what cannot be trained on --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "match"),
    [(float("nan"), "step 3 hold NaN"), (float("inf"), "step 3 hold NaN"), (1e30, "step 3 hold NaN")],
)
def test_bad_activations_stop_with_one_line(tmp_path: Path, value: float, match: str) -> None:
    batches = [Batches(4)[i] for i in range(4)]
    batches[2][5, 3] = value
    with pytest.raises(BadInput, match=match) as caught:
        train(batches, fresh(0), settings(), folders(tmp_path, 1))
    assert "\n" not in str(caught.value)


def test_a_nonfinite_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    sae = fresh(0)[0]
    sae.W_dec *= 1e25
    before = sae.W_enc.clone()
    with pytest.raises(BadInput, match=r"run_a: the fvu is not finite at step 1 of 4.*lower training.learning_rate"):
        train(Batches(4), [sae], settings(), folders(tmp_path, 1))
    assert torch.equal(sae.W_enc, before)


@pytest.mark.parametrize("rate", [1e15, 1e20, 1e30, 1e38])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_diverging_training_names_step_and_cause(tmp_path: Path, rate: float, precision: str) -> None:
    values = settings(precision=precision, checkpoint_steps=1)
    values = values.model_copy(update={"learning_rate": rate})  # above the largest that may be given
    with pytest.raises(BadInput, match=r"run_a: .* step \d of 20.*lower training.learning_rate") as caught:
        train(Batches(20), fresh(0), values, folders(tmp_path, 1))
    assert f"at learning rate {rate / 2:.3g}" in str(caught.value) or f"at learning rate {rate:.3g}" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not one batch"):
        train([], fresh(0), settings(), folders(tmp_path, 1))
    with pytest.raises(BadInput, match="do not vary"):
        train([torch.ones(5, D)], fresh(0), settings(), folders(tmp_path, 1))
