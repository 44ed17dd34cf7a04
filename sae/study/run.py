"""A run's folder: one trained SAE and everything measured on it.

    run = Run.open("demo_a")      # the folder eval_runs/demo_a
    run.settings, run.record      # how it was trained
    run.sae()                     # the weights
    run.latents()                 # a table with one row per latent

``run.json`` is written before training starts and does not change. Each later stage writes one file with the digest of
its inputs, so the disk alone shows whether a stage is done, missing or out of date.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Self

from pydantic import Field, with_config
from typing_extensions import TypedDict

from sae.common.commands import DEFAULT_ROOT, command
from sae.common.errors import BadInput, NotFound, SettingsDiffer, UserError, suggest
from sae.common.files import digest, digest_file, mapping_differences, read_table, table_metadata
from sae.common.package_data import TOP
from sae.common.records import OPEN, check_pieces, digest_pieces, read_record
from sae.common.records import write_record as write
from sae.settings import LARGEST_SEED, Settings, validated

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from sae.dictionaries.formats import About
    from sae.dictionaries.sae import Sae
    from sae.firings.store import FiringStore
    from sae.text.corpus import Corpus

RESERVED = frozenset(
    {"alignments", "reports", "recipes", "reference", "corpora", "logs"}
    | {f"cache.sqlite{ending}" for ending in ("", "-wal", "-shm", "-journal")}
)
MAIN_SCORER = "detection"  # the scorer of the columns without a prefix; other scorers' columns start with their name
_BASELINE = "ngram"  # its explanations count only for latents without others
_SCORE_COLUMNS = (
    *("balanced_accuracy", "ba_low", "ba_high", "tpr", "tnr", "auroc", "auroc_low", "auroc_high"),
    *("n_active", "n_inactive", "n_failed"),
)
LATENT_STAGES = ("firing", "overlap", "contexts", "scores")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*(?:-[A-Za-z0-9._]+)*")
_LONGEST_NAME = 80  # an alignment's file name holds two of them
_WEIGHTS = ("sae.safetensors", "sae_weights.safetensors", "dictionary.safetensors")  # see sae.dictionaries.checkpoint
_SEAL = "weights.json"
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scipy", "pandas", "openai")


class _File:
    """The path of a file or folder of a run."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: Run, _: type[Run]) -> Path:
        return run.folder / self._name


_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]


@with_config(OPEN)
class SubjectFacts(TypedDict):
    source: str
    fingerprint: str
    dtype: NotRequired[str]
    d_in: NotRequired[_Positive]


@with_config(OPEN)
class CorpusFacts(TypedDict):
    key: Annotated[str, Field(pattern=r"^\w+$")]  # a folder's name
    fingerprint: str
    kind: NotRequired[str]
    n_tokens: NotRequired[_Count]


@with_config(OPEN)
class BatchOrder(TypedDict):
    seed: _Count
    fingerprint: str | None
    steps: _Count


@with_config(OPEN)
class SkipFacts(TypedDict):
    """What ``settings.skip`` means for this model, text and hookpoint; absent if nothing is skipped."""

    token_ids: list[_Count]
    median_norm: float | None  # of a fixed sample of the tokens that are not skipped otherwise
    norm_limit: float | None  # tokens with a larger norm are skipped


Imported = TypedDict(
    "Imported",
    {
        "from": str,  # a keyword, so there is no class of it
        "format": str,
        "files": dict[str, str],
        "architecture": str,
        "d_in": _Positive,
        "num_latents": _Positive,
        "k": _Positive | None,
        "folded": list[str],
    },
)


@with_config(OPEN)
class RunRecord(TypedDict):
    """The content of ``run.json``."""

    schema: Literal[1]
    name: str
    study: str
    seed: _Count | None
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d")]
    subject: SubjectFacts
    hookpoint: str
    target: NotRequired[str]  # of a transcoder
    corpus: CorpusFacts
    batch_order: BatchOrder
    settings: dict[str, Any]
    settings_digest: NotRequired[str]
    imported: NotRequired[Imported]
    ranks: NotRequired[dict[str, Any]]
    precision: NotRequired[Literal["float32", "bfloat16", "int8"]]
    skipped: NotRequired[SkipFacts]
    packages: NotRequired[dict[str, str]]
    git_commit: NotRequired[str | None]


@with_config(OPEN)
class WeightsRecord(TypedDict):
    """The content of ``weights.json``, which binds the weights to the run; older runs have none."""

    run: str  # Run.id
    sha256: str
    digests: dict[str, list[str]]  # of the pieces of the weights and of cfg.json


@dataclass(frozen=True)
class Run:
    """One trained SAE and everything measured on it, in the folder ``root/name``."""

    name: str
    root: Path

    record_path = _File("run.json")
    training_log_path = _File("training.parquet")
    state_folder = _File("training-state")
    firings_folder = _File("firings")
    journal_path = _File("journal.sqlite")

    @classmethod
    def open(cls, name: str, root: Path | str = DEFAULT_ROOT) -> Self:
        """Open an existing run. Raises NotFound with suggestions."""
        run = cls(name, Path(root))
        if not _NAME.fullmatch(name) or not run.has_begun:
            runs = all_runs(run.root)
            known = [r.name for r in runs if not r.is_control] or [r.name for r in runs]
            train = command(run.root, "train")
            hint = f"did you mean {suggest(name, known)}?" if known else f"train one with `{train}`"
            raise NotFound(f"run {name!r} does not exist under {str(run.root)!r}; {hint}")
        return run

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def has_begun(self) -> bool:
        return self.record_path.is_file()

    @property
    def weights_path(self) -> Path:
        """The weights; their file name depends on the architecture's native format."""
        paths = [self.folder / name for name in _WEIGHTS]
        return next((path for path in paths if path.is_file()), paths[0])

    def stage_path(self, stage: str) -> Path:
        """Return the path of a stage's table (see ``LATENT_STAGES``)."""
        return self.folder / f"latents.{stage}.parquet"

    @functools.cached_property
    def record(self) -> RunRecord:
        """The content of ``run.json``, checked."""
        path = self.folder / "run.json"
        fix = "restore it, or delete the run (`runs --delete`) and train it again"
        record = read_record(path, RunRecord, fix)
        if record["name"] != self.name:
            raise BadInput(
                f"{str(path)!r} is of run {record['name']!r}; rename the folder to that, or delete it if it is a copy"
            )
        return record

    @functools.cached_property
    def id(self) -> str:
        """The digest of what distinguishes this run; its weights, firing store and journal carry it."""
        record = self.record
        inputs = [record["subject"]["fingerprint"], record["corpus"]["fingerprint"], record["hookpoint"]]
        return digest([self.name, self.study, self.seed, record.get("settings_digest"), inputs])

    @property
    def study(self) -> str:
        return self.record["study"]

    @property
    def seed(self) -> int | None:
        """The seed; ``None`` for an imported SAE."""
        return self.record["seed"]

    @property
    def imported(self) -> Imported | None:
        """The source files of an imported SAE; ``None`` for one that was trained here."""
        return self.record.get("imported")

    @property
    def k(self) -> int | None:
        """K, the (average) number of latents that fire per token; ``None`` if an imported SAE does not say."""
        return self.imported["k"] if self.imported else self.settings.training.k

    @property
    def is_control(self) -> bool:
        """Whether some weights were not trained (see :mod:`sae.study.controls`)."""
        return not self.imported and self.settings.training.frozen != "nothing"

    @property
    def parent_study(self) -> str:
        """The study; for a control, the study that it is a control of."""
        return (self.study.rpartition("-")[0] if self.is_control else "") or self.study

    @functools.cached_property
    def settings(self) -> Settings:
        values = dict(self.record["settings"])
        if isinstance(contexts := values.get("contexts", {}), dict):
            values["contexts"] = {"split": "text", **contexts}  # of runs from before there was another
        return validated(values, f"run {self.name!r}")

    @property
    def is_trained(self) -> bool:
        """Whether training has finished: cfg.json is written last."""
        return self.weights_path.is_file() and (self.folder / "cfg.json").is_file()

    @functools.cached_property
    def weights_digest(self) -> str:
        """The SHA-256 of the weights; raises BadInput if they are damaged or of another run."""
        path = self.folder / _SEAL
        if not self.is_sealed:
            return digest_file(self.weights_path)
        fix = "restore the run's folder, or delete the run and train or import it again"
        seal = read_record(path, WeightsRecord, fix)
        if seal["run"] != self.id:
            raise BadInput(f"{str(self.weights_path)!r} holds the weights of another run; {fix}")
        for name, digests in seal["digests"].items():
            if not check_pieces(self.folder / Path(name).name, digests):
                raise BadInput(f"{str(self.folder / name)!r} is damaged: it does not match its digest; {fix}")
        return seal["sha256"]

    @property
    def is_sealed(self) -> bool:
        return (self.folder / _SEAL).is_file()

    def seal(self) -> None:
        """Bind the weights to the run."""
        files = (self.weights_path, self.folder / "cfg.json")
        digests = {path.name: digest_pieces(path) for path in files}
        content = {"run": self.id, "sha256": digest_file(self.weights_path), "digests": digests}
        write(self.folder / _SEAL, content)

    def siblings(self) -> list[Run]:
        """Return the other trained runs of the study."""
        return [r for r in study_runs(self.study, self.root) if r.name != self.name and r.is_trained]

    def check_latent(self, latent: int) -> None:
        """Raise NotFound if the run has no latent of this number."""
        n = self.settings.training.num_latents
        if not 0 <= latent < n:
            raise NotFound(f"latent {latent} does not exist in run {self.name!r}; it has latents 0 to {n - 1}")

    def missing_error(self, what: str, stage: str) -> NotFound:
        """Return the error for a missing stage, with the command that runs it."""
        return NotFound(f"run {self.name!r} has no {what}; run `{command(self.root, stage, '--sae', self.name)}`")

    def suggest_another_run(self) -> str:
        """Return advice, for an error message, on how to add a run to the study."""
        if self.imported:
            words = command(self.root, "import", "--study", self.study)
            return f"import another SAE (`{words} --from … --name …`)"
        return f"train another seed (`{command(self.root, 'train', '--name', self.study)} --seeds …`)"

    def sae(self) -> Sae:
        from sae.dictionaries.checkpoint import load_sae

        _ = self.weights_digest
        return load_sae(self.folder)

    def read_decoder(self) -> npt.NDArray[np.floating]:
        """Read the decoder [M, D]."""
        from safetensors import safe_open

        _ = self.weights_digest
        with safe_open(self.weights_path, framework="numpy") as weights:
            decoder: npt.NDArray[np.floating] = weights.get_tensor("W_dec")
        return decoder

    def about(self) -> About:
        """Return the facts that other programs' formats store with the weights."""
        from sae.dictionaries.formats import About

        subject = self.settings.subject
        return About(subject.model, self.record["hookpoint"], self.settings.corpus.context, self.seed)

    def corpus(self) -> Corpus:
        from sae.text.corpus import Corpus

        return Corpus.open(self.root / "corpora" / self.record["corpus"]["key"])

    def store(self) -> FiringStore:
        from sae.firings.store import HARVEST_AGAIN, FiringStore

        store = FiringStore.open(self.firings_folder)
        if store.record.get("run", self.id) not in (None, self.id):
            raise BadInput(f"{str(store.folder)!r} is of another run than {self.name!r}; {HARVEST_AGAIN}")
        return store

    def latents(self) -> pd.DataFrame:
        """Return a table with one row per latent: the columns of all stages.

        The scores are the latest successful ones of draw 0 and replicate 0, of a language model's explanation if there
        is one, else of the n-gram baseline. Detection has plain column names, fuzzing a prefix
        (``fuzzing_balanced_accuracy`` …).
        """
        stages = [stage for stage in LATENT_STAGES if self.stage_path(stage).exists()]
        read = {stage: read_table(self.stage_path(stage)) for stage in stages}
        if "scores" in read:
            read["scores"] = _choose_scores(read["scores"])
        tables = [table.set_index("latent") for table in read.values()]
        if not tables:
            raise self.missing_error("firings", "harvest")
        joined = tables[0]
        for table in tables[1:]:
            joined = joined.join(table[table.columns.difference(joined.columns, sort=False)], how="left")
        return joined.reset_index()

    def stage_inputs(self, stage: str) -> str | None:
        """Return the digest of the inputs of a stage's table; ``None`` if there is no table."""
        return table_metadata(self.stage_path(stage)).get("inputs")


def _choose_scores(table: pd.DataFrame) -> pd.DataFrame:
    own = table[(table["control"] == "none") & ~table.reindex(columns=["draw", "replicate"]).gt(0).any(axis=1)]
    rank = 2 * (own["status"] == "ok") + (own["explainer"] != _BASELINE)
    own = own.loc[rank.sort_values(kind="stable").index]
    others = sorted(set(own["scorer"].dropna()) - {MAIN_SCORER})
    found = own[~own["scorer"].isin(others)].drop_duplicates("latent", keep="last").set_index("latent")
    for scorer in others:
        other = own[own["scorer"] == scorer].drop_duplicates("latent", keep="last").set_index("latent")
        kept = ["status", *(column for column in _SCORE_COLUMNS if column in other)]
        found = found.join(other[kept].add_prefix(f"{scorer}_"), how="outer")
    return found.reset_index()


@dataclass(frozen=True)
class Study:
    """Settings, and the seeds to train with them: runs that differ in their seed alone."""

    name: str
    settings: Settings
    seeds: tuple[int, ...]


def name_studies(name: str, hookpoints: Sequence[str]) -> list[str]:
    """Return the study of each hookpoint: ``name`` for one, ``name-layers.1.mlp`` and so on for several."""
    return [name] if len(hookpoints) <= 1 else [f"{name}-{label_hookpoint(hookpoint)}" for hookpoint in hookpoints]


def label_hookpoint(hookpoint: str) -> str:
    """Return a hookpoint as a part of a run's name, in which no colon may be: ``layers.1.mlp-in`` for an input."""
    return hookpoint.replace(":", "-")


def make_studies(name: str, settings: Settings, hookpoints: Sequence[str], seeds: Sequence[int]) -> list[Study]:
    """Return one study per hookpoint; without any, one study with the hookpoint of the settings."""
    chosen: Sequence[str | None] = hookpoints or [None]
    return [
        Study(check_name(study), settings.with_values(subject={"hookpoint": hookpoint}), tuple(seeds))
        for study, hookpoint in zip(name_studies(name, hookpoints), chosen, strict=True)
    ]


def all_runs(root: Path) -> list[Run]:
    """Return all runs under ``root``, sorted by name."""
    if not root.is_dir():
        if root.exists():
            raise BadInput(f"--root {str(root)!r} is not a folder; name the folder that holds the runs")
        return []
    return [Run(f.name, root) for f in sorted(root.iterdir()) if f.name not in RESERVED and (f / "run.json").is_file()]


def study_runs(study: str, root: Path) -> list[Run]:
    """Return the runs of a study in the order of their suffixes (a … z, aa …)."""

    def belongs(run: Run) -> bool:
        try:
            return run.study == study
        except (UserError, OSError):
            if run.name.startswith(f"{study}_"):  # probably of this study; others do not matter here
                raise
            return False

    return sorted(filter(belongs, all_runs(root)), key=lambda r: (len(r.name), r.name))


def split_readable(runs: Sequence[Run]) -> tuple[list[Run], dict[str, str]]:
    """Return the runs whose records can be read, and the error messages of the others by name."""
    found, damaged = [], {}
    for run in runs:
        try:
            run.settings  # noqa: B018
            found.append(run)
        except (BadInput, SettingsDiffer, OSError) as error:
            damaged[run.name] = str(error)
    return found, damaged


def newest_study(root: Path) -> list[Run]:
    """Return the runs of the latest study; controls count only if there is nothing else."""
    runs, damaged = split_readable(all_runs(root))
    runs = [run for run in runs if not run.is_control] or runs
    if damaged and not runs:
        raise BadInput(next(iter(damaged.values())))
    if not runs:
        raise NotFound(f"there are no runs under {str(root)!r}; train some with `{command(root, 'train')}`")
    return study_runs(max(runs, key=lambda r: r.record["created"]).study, root)


def check_name(name: str) -> str:
    """Return ``name`` if it is valid for a run or study; raise BadInput otherwise."""
    if name.lower() in RESERVED:  # some file systems ignore case
        raise BadInput(f"name {name!r} is reserved for files of the program; choose another")
    if len(name) > _LONGEST_NAME:
        raise BadInput(f"name {name[:20]!r}… has {len(name)} characters; choose one of at most {_LONGEST_NAME}")
    if not _NAME.fullmatch(name):
        raise BadInput(f"name {name!r}: use letters, digits, '.', '_' and single '-', starting with a letter or digit")
    return name


def make_suffix(index: int) -> str:
    """Return the suffix of a study's run: 0 → a, 25 → z, 26 → aa."""
    text = ""
    while index >= 0:
        text = chr(ord("a") + index % 26) + text
        index = index // 26 - 1
    return text


def plan_study(study: str, seeds: list[int], settings: Settings, root: Path) -> list[tuple[Run, int]]:
    """Return each seed's run, existing or new; raise SettingsDiffer if the study was trained with other settings."""
    check_name(study)
    if len(set(seeds)) != len(seeds) or not seeds or min(seeds) < 0 or max(seeds) > LARGEST_SEED:
        raise BadInput(f"seeds {' '.join(map(str, seeds))}: give whole numbers from 0 to {LARGEST_SEED}, each once")
    existing = study_runs(study, root)
    for run in existing:
        differences = mapping_differences(run.settings.shared(), settings.shared())
        if not run.imported:
            theirs, ours = ({"training": s.training.identity()} for s in (run.settings, settings))
            differences += mapping_differences(theirs, ours)
        if differences:
            raise SettingsDiffer(
                f"run {run.name!r} exists with other settings ({'; '.join(differences)}); "
                "choose another --name, or give the same settings"
            )
    by_seed = {run.seed: run for run in existing if not run.imported}
    taken = {run.name for run in existing}
    planned, index = [], 0
    for seed in seeds:
        if seed in by_seed:
            planned.append((by_seed[seed], seed))
            continue
        while (name := f"{study}_{make_suffix(index)}") in taken:
            index += 1
        run = Run(name, root)
        if run.has_begun:
            raise SettingsDiffer(f"run {name!r} exists and belongs to study {run.study!r}; choose another --name")
        check_folder_is_free(run)
        taken.add(name)
        planned.append((run, seed))
    return planned


def check_folder_is_free(run: Run) -> None:
    """Raise BadInput if the folder of a new run has files; hidden ones may be left from a killed command."""
    if run.folder.exists() and any(not file.name.startswith(".") for file in run.folder.iterdir()):
        raise BadInput(f"{str(run.folder)!r} exists and is not a run; move it away or choose another --name")


@contextmanager
def remove_failed_runs(runs: Sequence[Run]) -> Iterator[None]:
    """Delete new runs if the block fails before a checkpoint or weights, so that their names are free again."""
    new = [run for run in runs if not run.has_begun]
    try:
        yield
    except Exception:
        for run in new:
            if not run.is_trained and not (run.state_folder.is_dir() and any(run.state_folder.iterdir())):
                shutil.rmtree(run.folder, ignore_errors=True)
        raise


def _aligned_with(run: Run) -> list[str]:
    folder = run.root / "alignments"
    after = (path.stem.removeprefix(f"{run.name}--") for path in folder.glob(f"{run.name}--*.parquet"))
    before = (path.stem.removesuffix(f"--{run.name}") for path in folder.glob(f"*--{run.name}.parquet"))
    return sorted({*after, *before})


def progress_of(run: Run) -> dict[str, Any]:
    """Return the facts of a run and its finished stages, as JSON."""
    record = run.record
    training = run.settings.training
    table = {stage: run.stage_path(stage).exists() for stage in ("firing", "overlap", "scores")}
    return {
        "name": run.name,
        "study": run.study,
        "control_of": run.parent_study if run.is_control else None,
        "seed": run.seed,
        "created": record["created"],
        "subject": record["subject"]["source"],
        "hookpoint": record["hookpoint"],
        "architecture": training.architecture,
        "num_latents": training.num_latents,
        "k": run.k,
        "tokens": None if run.imported else training.tokens,
        "trained": run.is_trained,
        "harvested": table["firing"] and run.is_trained,
        "aligned": table["overlap"],
        "aligned_with": _aligned_with(run) if table["overlap"] else [],
        "explained": run.journal_path.exists(),
        "scored": table["scores"],
    }


def git_commit() -> str | None:
    """Return the commit of this program's checkout, with ``+`` if files have changed; ``None`` outside a checkout."""
    if not (TOP / ".git").exists():  # else git would find another project's checkout around it
        return None
    try:
        ask = functools.partial(subprocess.run, cwd=TOP, capture_output=True, text=True, timeout=10, check=True)
        commit = ask(["git", "rev-parse", "HEAD"]).stdout.strip()
        return commit + ("+" if ask(["git", "status", "--porcelain", "--untracked-files=no"]).stdout else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_record(run: Run, seed: int | None, study: str, settings: Settings, provenance: dict[str, Any]) -> None:
    """Write ``run.json``; ``provenance`` describes subject, corpus and batches. ``seed`` is ``None`` if imported."""
    record = {
        "name": run.name,
        "study": study,
        "seed": seed,
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        **provenance,
        "settings": settings.model_dump(mode="json"),
        "settings_digest": digest(settings.identity()),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git_commit": git_commit(),
    }
    write(run.record_path, record)
