"""Import SAEs that another program trained as runs of a study, and export runs in other programs' formats.

An imported run has weights, a subject model and hookpoint, and the text on which it is harvested, but no seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sae.activations.stream import ActivationStream
from sae.activations.subject import Subject
from sae.common.amounts import human
from sae.common.errors import BadInput, NotFound, SettingsDiffer, Unavailable, suggest
from sae.common.files import digest_file, expand_user, mapping_differences
from sae.common.hub import find_on_hub, first_line
from sae.common.progress import say
from sae.dictionaries.checkpoint import format_named, open_sae, save_sae
from sae.dictionaries.formats import FORMATS, Format
from sae.dictionaries.sae import Sae
from sae.settings import Settings
from sae.study.harvest import check_trained
from sae.study.recipes import settings_from
from sae.study.run import Run, check_folder_is_free, check_name, remove_failed_runs, study_runs, write_record
from sae.study.stage import (
    Compute,
    describe_inputs,
    find_skip,
    find_skipped,
    fit_to_study,
    limit_norms,
    lock_study,
)
from sae.text.packing import prepare_corpus


def import_settings(study: str, root: Path, recipe: Path | None, **tables: dict[str, Any]) -> Settings:
    """Return the settings of a run that joins ``study``: the given values over those of the recipe or the study."""
    members = study_runs(study, root)
    known = members[0].settings if members else None
    settings = settings_from(recipe, known, **tables)
    return settings.limit_dataset((known and known.corpus.max_tokens) or settings.harvest.tokens)


def _with_dictionary(settings: Settings, sae: Sae) -> Settings:
    """Replace the dictionary's settings; an unknown k stays a number here, while ``Run.k`` is ``None``."""
    k = sae.k if sae.k is not None else min(settings.training.k, sae.num_latents)
    return settings.with_values(training={"architecture": sae.architecture, "num_latents": sae.num_latents, "k": k})


def import_sae(source: str, name: str, study: str, settings: Settings, root: Path, compute: Compute) -> Run:
    """Import the SAE at ``source`` as the run ``name`` of ``study``; a killed import resumes.

    ``source`` is a folder or a hub name: ``owner/repository``, optionally with ``@revision`` and ``/folder``. Raises
    NotFound, BadInput or Unavailable if it cannot be read or does not fit the hookpoint; SettingsDiffer if the name is
    taken, or the study has another model, hookpoint or text.
    """
    check_name(name)
    check_name(study)
    folder, exact_source = locate(source)
    opened, format_ = open_sae(folder)
    settings = fit_to_study(study, _with_dictionary(settings, opened.sae), root, compute)
    files = [format_.config, format_.weights, *format_.extras]
    origin = {
        "from": exact_source,
        "format": format_.name,
        "files": {file: digest_file(folder / file) for file in files if (folder / file).is_file()},
        "architecture": opened.sae.architecture,
        "d_in": opened.sae.d_in,
        "num_latents": opened.sae.num_latents,
        "k": opened.sae.k,
        "folded": list(opened.folded),
    }
    run = Run(name, root)
    with lock_study(root, study):
        begun = _check_name_is_free(run, study, settings, origin)
        if begun and run.is_trained:
            say(f"import: {name}: already imported, from {run.record['imported']['from']}")
            return run
        for other in study_runs(study, root):
            differences = mapping_differences(other.settings.shared(), settings.shared())
            if other.name != name and differences:
                raise SettingsDiffer(
                    f"study {study!r} has another model, hookpoint or text, or skips other tokens "
                    f"({'; '.join(differences)}); choose another --study, or drop these flags to use the study's"
                )
        provenance = _provenance(source, opened.sae, study, settings, root, compute)
        with remove_failed_runs([run]):
            if not begun:
                write_record(run, None, study, settings, {**provenance, "imported": origin})
            save_sae(run.folder, opened.sae, run.about())
            run.seal()
    folded = f" · folded into the weights: {', '.join(opened.folded)}" if opened.folded else ""
    k = "" if opened.sae.k is None else f", k {opened.sae.k}"
    say(
        f"import: {name} · {opened.sae.architecture}, M {human(opened.sae.num_latents)}{k}, D {opened.sae.d_in} · "
        f"{format_.name} · {run.record['subject']['source']}, {run.record['hookpoint']}{folded}"
    )
    return run


def _check_name_is_free(run: Run, study: str, settings: Settings, origin: dict[str, Any]) -> bool:
    """Return whether the same import has already begun; raise if the name is taken."""
    if not run.has_begun:
        check_folder_is_free(run)
        return False
    if run.imported is None:
        raise SettingsDiffer(f"run {run.name!r} exists and was trained here; choose another --name for the import")

    def identity(study: str, settings: Settings, origin: Mapping[str, Any]) -> dict[str, Any]:
        imported = {key: origin[key] for key in ("format", "files")}  # the same files may have moved
        return {"study": study, "import": imported, **settings.shared()}

    changes = mapping_differences(identity(run.study, run.settings, run.imported), identity(study, settings, origin))
    if changes:
        shortened = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", "; ".join(changes))
        raise SettingsDiffer(
            f"run {run.name!r} exists, imported from {run.imported['from']} with differences ({shortened}); "
            "choose another --name"
        )
    return True


def _provenance(source: str, sae: Sae, study: str, settings: Settings, root: Path, compute: Compute) -> dict[str, Any]:
    """Check that the dictionary fits; return the records of subject, hookpoint, corpus and skipped tokens."""
    target = settings.subject.target
    if sae.transcodes != (target is not None):
        kind, advice = ("a transcoder", "name its target") if sae.transcodes else ("no transcoder", "leave out")
        raise BadInput(f"{source!r} is {kind}; {advice} (--target)")
    subject = compute.load_subject(settings)
    hookpoint = subject.resolve(settings.subject.hookpoint)
    _check_width(source, sae.d_in, subject, hookpoint)
    if target is not None:
        _check_width(source, sae.d_out, subject, subject.resolve(target), "predicts")
    skip = find_skip(settings, subject)
    corpus = prepare_corpus(settings.corpus, subject.tokenizer, subject.tokenizer_fingerprint, root)
    stream = ActivationStream(subject, corpus, hookpoint)
    stream.skip = skip
    skipped = limit_norms(stream, settings, find_skipped([study], root))
    return describe_inputs(settings, subject, corpus, hookpoint) | skipped


def _check_width(source: str, d_in: int, subject: Subject, hookpoint: str, verb: str = "reads") -> None:
    width = subject.width(hookpoint)
    if width == d_in:
        return
    fitting = [name for name in subject.hookpoints() if subject.width(name) == d_in]
    advice = (
        f"hookpoints of width {d_in} are {suggest(hookpoint, fitting)}"
        if fitting
        else f"no hookpoint of that model has width {d_in}, so give the SAE's own model"
    )
    raise BadInput(
        f"the SAE in {source!r} {verb} activations of width {d_in}, and hookpoint {hookpoint!r} of model "
        f"{subject.source!r} gives {width}; {advice}"
    )


def locate(source: str) -> tuple[Path, str]:
    """Return the folder of a checkpoint, downloaded from the hub if needed, and its source for the record."""
    path = expand_user(source)
    if path.exists():
        return path.resolve(), str(path.resolve())
    if not source or source.startswith((".", "/", "~")) or "\\" in source:
        raise NotFound(f"{source!r} does not exist; give the folder of an SAE, or its name on the hub")
    parts = source.strip("/").split("/")
    repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
    found = find_on_hub(repository, "model")
    exact = f"{found.name}@{found.commit}" + (f"/{folder}" if folder else "")
    return _fetch(found.name, found.arguments(), repository, folder), exact


def _fetch(name: str, arguments: dict[str, Any], repository: str, folder: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        if arguments["local_files_only"]:
            return Path(snapshot_download(name, **arguments)) / folder
        files = HfApi().list_repo_files(name, revision=arguments["revision"])
        _check_listed(files, repository, folder)
        parts = {file for f in FORMATS.values() for file in (f.config, f.weights, *f.extras)}
        wanted = [f"{folder}/{file}" if folder else file for file in sorted(parts)]
        return Path(snapshot_download(name, **arguments, allow_patterns=wanted)) / folder
    except (NotFound, BadInput):
        raise
    except Exception as error:  # the HTTP errors, whose module differs between hub versions
        raise Unavailable(f"the files of {repository!r} cannot be fetched ({first_line(error)}); try again") from None


def _check_listed(files: list[str], repository: str, folder: str) -> None:
    """Raise if ``folder`` of the repository holds no weights in a known format."""
    names = {format_.weights for format_ in FORMATS.values()}
    holding = sorted({file.rpartition("/")[0] for file in files if file.rpartition("/")[2] in names})
    if folder in holding:
        return
    if not holding:
        raise BadInput(f"{repository!r} has no SAE in a known format: none of its files is {' or '.join(names)}")
    shown = ", ".join(f"{repository}/{below}" for below in holding[:8] if below)
    more = f" and {len(holding) - 8} more" if len(holding) > 8 else ""
    asked = f"has no SAE in {folder!r}" if folder else "has several SAEs"
    raise NotFound(f"{repository!r} {asked}; name one of {shown or repository}{more}")


def export_sae(run: Run, format_name: str, folder: Path) -> dict[str, Any]:
    """Write the run's dictionary to ``folder`` in another program's format; return the files as JSON.

    An equal export stays. Raises BadInput for an unsupported architecture, or if the folder holds something else.
    """
    format_ = format_named(format_name)
    check_trained(run)
    sae = run.sae()
    taken = [name for f in FORMATS.values() for name in (f.weights, f.config) if (folder / name).exists()]
    is_resumed = taken == [format_.weights] and _begun(folder / format_.weights, run, sae, format_)
    if {format_.config, format_.weights} <= set(taken) and _same(open_sae(folder)[0].sae, sae):
        say(f"export: {run.name}: already in {folder}")
    elif taken and not is_resumed:
        raise BadInput(f"{str(folder)!r} holds {taken[0]}, another SAE; name an empty folder with --to")
    else:
        save_sae(folder, sae, run.about(), format_)
        resumed = ", after an unfinished export" if is_resumed else ""
        say(f"export: {run.name} is in {folder}, in the format of {format_.name}{resumed}")
    files = {name: digest_file(folder / name) for name in (format_.config, format_.weights)}
    return {"run": run.name, "format": format_.name.lower(), "folder": str(folder), "files": files}


def _begun(weights: Path, run: Run, sae: Sae, format_: Format) -> bool:
    """Return whether ``weights`` are those of an export that was killed before it wrote the config."""
    with TemporaryDirectory() as folder:
        save_sae(Path(folder), sae, run.about(), format_)
        return digest_file(Path(folder) / format_.weights) == digest_file(weights)


def _same(a: Sae, b: Sae) -> bool:
    ours, theirs = a.weights(), b.weights()
    if a.architecture != b.architecture or a.k != b.k or ours.keys() != theirs.keys():
        return False
    # Tolerance: folding and unfolding a bias may round twice.
    return all(ours[n].shape == theirs[n].shape and torch.allclose(ours[n], theirs[n], 1e-5, 1e-6) for n in ours)
