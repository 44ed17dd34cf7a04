"""Tokens that no dictionary sees: the flags, the mask, and what each stage makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_study import Ran, cli, write_recipe
from transformers import GPT2Config, GPT2Model

from sae.activations.skipping import Skip, resolve_tokens
from sae.activations.stream import ActivationStream, TrainingBatches, open_streams, read_batches
from sae.activations.subject import Subject, load_tokenizer
from sae.common.errors import BadInput
from sae.common.files import digest, read_json, table_metadata
from sae.dictionaries.sae import total_variance
from sae.settings import Settings, SkipSettings, check_table, validated
from sae.study.run import Run
from sae.study.stage import Source, find_skip, limit_norms
from sae.text.packing import prepare_corpus

CONTEXT, TOKENS = 32, 16 * 8 * 31


def make_model(folder: Path, tokenizer: Path, times: float) -> Path:
    """A GPT-2 whose position 0 has an embedding that is ``times`` as long."""
    shutil.copytree(tokenizer, folder)
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    model.wpe.weight.data[0] *= times
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny_neox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, tiny_neox_dir, x) for name, x in (("sink", 20_000.0), ("plain", 1.0))}


@pytest.fixture
def train(models: dict[str, Path], tiny_recipe: Path, tmp_path: Path) -> Any:
    def run(model: str, name: str, *flags: object, hookpoint: str = "h.0", seeds: tuple[int, ...] = (0,)) -> Ran:
        recipe = write_recipe(tmp_path / f"{model}.toml", models[model], tiny_recipe.parent / "texts", tokens=TOKENS)
        seeds_flags = [word for seed in seeds for word in ("--seeds", seed)]
        return cli(
            *("train", "--recipe", recipe, "--hookpoint", hookpoint, "--name", name, *seeds_flags),
            *("--no-controls", "--root", tmp_path / "runs", *flags),
        )

    return run


def weights(root: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(root / "runs" / run / "sae.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_warning_names_the_flag_that_helps(train: Any, tmp_path: Path) -> None:
    warned = train("sink", "all").well()
    (warning,) = [line for line in warned.err.splitlines() if "warning" in line]
    assert warning.endswith("they are at position 0 of the sequences: --skip-positions 1 skips them")
    assert "warning" not in train("sink", "skip", "--skip-positions", 1).well().err
    recorded = read_json(tmp_path / "runs/skip_a/run.json")
    assert recorded["settings"]["skip"] == {"positions": 1, "max_norm": None, "tokens": []}
    assert recorded["outlier_tokens"]["fraction"] == 0
    assert "skipped" not in read_json(tmp_path / "runs/all_a/run.json")


def test_a_skipped_sink_leaves_the_latents_equal(train: Any, tmp_path: Path) -> None:
    """At the embedding no other token sees the sink, so all that depends on it is what the dictionary itself saw."""
    for model in ("sink", "plain"):
        train(model, model, "--skip-positions", 1, hookpoint="drop").well()
        train(model, f"{model}0", hookpoint="drop").well()
        cli("harvest", "--sae", f"{model}_a", "--root", tmp_path / "runs").well()
    assert equal(weights(tmp_path, "sink_a"), weights(tmp_path, "plain_a"))
    assert not equal(weights(tmp_path, "sink0_a"), weights(tmp_path, "plain0_a"))
    sink, plain = (Run.open(f"{name}_a", tmp_path / "runs").latents() for name in ("sink", "plain"))
    assert sink.equals(plain)
    assert sink["n_firings"].sum() > 0


def test_positions_and_norms_skip_the_same_sink(train: Any, tmp_path: Path) -> None:
    train("sink", "by_position", "--skip-positions", 1).well()
    train("sink", "by_norm", "--max-norm", 10).well()
    assert equal(weights(tmp_path, "by_position_a"), weights(tmp_path, "by_norm_a"))


def test_fvu_is_reported_with_and_without_skipped(train: Any, tmp_path: Path) -> None:
    ran = train("sink", "skip", "--skip-positions", 1).well()
    quality = table_metadata(tmp_path / "runs/skip_a/training.parquet")["quality"]
    assert quality["skipped"]
    run = Run.open("skip_a", tmp_path / "runs")
    stream = ActivationStream(Subject.load(run.settings.subject.model, dtype="float32"), run.corpus(), "h.0")
    stream.skip = Skip(positions=1)
    x, sae = TrainingBatches(stream, TOKENS, 256)[0], run.sae()
    expected = float((sae.reconstruct(x) - x).square().sum()) / total_variance(x)
    assert quality["fvu_without"] == pytest.approx(expected, rel=1e-4)
    assert quality["fvu"] != pytest.approx(expected, rel=0.1)
    assert f"FVU {quality['fvu']:.3f}, without the skipped tokens {quality['fvu_without']:.3f}" in ran.err
    report = cli("report", "--full", "--sae", "skip_a", "--root", tmp_path / "runs").well()
    assert "Skipped tokens are not in FVU and L0" in " ".join(report.out.split())


def test_skipped_tokens_neither_fire_nor_count(train: Any, tmp_path: Path) -> None:
    train("plain", "run", "--skip-positions", 9, "--exclude-tokens", "eos", "x", 98, "--max-norm", 1.1).well()
    cli("harvest", "--sae", "run_a", "--root", tmp_path / "runs").well()
    run = Run.open("run_a", tmp_path / "runs")
    store, skipped = run.store(), run.record["skipped"]
    stream = ActivationStream(Subject.load(run.settings.subject.model, dtype="float32"), run.corpus(), "h.0")
    order = np.array(store.sequences_of(np.arange(store.n_sequences) * store.windows_per_sequence))
    stream.skip = Skip(9, tuple(skipped["token_ids"]), skipped["norm_limit"])
    values, tokens = stream.rows(order), stream.corpus.rows(order)
    norms = values.double().norm(dim=-1).numpy()
    special = np.isin(tokens, stream.corpus.special_ids)
    unseen = np.isin(tokens, skipped["token_ids"]) | (np.arange(CONTEXT) < 9)
    assert 98 in skipped["token_ids"]
    assert len(skipped["token_ids"]) == 3
    out = unseen | (norms > skipped["norm_limit"])
    assert (out & ~unseen & ~special).any(), "the limit on norms skips nothing"
    fired = np.unique(np.asarray(store.position))
    assert len(fired)
    assert not (out | special).reshape(-1)[fired].any()
    assert store.n_skipped_tokens == (out & ~special).sum()
    assert store.n_encoded_tokens == (~(out | special)).sum()
    table = run.latents()
    np.testing.assert_allclose(table["firing_frequency"], table["n_firings"] / (~(out | special)).sum())
    assert table_metadata(run.stage_path("firing"))["n_tokens"] == (~(out | special)).sum()
    # The first of four windows has skipped tokens only, so no context is drawn from it.
    assert store.has_special(np.arange(store.n_sequences) * 4).all()
    assert not store.has_special().all()


def test_a_grown_study_keeps_its_norm_limit(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("sink", "run", "--max-norm", 10).well()
    first = read_json(tmp_path / "runs/run_a/run.json")
    assert first["skipped"]["norm_limit"] == pytest.approx(10 * first["skipped"]["median_norm"])
    monkeypatch.setattr(ActivationStream, "measure_median_norm", lambda _: pytest.fail("it was measured again"))
    train("sink", "run", "--max-norm", 10, seeds=(0, 1)).well()
    cli("harvest", "--sae", "run_a", "--root", tmp_path / "runs", "--tokens", 2000).well()
    stores = [Run.open(name, tmp_path / "runs") for name in ("run_a", "run_b")]
    cli("harvest", "--root", tmp_path / "runs", "--tokens", 4000).well()
    second = read_json(tmp_path / "runs/run_b/run.json")
    assert second["skipped"] == first["skipped"]
    assert second["batch_order"] == first["batch_order"]
    assert len({run.store().n_skipped_tokens for run in stores}) == 1
    line = train("sink", "run", "--max-norm", 11).failed_in_one_line("skip.max_norm: 10.0 there, 11.0 now")
    assert "--name" in line


def test_imports_take_and_share_skipped_tokens(
    train: Any, models: dict[str, Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    train("sink", "run", "--max-norm", 10).well()
    root = tmp_path / "runs"
    cli("export", "--sae", "run_a", "--format", "sparsify", "--to", tmp_path / "out", "--root", root).well()
    subject = ("--model", models["sink"], "--hookpoint", "h.0", "--dtype", "float32", "--context", CONTEXT)
    source = ("import", "--from", tmp_path / "out", "--root", root)
    text = ("--text", tiny_recipe.parent / "texts")
    cli(*source, "--name", "theirs", "--study", "other", *subject, *text, "--max-norm", 10).well()
    cli(*source, "--name", "joined", "--study", "run").well()
    records = [read_json(root / name / "run.json")["skipped"] for name in ("run_a", "theirs", "joined")]
    assert records[0] == records[1] == records[2]
    refused = cli(*source, "--name", "third", "--study", "run", "--skip-positions", 1)
    refused.failed_in_one_line("skips other tokens", "skip.positions: 0 there, 1 now")
    cli("harvest", "--sae", "run_a", "--sae", "joined", "--sae", "theirs", "--root", root).well()
    tables = [Run.open(name, root).latents() for name in ("run_a", "joined", "theirs")]
    assert tables[0]["n_firings"].sum() > 0
    np.testing.assert_array_equal(tables[0]["n_firings"], tables[1]["n_firings"])
    np.testing.assert_array_equal(tables[1]["n_firings"], tables[2]["n_firings"])


def test_steps_make_up_for_skipped_positions(tiny_neox_dir: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = Settings().corpus.model_copy(
        update={"kind": "text", "source": (str(tiny_recipe.parent / "texts"),), "context": CONTEXT}
    )
    corpus = prepare_corpus(recipe, *load_tokenizer(str(tiny_neox_dir)), tmp_path)
    stream = ActivationStream(Subject.load(str(tiny_neox_dir), dtype="float32"), corpus, "layers.1.mlp")
    stream.skip = Skip(positions=16)
    batches = TrainingBatches(stream, 2048, 256)
    assert (batches.tokens_per_step, batches.sequences_per_step, len(batches)) == (256, 16, 8)
    places = batches.places(2)
    assert places is not None
    assert places[:, 1].min() == 16
    x = batches[2]
    index = batches.sequences(2)
    assert torch.equal(x, stream.rows(index)[places[:, 0], places[:, 1]])
    assert x.shape == (int((~corpus.is_special(corpus.rows(index)[:, 16:])).sum()), 16)
    plain = ActivationStream(stream.subject, corpus, "layers.1.mlp")
    assert TrainingBatches(plain, 2048, 256).fingerprint != batches.fingerprint


def test_a_target_has_the_tokens_of_its_input(tiny_neox_dir: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    """Also where the target is the input of another study, with a limit of its own."""
    settings = Settings().with_values(
        subject={"hookpoint": "layers.0", "target": "layers.1.mlp"},
        corpus={"kind": "text", "source": (str(tiny_recipe.parent / "texts"),), "context": CONTEXT},
        skip={"max_norm": 1.02, "positions": 2},
        training={"tokens": 2048, "batch_tokens": 256},
    )
    other = settings.with_values(subject={"hookpoint": "layers.1.mlp"})
    subject = Subject.load(str(tiny_neox_dir), dtype="float32")
    corpus = prepare_corpus(settings.corpus, *load_tokenizer(str(tiny_neox_dir)), tmp_path)
    source = Source(subject, corpus, open_streams(subject, corpus, ["layers.0", "layers.1.mlp"], {}))
    for stream in source.streams.values():
        stream.skip = find_skip(settings, subject)
        limit_norms(stream, settings)
    batches = [source.batches(settings), source.batches(settings, "layers.1.mlp"), source.batches(other)]
    x, y, alone = read_batches(batches, 1)
    index = batches[0].sequences(1)
    values = {name: stream.rows(index) for name, stream in source.streams.items()}
    kept, of_target = (stream.find_kept(index, values[name]) for name, stream in source.streams.items())
    assert not torch.equal(kept, of_target)
    assert not kept[:, 2:].all()
    assert torch.equal(x, values["layers.0"][kept])
    assert torch.equal(y, values["layers.1.mlp"][kept])
    assert torch.equal(y, batches[1][1])
    assert torch.equal(alone, values["layers.1.mlp"][of_target])
    assert batches[1].fingerprint == batches[0].fingerprint


def test_transcoders_train_with_a_norm_limit(train: Any, tmp_path: Path) -> None:
    train("plain", "t", "--target", "h.1", "--max-norm", 1.02, hookpoint="h.0").well()
    record = read_json(tmp_path / "runs/t_a/run.json")
    assert record["target"] == "h.1"
    assert record["skipped"]["norm_limit"] > 0
    assert "quality" not in table_metadata(tmp_path / "runs/t_a/training.parquet")


def test_settings_without_skipping_keep_their_hash() -> None:
    assert "skip" not in Settings().identity()
    assert digest(Settings().identity()) == "970ab30fef86509d6b69c7461de747cad469e1c62413bfddd58bcf24a4cc2ebf"
    skipping = validated({"skip": {"tokens": ["eos", 5, "bos", "eos"]}}, "a recipe")
    assert skipping.skip.tokens == ("5", "bos", "eos")
    assert skipping.identity()["skip"]["tokens"] == ["5", "bos", "eos"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_norm": 1.0}, "greater than 1"),
        ({"positions": -1}, "greater than or equal to 0"),
        ({"tokens": "eos"}, "tuple"),
    ],
)
def test_a_wrong_setting_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        check_table(SkipSettings, values, "a recipe")


def test_skipping_whole_sequences_is_refused(train: Any) -> None:
    train("plain", "run", "--skip-positions", CONTEXT).failed_in_one_line("--skip-positions", "context = 32")


def test_tokens_are_found_by_name_text_and_id(tiny_neox_dir: Path) -> None:
    tokenizer, _ = load_tokenizer(str(tiny_neox_dir))
    assert resolve_tokens(["eos", "<|endoftext|>", "7", "x"], tokenizer, "m") == tuple(
        sorted({tokenizer.eos_token_id, 7, tokenizer("x")["input_ids"][0]})
    )
    for name, words in [
        ("the brown", "tokens"),
        ("320", "not an id of model 'm'; give 0 to 319"),
        ("pad", "the tokenizer of model 'm' has none; it has bos, eos"),
    ]:
        with pytest.raises(BadInput, match=words):
            resolve_tokens([name], tokenizer, "m")


def test_an_unknown_token_fails_before_the_text(train: Any, tmp_path: Path) -> None:
    train("plain", "run", "--exclude-tokens", "no such token").failed_in_one_line("'no such token'", "tokens")
    assert not (tmp_path / "runs" / "corpora").exists()
