"""A run's folder: where everything measured on one trained SAE lies, and how it came to be.

``run.json`` is provenance, written before training starts and never changed by later stages. Every later
stage leaves one file that carries the digest of its inputs, so whether a stage is done, missing or
stale is read off the disk and never remembered anywhere else.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.common.commands import DEFAULT_ROOT, command
from sae.common.errors import BadInput, NotFound, SettingsDiffer, suggest
from sae.common.files import (
    SCHEMA,
    digest,
    digest_file,
    mapping_differences,
    read_json,
    read_table,
    table_metadata,
    write_json,
)
from sae.common.package_data import TOP
from sae.settings import Settings, validated

if TYPE_CHECKING:
    import pandas as pd

    from sae.dictionaries.formats import About
    from sae.dictionaries.sae import Sae
    from sae.firings.store import FiringStore
    from sae.text.corpus import Corpus

RESERVED = frozenset({"alignments", "reports", "recipes", "reference", "corpora", "logs"})
MAIN_SCORER = "detection"
"""Whose scores are *the* scores of latents; those of other scorers stand beside them, under their names."""
_BASELINE = "ngram"  # whose explanations stand back behind others' of the same latent
_BESIDE = (
    *("balanced_accuracy", "ba_low", "ba_high", "tpr", "tnr", "auroc", "auroc_low", "auroc_high"),
    *("n_active", "n_inactive", "n_failed"),
)
LATENT_STAGES = ("firing", "overlap", "contexts", "scores")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*(?:-[A-Za-z0-9._]+)*")
_LONGEST_NAME = 80  # two of them, and a few letters more, are the name of an alignment's file
_WEIGHTS = ("sae.safetensors", "sae_weights.safetensors", "dictionary.safetensors")  # see sae.dictionaries.checkpoint
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scipy", "pandas", "openai")


def check_name(name: str) -> str:
    """``name`` if a run or study may bear it, else one line that says why not."""
    if name in RESERVED:
        raise BadInput(f"name {name!r} is reserved for a folder of the program; choose another")
    if len(name) > _LONGEST_NAME:
        raise BadInput(f"name {name[:20]!r}… has {len(name)} characters; choose one of at most {_LONGEST_NAME}")
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"name {name!r} cannot be a folder of runs: use letters, digits, '.', '_' and single '-', "
            "beginning with a letter or digit"
        )
    return name


def make_suffix(index: int) -> str:
    """``0 → a``, ``25 → z``, ``26 → aa``: the suffixes of a study's runs."""
    text = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


@dataclass(frozen=True)
class Run:
    """One trained SAE and all that was measured on it. ``Run.open("run_a")`` in a notebook."""

    name: str
    root: Path

    @classmethod
    def open(cls, name: str, root: Path | str = DEFAULT_ROOT) -> Run:
        run = cls(name, Path(root))
        if not (run.folder / "run.json").is_file():
            runs = all_runs(run.root)
            known = [r.name for r in runs if not r.is_control] or [r.name for r in runs]
            train = command(run.root, "train")
            hint = f"did you mean {suggest(name, known)}?" if known else f"train one with `{train}`"
            raise NotFound(f"run {name!r} does not exist under {str(run.root)!r}; {hint}")
        return run

    # --- where things lie -----------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def weights_path(self) -> Path:
        """The weights, under the name that the architecture's native format gives them."""
        paths = [self.folder / name for name in _WEIGHTS]
        return next((path for path in paths if path.is_file()), paths[0])

    @property
    def state_folder(self) -> Path:
        return self.folder / "training-state"

    @property
    def firings_folder(self) -> Path:
        return self.folder / "firings"

    @property
    def journal_path(self) -> Path:
        return self.folder / "journal.sqlite"

    @property
    def training_log_path(self) -> Path:
        return self.folder / "training.parquet"

    def stage_path(self, stage: str) -> Path:
        return self.folder / f"latents.{stage}.parquet"

    # --- provenance -----------------------------------------------------------------------------------

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        try:
            record = read_json(self.folder / "run.json")
            if record["schema"] != SCHEMA:
                raise BadInput(
                    f"run {self.name!r} was written in schema {record['schema']}, this program reads {SCHEMA}; "
                    "use the version that wrote it"
                )
        except (ValueError, KeyError, TypeError):
            raise BadInput(
                f"{str(self.folder / 'run.json')!r} is damaged; train the run again under a new name"
            ) from None
        return record

    @property
    def study(self) -> str:
        return self.record["study"]

    @property
    def seed(self) -> int | None:
        """What it was trained from; ``None`` where it was trained elsewhere and imported."""
        return self.record["seed"]

    @property
    def imported(self) -> dict[str, Any] | None:
        """Where an imported dictionary came from, file by file; ``None`` for one that was trained here."""
        return self.record.get("imported")

    @property
    def k(self) -> int | None:
        """Latents that fire per token, or that training aimed at; ``None`` where an imported one does not say."""
        return self.imported["k"] if self.imported else self.settings.training.k

    @property
    def is_control(self) -> bool:
        """Whether some of its weights were kept from learning (see :mod:`sae.study.controls`)."""
        return not self.imported and self.settings.training.frozen != "nothing"

    @property
    def parent_study(self) -> str:
        """The study that it belongs to: a control's is the one that it is held against."""
        return (self.study.rpartition("-")[0] if self.is_control else "") or self.study

    @property
    def origin(self) -> str:
        """``seed 3``, or ``imported``."""
        return "imported" if self.seed is None else f"seed {self.seed}"

    @functools.cached_property
    def settings(self) -> Settings:
        return validated(self.record["settings"], f"run {self.name!r}")

    @property
    def is_trained(self) -> bool:
        return self.weights_path.is_file() and (self.folder / "cfg.json").is_file()  # written in this order

    @functools.cached_property
    def weights_digest(self) -> str:
        return digest_file(self.weights_path)

    def siblings(self) -> list[Run]:
        """The trained runs of the same study, this one left out."""
        return [r for r in study_runs(self.study, self.root) if r.name != self.name and r.is_trained]

    def missing_error(self, what: str, stage: str) -> NotFound:
        """The error that says what the run has none of, and by which command it gets some."""
        return NotFound(f"run {self.name!r} has no {what}; run `{command(self.root, stage, '--sae', self.name)}`")

    def suggest_another_run(self) -> str:
        """How the study gets another run, as part of a sentence."""
        if self.imported:
            words = command(self.root, "import", "--study", self.study)
            return f"import another SAE (`{words} --from … --name …`)"
        return f"train another seed (`{command(self.root, 'train', '--name', self.study)} --seeds …`)"

    # --- contents -------------------------------------------------------------------------------------

    def sae(self) -> Sae:
        from sae.dictionaries.checkpoint import load_sae

        return load_sae(self.folder)

    def about(self) -> About:
        """What other programs' formats want to know of the dictionary."""
        from sae.dictionaries.formats import About

        subject = self.settings.subject
        return About(subject.model, self.record["hookpoint"], self.settings.corpus.context, self.seed)

    def corpus(self) -> Corpus:
        from sae.text.corpus import Corpus

        return Corpus.open(self.root / "corpora" / self.record["corpus"]["key"])

    def store(self) -> FiringStore:
        from sae.firings.store import FiringStore

        return FiringStore.open(self.firings_folder)

    def latents(self) -> pd.DataFrame:
        """One row per latent: every stage's columns, joined.

        Of its scores the last that did not fail, by a language model's explanation before the n-gram baseline's; never
        a control's. They are of detection, those of fuzzing stand beside them (``fuzzing_balanced_accuracy`` …).
        """
        tables = []
        for stage in LATENT_STAGES:
            if not self.stage_path(stage).exists():
                continue
            table = read_table(self.stage_path(stage))
            if stage == "scores":
                table = _scores_of_latents(table)
            tables.append(table.set_index("latent"))
        if not tables:
            raise self.missing_error("firings", "harvest")
        joined = tables[0]
        for table in tables[1:]:
            joined = joined.join(table[table.columns.difference(joined.columns, sort=False)], how="left")
        return joined.reset_index()

    def stage_inputs(self, stage: str) -> str | None:
        """The digest of the inputs from which a stage's table was made; ``None`` where there is no table."""
        return table_metadata(self.stage_path(stage)).get("inputs")


def _scores_of_latents(table: pd.DataFrame) -> pd.DataFrame:
    """A score table as one row per latent; see :meth:`Run.latents`."""
    own = table[table["control"] == "none"]
    rank = 2 * (own["status"] == "ok") + (own["explainer"] != _BASELINE)
    own = own.loc[rank.sort_values(kind="stable").index]
    others = sorted(set(own["scorer"].dropna()) - {MAIN_SCORER})
    found = own[~own["scorer"].isin(others)].drop_duplicates("latent", keep="last").set_index("latent")
    for scorer in others:
        beside = own[own["scorer"] == scorer].drop_duplicates("latent", keep="last").set_index("latent")
        kept = ["status", *(column for column in _BESIDE if column in beside)]
        found = found.join(beside[kept].add_prefix(f"{scorer}_"), how="outer")
    return found.reset_index()


@dataclass(frozen=True)
class Study:
    """One setting, and the seeds to train under it."""

    name: str
    settings: Settings
    seeds: tuple[int, ...]


def name_studies(name: str, hookpoints: Sequence[str]) -> list[str]:
    """Return the names of studies: ``name`` for one hookpoint, ``name-layers.1.mlp`` and so on for several."""
    return [name] if len(hookpoints) <= 1 else [f"{name}-{hookpoint}" for hookpoint in hookpoints]


def make_studies(name: str, settings: Settings, hookpoints: Sequence[str], seeds: Sequence[int]) -> list[Study]:
    """Return one study for each hookpoint, or for that of the settings; see :func:`name_studies`."""
    chosen: Sequence[str | None] = hookpoints or [None]
    return [
        Study(check_name(study), settings.with_values(subject={"hookpoint": hookpoint}), tuple(seeds))
        for study, hookpoint in zip(name_studies(name, hookpoints), chosen, strict=True)
    ]


def all_runs(root: Path) -> list[Run]:
    """Every run under ``root``, by name."""
    if not root.is_dir():
        return []
    return [Run(f.name, root) for f in sorted(root.iterdir()) if f.name not in RESERVED and (f / "run.json").is_file()]


def study_runs(study: str, root: Path) -> list[Run]:
    """The runs of one study in the order of their suffixes (a … z, aa …)."""
    runs = [r for r in all_runs(root) if _is_of(r, study)]
    return sorted(runs, key=lambda r: (len(r.name), r.name))


def _is_of(run: Run, study: str) -> bool:
    """Whether the run is of the study. A damaged record stops only those that it may concern, by the run's name."""
    try:
        return run.study == study
    except BadInput:
        if run.name.startswith(f"{study}_"):
            raise
        return False


def split_readable(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Those of the runs whose records can be read, and of the others what is wrong with them."""
    found, damaged = [], []
    for run in runs:
        try:
            run.record  # noqa: B018
            found.append(run)
        except BadInput as error:
            damaged.append(str(error))
    return found, damaged


def newest_study(root: Path) -> list[Run]:
    """The runs of the study that was begun last; controls do not count where there is anything else."""
    runs, damaged = split_readable(all_runs(root))
    runs = [run for run in runs if not run.is_control] or runs
    if damaged and not runs:
        raise BadInput(damaged[0])
    if not runs:
        raise NotFound(f"there are no runs under {str(root)!r}; train some with `{command(root, 'train')}`")
    return study_runs(max(runs, key=lambda r: r.record["created"]).study, root)


def plan_study(study: str, seeds: list[int], settings: Settings, root: Path) -> list[tuple[Run, int]]:
    """The runs that stand for ``seeds``: those that exist, and new names for the others.

    Raises :class:`SettingsDiffer` where the study was trained under other settings.
    """
    check_name(study)
    if len(set(seeds)) != len(seeds) or not seeds or min(seeds) < 0:
        raise BadInput(f"seeds {' '.join(map(str, seeds))}: give each seed once, as whole numbers from 0 up")
    existing = study_runs(study, root)
    for run in existing:
        common = {"subject", "corpus"} if run.imported else {"subject", "corpus", "training"}
        theirs, ours = ({t: s.identity()[t] for t in common} for s in (run.settings, settings))
        differences = mapping_differences(theirs, ours)
        if differences:
            raise SettingsDiffer(
                f"run {run.name!r} exists with other settings ({'; '.join(differences)}); "
                "give the study another --name, or the same settings"
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
        # What begins with a point is ours: a kill may have left a temporary file of run.json.
        others = (root / name).exists() and any(not f.name.startswith(".") for f in (root / name).iterdir())
        if others and not (root / name / "run.json").is_file():
            raise BadInput(f"{str(root / name)!r} exists and is no run; move it away or choose another --name")
        if (root / name / "run.json").is_file():
            raise SettingsDiffer(
                f"run {name!r} exists and belongs to study {Run(name, root).study!r}; choose another --name"
            )
        taken.add(name)
        planned.append((Run(name, root), seed))
    return planned


def _aligned_with(run: Run) -> list[str]:
    """The runs that it is aligned with, by the names of files: `runs` opens no table."""
    folder = run.root / "alignments"
    after = (path.stem.removeprefix(f"{run.name}--") for path in folder.glob(f"{run.name}--*.parquet"))
    before = (path.stem.removesuffix(f"--{run.name}") for path in folder.glob(f"*--{run.name}.parquet"))
    return sorted({*after, *before})


def progress_of(run: Run) -> dict[str, Any]:
    """How far a run has come: one JSON value, stage by stage."""
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
    """Return the commit of this program's checkout, with ``+`` where it has changes; ``None`` outside one."""
    if not (TOP / ".git").exists():  # an installed program may lie inside another project's checkout
        return None
    try:
        ask = functools.partial(subprocess.run, cwd=TOP, capture_output=True, text=True, timeout=10, check=True)
        commit = ask(["git", "rev-parse", "HEAD"]).stdout.strip()
        return commit + ("+" if ask(["git", "status", "--porcelain", "--untracked-files=no"]).stdout else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_record(run: Run, seed: int | None, study: str, settings: Settings, provenance: dict[str, Any]) -> None:
    """Write ``run.json``. ``provenance`` holds the subject's, corpus's and batch order's records.

    ``seed`` is ``None`` for a dictionary that was not trained here.
    """
    record = {
        "schema": SCHEMA,
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
    write_json(run.folder / "run.json", record)
