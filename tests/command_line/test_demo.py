"""The demo: what it plans to take, what it says while it runs, and that a second call shows the report at once."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny_study import cli, write_recipe, write_texts

from autointerp.command_line import demo
from sae.common import overview, progress
from sae.common.overview import Speed
from sae.settings import Settings
from sae.study.probe import TokenSeconds
from sae.study.recipes import settings_from


def seconds(
    settings: Settings, speed: Speed = demo.REFERENCE_SPEED, measured: TokenSeconds | None = None
) -> dict[str, float]:
    return {name: sum(cost) for name, cost in demo.costs(settings, speed, measured).items()}


@pytest.mark.parametrize("settings", [Settings(), settings_from(demo.RECIPE)], ids=["defaults", "demo"])
def test_every_stage_has_a_cost(settings: Settings) -> None:
    found = seconds(settings)
    assert list(found) == list(demo.STAGES)
    assert all(1 < cost < 3600 for cost in found.values())


def test_costs_follow_the_settings() -> None:
    settings = settings_from(demo.RECIPE)
    twice = settings.with_values(training={"tokens": 2 * settings.training.tokens})
    wider = settings.with_values(training={"num_latents": 4 * settings.training.num_latents})
    assert seconds(twice)[demo.TRAIN] > 1.3 * seconds(settings)[demo.TRAIN]
    assert seconds(twice)[demo.REPORT] == seconds(settings)[demo.REPORT]
    assert seconds(wider)[demo.TRAIN] > 1.3 * seconds(settings)[demo.TRAIN]
    assert seconds(wider)[demo.ALIGN] > 1.3 * seconds(settings)[demo.ALIGN]


def test_costs_follow_the_machine() -> None:
    settings, reference = settings_from(demo.RECIPE), demo.REFERENCE_SPEED
    usual = seconds(settings)
    half_as_fast = seconds(settings, Speed(2 * reference.python, 2 * reference.matmul))
    assert half_as_fast == pytest.approx({name: 2 * cost for name, cost in usual.items()})
    step = demo.STEP_SECONDS * (settings.training.num_latents + demo.TOKEN_LATENTS)
    assert seconds(settings, reference, TokenSeconds(demo.FORWARD_SECONDS, step)) == pytest.approx(usual)
    for slow in (TokenSeconds(10 * demo.FORWARD_SECONDS, step), TokenSeconds(demo.FORWARD_SECONDS, 10 * step)):
        assert seconds(settings, reference, slow)[demo.TRAIN] > usual[demo.TRAIN]
        assert seconds(settings, reference, slow)[demo.SCORE] == usual[demo.SCORE]


def test_demo_reports_its_stages_and_repeats_instantly(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    for module in (progress, overview):
        monkeypatch.setattr(module, "console", Console(file=said, highlight=False, width=60))
    texts = write_texts(tmp_path / "texts")
    monkeypatch.setattr(demo, "RECIPE", write_recipe(tmp_path / "tiny.toml", tiny_llama_dir, texts))
    first = cli("demo", "--root", tmp_path / "runs", "--json").well().json
    lines = said.getvalue().splitlines()
    assert lines[0].startswith("about ")
    assert [name for name in demo.STAGES if name in lines[0]] == list(demo.STAGES)
    ends = [line.partition(": done in ")[0] for line in lines if ": done in " in line]
    assert ends == list(demo.STAGES)
    assert "\x1b" not in said.getvalue()

    said.truncate(0)
    again = cli("demo", "--root", tmp_path / "runs", "--json").well().json
    assert again == first
    assert "done in" not in said.getvalue()
    assert "in all" not in said.getvalue()

    (tmp_path / "runs" / "demo_a" / "latents.scores.parquet").unlink()  # as if killed before its scores
    assert demo.stages_done(tmp_path / "runs") == {demo.TEXT, demo.TRAIN, demo.HARVEST, demo.ALIGN}
    assert demo.stages_done(tmp_path / "other") == set()
