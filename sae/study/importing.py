"""Dictionaries that somebody else trained, as runs of a study; and runs handed to other programs.

An imported run has everything that later stages ask of a trained one: weights in the native format, the subject
model and hookpoint whose activations it reads, and the text on which it is harvested. What it has not is a seed and
a batch order of ours: two imports of one study are compared on the same text, whatever each was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae.common.amounts import human
from sae.common.errors import BadInput, NotFound, SettingsDiffer, Unavailable, suggest
from sae.common.files import digest_file, mapping_differences
from sae.common.hub import Kind, find_on_hub, first_line
from sae.common.progress import say
from sae.settings import Settings
from sae.study.recipes import settings_from
from sae.study.run import Run, check_name, study_runs, write_record
from sae.study.stage import Compute, lock_study, resolve_dtype

if TYPE_CHECKING:
    from sae.activations.subject import Subject
    from sae.dictionaries.formats import Format, Opened
    from sae.dictionaries.sae import Sae


# --- settings -----------------------------------------------------------------------------------------------


def import_settings(study: str, root: Path, recipe: Path | None, **tables: dict[str, Any]) -> Settings:
    """The settings of a run that joins ``study``: what is not given is as in the runs that the study has.

    A recipe, where one is given, stands in the study's place.
    """
    members = study_runs(study, root)
    if recipe is None and members:
        return members[0].settings.with_values(**tables)
    settings = settings_from(recipe, None, **tables)
    if settings.corpus.kind == "dataset" and settings.corpus.max_tokens is None:  # it may have no end
        like = members[0].settings.corpus.max_tokens if members else None
        return settings.with_values(corpus={"max_tokens": like or settings.harvest.tokens})
    return settings


def _with_dictionary(settings: Settings, sae: Sae) -> Settings:
    """``settings`` with the dictionary's own; a k that is not known stays a number here, and unknown to ``Run.k``."""
    k = sae.k if sae.k is not None else min(settings.training.k, sae.num_latents)
    return settings.with_values(
        training={"architecture": sae.architecture, "num_latents": sae.num_latents, "k": k},
    )


# --- import -------------------------------------------------------------------------------------------------


def import_sae(source: str, name: str, study: str, settings: Settings, root: Path, compute: Compute) -> Run:
    """Make the dictionary at ``source``, a folder or a hub name, the run ``name`` of ``study``.

    A hub name is ``owner/repository``, with ``@revision`` for other than its default and ``/folder`` below. The same
    import again finds that all is there; one that was killed goes on.

    Raises:
        NotFound, BadInput, Unavailable: the source cannot be had or read, or does not fit the hookpoint.
        SettingsDiffer: the name is taken by something else, or the study is of another model, hookpoint or text.
    """
    from sae.dictionaries.checkpoint import open_sae, save_sae

    check_name(name)
    check_name(study)
    place = locate(source)
    opened, format_ = open_sae(place.folder)
    settings = resolve_dtype(study, _with_dictionary(settings, opened.sae), root, compute)
    origin = _origin(place, opened, format_)
    run = Run(name, root)
    with lock_study(root, study):
        begun = _check_name_is_free(run, study, settings, origin)
        if begun and run.is_trained:
            say(f"import: {name}: already there, from {run.record['imported']['from']}")
            return run
        _check_study(run, study, settings)
        provenance = _provenance(source, opened.sae, settings, root, compute)
        if not begun:
            write_record(run, None, study, settings, {**provenance, "imported": origin})
        save_sae(run.folder, opened.sae, run.about())
    _say_imported(run, opened, format_)
    return run


def _origin(place: _Place, opened: Opened, format_: Format) -> dict[str, Any]:
    sae = opened.sae
    files = [format_.config, format_.weights, *format_.beside]
    return {
        "from": place.said,
        "format": format_.name,
        "files": {f: digest_file(place.folder / f) for f in files if (place.folder / f).is_file()},
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "num_latents": sae.num_latents,
        "k": sae.k,
        "folded": list(opened.folded),
    }


def _check_name_is_free(run: Run, study: str, settings: Settings, origin: dict[str, Any]) -> bool:
    """Whether this very import was begun before; raises where the name stands for something else."""
    if not (run.folder / "run.json").is_file():
        if run.folder.exists() and any(not f.name.startswith(".") for f in run.folder.iterdir()):
            raise BadInput(f"{str(run.folder)!r} exists and is no run; move it away or choose another --name")
        return False
    if run.imported is None:
        raise SettingsDiffer(f"run {run.name!r} exists and was trained here; choose another --name for the import")

    def identity(study: str, settings: Settings, origin: dict[str, Any]) -> dict[str, Any]:
        imported = {key: origin[key] for key in ("format", "files")}  # the same files may have moved
        return {"study": study, "import": imported, **_identity(settings)}

    differences = mapping_differences(
        identity(run.study, run.settings, run.imported), identity(study, settings, origin)
    )
    if differences:
        raise SettingsDiffer(
            f"run {run.name!r} exists and was imported from {run.imported['from']} otherwise "
            f"({_shortened(differences)}); choose another --name"
        )
    return True


def _identity(settings: Settings) -> dict[str, Any]:
    """What the runs of a study have in common, however they were trained."""
    kept = settings.identity()
    return {table: kept[table] for table in ("subject", "corpus")}


def _shortened(differences: list[str]) -> str:
    import re

    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", "; ".join(differences))


def _check_study(run: Run, study: str, settings: Settings) -> None:
    for other in study_runs(study, run.root):
        differences = mapping_differences(_identity(other.settings), _identity(settings))
        if other.name != run.name and differences:
            raise SettingsDiffer(
                f"study {study!r} is of another model, hookpoint or text ({'; '.join(differences)}); "
                "choose another --study, or leave these options out to take the study's"
            )


def _provenance(source: str, sae: Sae, settings: Settings, root: Path, compute: Compute) -> dict[str, Any]:
    """The records of subject, hookpoint and corpus, once the dictionary is known to fit."""
    from sae.activations.subject import Subject
    from sae.text.packing import prepare_corpus

    subject = Subject.load(settings.subject.model, device=compute.resolve(), dtype=settings.subject.dtype)
    hookpoint = subject.resolve(settings.subject.hookpoint)
    _check_width(source, sae.d_in, subject, hookpoint)
    corpus = prepare_corpus(settings.corpus, subject.tokenizer, subject.tokenizer_fingerprint, root)
    return {
        "subject": {
            "source": settings.subject.model,
            "fingerprint": subject.fingerprint,
            "dtype": settings.subject.dtype,
            "d_in": sae.d_in,
        },
        "hookpoint": hookpoint,
        "corpus": {"key": corpus.key, "fingerprint": corpus.fingerprint, **corpus.info},
        "batch_order": {"seed": settings.corpus.order_seed, "fingerprint": None, "steps": 0},
    }


def _check_width(source: str, d_in: int, subject: Subject, hookpoint: str) -> None:
    width = subject.width(hookpoint)
    if width == d_in:
        return
    fitting = [name for name in subject.hookpoints() if subject.width(name) == d_in]
    advice = (
        f"hookpoints of width {d_in} are {suggest(hookpoint, fitting)}"
        if fitting
        else f"no hookpoint of that model has width {d_in}, so the SAE is of another model"
    )
    raise BadInput(
        f"the SAE in {source!r} reads activations of width {d_in}, and hookpoint {hookpoint!r} of model "
        f"{subject.source!r} gives {width}; {advice}"
    )


def _say_imported(run: Run, opened: Opened, format_: Format) -> None:
    sae = opened.sae
    folded = f" · folded into the weights: {', '.join(opened.folded)}" if opened.folded else ""
    k = "" if sae.k is None else f", k {sae.k}"
    say(
        f"import: {run.name} · {sae.architecture}, M {human(sae.num_latents)}{k}, D {sae.d_in} · {format_.name} "
        f"· {run.record['subject']['source']}, {run.record['hookpoint']}{folded}"
    )


# --- where it lies ------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A checkpoint's folder on this machine, and where it came from."""

    folder: Path
    said: str


def locate(source: str) -> _Place:
    """The folder of the checkpoint called ``source``, fetched from the hub where it is no folder here."""
    path = Path(source).expanduser()
    if path.exists():
        return _Place(path.resolve(), str(path.resolve()))
    if not source or source.startswith((".", "/", "~")) or "\\" in source:
        raise NotFound(f"{source!r} does not exist; give the folder of an SAE, or its name on the hub")
    parts = source.strip("/").split("/")
    repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
    found = find_on_hub(repository, Kind.MODEL)
    said = f"{found.name}@{found.commit}" + (f"/{folder}" if folder else "")
    return _Place(_fetched(found.name, found.arguments(), repository, folder), said)


def _fetched(name: str, arguments: dict[str, Any], repository: str, folder: str) -> Path:
    """``folder`` of a repository, of which only the files of a checkpoint are downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        if arguments["local_files_only"]:
            return Path(snapshot_download(name, **arguments)) / folder
        files = HfApi().list_repo_files(name, revision=arguments["revision"])
        _check_listed(files, repository, folder)
        wanted = [f"{folder}/{file}" if folder else file for file in _checkpoint_files()]
        return Path(snapshot_download(name, **arguments, allow_patterns=wanted)) / folder
    except (NotFound, BadInput):
        raise
    except Exception as error:  # the HTTP library's errors, whose module differs between hub versions
        raise Unavailable(f"the files of {repository!r} cannot be fetched ({first_line(error)}); try again") from None


def _checkpoint_files() -> list[str]:
    from sae.dictionaries.formats import FORMATS

    return sorted({file for f in FORMATS.values() for file in (f.config, f.weights, *f.beside)})


def _check_listed(files: list[str], repository: str, folder: str) -> None:
    """Raise where ``folder`` is none of the repository's folders that hold weights in a known format."""
    from sae.dictionaries.formats import FORMATS

    names = {format_.weights for format_ in FORMATS.values()}
    holding = sorted({file.rpartition("/")[0] for file in files if file.rpartition("/")[2] in names})
    if folder in holding:
        return
    if not holding:
        raise BadInput(f"{repository!r} holds no SAE in a known format: none of its files is {' or '.join(names)}")
    shown = ", ".join(f"{repository}/{below}" for below in holding[:8] if below)
    more = f" and {len(holding) - 8} more" if len(holding) > 8 else ""
    asked = f"has no SAE in {folder!r}" if folder else "holds several SAEs"
    raise NotFound(f"{repository!r} {asked}; name one of {shown or repository}{more}")


# --- export -------------------------------------------------------------------------------------------------


def export_sae(run: Run, format_name: str, folder: Path) -> dict[str, Any]:
    """Write the run's dictionary to ``folder`` in the format of another program; what was written, as JSON.

    What is there already and the same is kept. Raises BadInput where the format has no such architecture, or the
    folder holds something else.
    """
    from sae.dictionaries.checkpoint import format_named, open_sae, save_sae
    from sae.dictionaries.formats import FORMATS

    format_ = format_named(format_name)
    if not run.is_trained:
        raise NotFound(f"run {run.name!r} is not finished, so there is nothing to export yet")
    sae = run.sae()
    taken = [name for f in FORMATS.values() for name in (f.weights, f.config) if (folder / name).exists()]
    if taken == [format_.weights] and _begun(folder / format_.weights, run, sae, format_):
        save_sae(folder, sae, run.about(), format_)
        say(f"export: {run.name} is in {folder}, in the format of {format_.name}, which was begun before")
    elif format_.config in taken and format_.weights in taken and _same(open_sae(folder)[0].sae, sae):
        say(f"export: {run.name}: already in {folder}")
    elif taken:
        raise BadInput(f"{str(folder)!r} holds {taken[0]}, another SAE; name an empty folder with --to")
    else:
        save_sae(folder, sae, run.about(), format_)
        say(f"export: {run.name} is in {folder}, in the format of {format_.name}")
    files = {name: digest_file(folder / name) for name in (format_.config, format_.weights)}
    return {"run": run.name, "format": format_.name.lower(), "folder": str(folder), "files": files}


def _begun(weights: Path, run: Run, sae: Sae, format_: Format) -> bool:
    """Whether ``weights`` are what an export of ours writes first: killed there, it goes on."""
    from tempfile import TemporaryDirectory

    from sae.dictionaries.checkpoint import save_sae

    with TemporaryDirectory() as folder:
        save_sae(Path(folder), sae, run.about(), format_)
        return digest_file(Path(folder) / format_.weights) == digest_file(weights)


def _same(a: Sae, b: Sae) -> bool:
    import torch

    ours, theirs = a.weights(), b.weights()
    if a.architecture != b.architecture or a.k != b.k or ours.keys() != theirs.keys():
        return False
    # Folding and unfolding a bias may round twice.
    return all(ours[n].shape == theirs[n].shape and torch.allclose(ours[n], theirs[n], 1e-5, 1e-6) for n in ours)
