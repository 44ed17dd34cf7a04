"""Settings: recipes and flags alike, every mistake named, and an identity that is what the weights depend on."""

from __future__ import annotations

import contextlib
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sae.common.errors import BadInput, NotFound
from sae.common.files import digest
from sae.settings import LARGEST_SEED, Settings, validated
from sae.study.recipes import read_recipe, read_sweep, settings_from

RECIPES = sorted((Path(__file__).parents[2] / "eval_runs" / "recipes").glob("*.toml"))
KEYS = [(table, key) for table, field in Settings.model_fields.items() for key in field.annotation.model_fields]  # type: ignore[union-attr]


def test_the_defaults_are_valid_and_come_back() -> None:
    settings = Settings()
    assert validated(settings.model_dump(mode="json"), "here") == settings
    assert settings_from(None) == settings


def test_default_identity_is_that_of_older_versions() -> None:
    assert digest(Settings().identity()) == "970ab30fef86509d6b69c7461de747cad469e1c62413bfddd58bcf24a4cc2ebf"
    by_text = Settings().with_values(contexts={"split": "text"}).contexts
    of_contexts = digest(by_text.model_dump(mode="json"))
    assert of_contexts == "fab390c3a3ad00421497284de22632b460b5778e66e448528f36d5e80cf4f7ed"


@pytest.mark.parametrize("values", [{"columns": ("a",)}, {"weights": (1.0,)}, {"shuffle_buffer": 9}])
def test_options_of_datasets_need_a_dataset(values: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"corpus.{next(iter(values))} = .* needs corpus.kind = 'dataset'"):
        Settings().with_values(corpus=values)
    Settings().with_values(corpus={"kind": "dataset", "source": ("x",), **values})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_with_the_program(path: Path) -> None:
    recipe = tomllib.loads(path.read_text())
    settings = read_sweep(path).points[0].study.settings if "sweep" in recipe else settings_from(path)
    assert validated(settings.model_dump(mode="json"), "here") == settings
    # Every key says something: none repeats nothing but is misspelt, none is for show.
    for table, values in recipe.items():
        if table in ("sweep", "explain"):
            continue
        for key, value in values.items():
            assert settings.model_dump(mode="json")[table][key] == value


def test_the_demo_is_what_the_demo_must_be() -> None:
    settings = settings_from(next(path for path in RECIPES if path.stem == "demo"))
    assert settings.training.num_latents >= 1024
    assert settings.training.k >= 8
    assert settings.training.k / settings.training.num_latents <= 0.0101
    assert settings.subject.model == "bundled"


def test_the_command_line_stands_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[training]\nk = 4\nnum_latents = 32\n[corpus]\ncontext = 64\n")
    found = settings_from(path, training={"k": 5, "tokens": None}, corpus={"context": None}, subject={})
    assert (found.training.k, found.training.num_latents, found.corpus.context) == (5, 32, 64)
    assert found.training.tokens == Settings().training.tokens


@given(st.sampled_from(KEYS), st.data())
def test_a_misspelt_key_is_named_with_its_nearest(where: tuple[str, str], data: st.DataObject) -> None:
    table, key = where
    at = data.draw(st.integers(0, len(key) - 1))
    wrong = key[:at] + key[at + 1 :]
    assume(wrong and (table, wrong) not in KEYS and len(key) > 3)
    with pytest.raises(BadInput) as error:
        validated({table: {wrong: 1}}, "recipe 'x'")
    assert f"unknown key '{table}.{wrong}'" in str(error.value)
    assert f"'{key}'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("training", "k", 0),
        ("training", "num_latents", 1.5),
        ("training", "tokens", "many"),
        ("training", "learning_rate", -1),
        ("corpus", "context", 4),
        ("corpus", "kind", "web"),
        ("harvest", "window", 1000),
        ("subject", "dtype", "int8"),
        ("contexts", "n_active", 1),
        ("training", "k", True),
        ("training", "num_latents", 2**31),
        ("training", "learning_rate", float("inf")),
        ("corpus", "context", 10**20),
        ("corpus", "order_seed", 2**63),
        ("subject", "model", ""),
        ("subject", "hookpoint", "a\0b"),
    ],
)
def test_a_value_that_cannot_be_is_named(table: str, key: str, value: object) -> None:
    with pytest.raises(BadInput) as error:
        validated({table: {key: value}}, "recipe 'x'")
    assert str(error.value).startswith(f"recipe 'x': {table}.{key} = {value!r}: ")
    assert "\n" not in str(error.value)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_k_is_at_most_the_width(k: int, num_latents: int) -> None:
    values = {"training": {"k": k, "num_latents": num_latents}}
    if k <= num_latents:
        assert validated(values, "here").training.k == k
        return
    with pytest.raises(BadInput, match=f"training.k = {k} is more than training.num_latents = {num_latents}"):
        validated(values, "here")


IRRELEVANT: list[tuple[str, str, Any]] = [
    ("training", "checkpoint_steps", 7),
    ("harvest", "tokens", 9),
    ("harvest", "window", 8),
    ("contexts", "n_active", 9),
]
RELEVANT: list[tuple[str, str, Any]] = [
    ("subject", "model", "gpt2"),
    ("subject", "hookpoint", "layers.0"),
    ("subject", "dtype", "bfloat16"),
    ("corpus", "context", 64),
    ("corpus", "order_seed", 1),
    ("corpus", "end_token", False),
    ("corpus", "max_tokens", 5000),
    ("training", "k", 9),
    ("training", "tokens", 9),
    ("training", "auxk", 0.0),
    ("training", "learning_rate", 1e-3),
]


@pytest.mark.parametrize(("table", "key", "value"), IRRELEVANT)
def test_the_identity_excludes_what_weights_ignore(table: str, key: str, value: Any) -> None:
    assert Settings().with_values(**{table: {key: value}}).identity() == Settings().identity()


@pytest.mark.parametrize(("table", "key", "value"), RELEVANT)
def test_what_the_weights_depend_on_is(table: str, key: str, value: Any) -> None:
    assert Settings().with_values(**{table: {key: value}}).identity() != Settings().identity()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)


@pytest.mark.fuzz
@given(st.sampled_from(KEYS), SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS))
def test_any_value_is_refused_or_bounded(field: tuple[str, str], value: Any) -> None:
    table, key = field
    try:
        found = getattr(getattr(validated({table: {key: value}}, "x"), table), key)
    except BadInput:
        return
    if isinstance(found, int | float):
        assert -1 < found <= LARGEST_SEED
        assert isinstance(value, bool) == isinstance(found, bool)


@pytest.mark.fuzz
@given(st.binary(max_size=200) | st.text(alphabet="ab.=[]{}\"'\n 1_#\\u", max_size=60).map(str.encode))
@example(b"x = " + b"[" * 20_000)
@example(b".".join([b"a"] * 20_000) + b" = 1")
@example(b"x = " + b"9" * 5000)
@example(b"[sweep]\ntraining.k = [%s]" % b",".join(b"%d" % k for k in range(2000)))
@example(b"[sweep]\ntraining.learning_rate = ['a', 2020-01-01]")
@example(b"[sweep]\ntraining.k = [1, 2]\nseeds = [%d]" % 2**64)
def test_any_recipe_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.toml"
        path.write_bytes(content)
        for read in (settings_from, read_sweep):
            with contextlib.suppress(BadInput):
                read(path)


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"absent\.toml' does not exist; bundled recipes: "):
        read_recipe(tmp_path / "absent.toml")
    (tmp_path / "widths.toml").write_text("")
    with pytest.raises(NotFound, match=r"there is .*widths\.toml"):
        read_recipe(tmp_path / "width.toml")
    with pytest.raises(IsADirectoryError):
        read_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    with pytest.raises(BadInput, match="not valid TOML"):
        read_recipe(tmp_path / "latin.toml")


def test_tokens_may_be_written_as_amounts(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[training]\ntokens = "2M"\nbatch_tokens = "8k"\n[harvest]\ntokens = "500k"\n')
    found = settings_from(recipe)
    assert (found.training.tokens, found.training.batch_tokens, found.harvest.tokens) == (2_000_000, 8000, 500_000)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(BadInput, match=r"training.architecture = 'softmax' is not known; choose "):
        settings_from(None, training={"architecture": "softmax"})
