"""Read a corpus from a dataset: saved on disk, local data files, or on the hub, always streamed.

In its own module because ``datasets`` is slow to import.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import check_regular, digest, expand_user, read_json
from sae.common.hub import find_on_hub, first_line, looks_like_path
from sae.settings import CorpusSettings
from sae.text.sources import Document, Hashes, TextSource, get_text, split_text

_LOADERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}


def open_dataset(settings: CorpusSettings, hashes: Hashes) -> TextSource:
    """Open the dataset ``settings.source``: one folder, data file or hub name."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    if len(settings.source) != 1:
        raise BadInput(f"corpus.source names {len(settings.source)} datasets; give exactly one")
    name = settings.source[0]
    path = expand_user(name)
    check_regular(path, "dataset")
    identity: dict[str, Any] = {"kind": "dataset", "column": settings.column}
    info: dict[str, Any] = {"source": name, "split": settings.split, "column": settings.column}
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        rows, folder = _saved(path, name, settings.split)
        identity["contents"] = _contents(folder, [p for p in folder.iterdir() if _is_data(p)], hashes)
    elif path.exists():
        rows, files = _local(path, name, settings)
        identity |= {"config": settings.config, "split": settings.split, "contents": _contents(path, files, hashes)}
    elif looks_like_path(name):
        raise NotFound(f"dataset {name!r} does not exist; give a directory, a data file or a hub name")
    else:
        at = find_on_hub(name, "dataset")
        rows = _load(name, settings, path=at.name, revision=at.commit)
        identity |= {"hub": at.name, "commit": at.commit, "config": settings.config, "split": settings.split}
        info["commit"] = at.commit
    if settings.config is not None:
        info["config"] = settings.config
    first = _first_row(rows, name, settings)
    get_text(first, settings.column, f"dataset {name!r}")
    count = getattr(rows, "num_rows", None) or _known_rows(rows, settings.split)
    return TextSource(identity, info, lambda: _documents(rows, name, settings.column), count, "documents")


def _documents(rows: Any, name: str, column: str) -> Iterator[Document]:
    try:
        for number, row in enumerate(rows.select_columns([column])):
            text = get_text(row, column, f"dataset {name!r} row {number}")
            yield from split_text(f"{name}:{number}", text)
    except (OSError, ValueError) as error:
        raise BadInput(f"dataset {name!r} is cut short: {first_line(error)}; run the same command to resume") from None


def _first_row(rows: Any, name: str, settings: CorpusSettings) -> dict[str, Any]:
    try:
        found = list(itertools.islice(iter(rows), 1))
    except Exception as error:  # datasets passes on any error of a parser
        raise BadInput(f"dataset {name!r} cannot be read: {first_line(error)}; check its files") from None
    if not found:
        raise BadInput(f"dataset {name!r}, split {settings.split!r}, has no rows; choose another split")
    return found[0]


def _known_rows(rows: Any, split: str) -> int | None:
    splits = getattr(rows.info, "splits", None)
    return (splits[split].num_examples or None) if splits and split in splits else None


def _saved(path: Path, name: str, split: str) -> tuple[Any, Path]:
    """Open a folder written by ``save_to_disk``: its rows, and the folder of the split."""
    import datasets

    folder = path
    if (path / "dataset_dict.json").is_file():
        try:
            splits = list(read_json(path / "dataset_dict.json")["splits"])
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"dataset {name!r}: its dataset_dict.json is damaged; save the dataset again") from None
        if split not in splits:
            raise NotFound(f"dataset {name!r} has no split {split!r}; did you mean {suggest(split, splits)}?")
        folder = path / split
    try:
        return datasets.load_from_disk(str(folder)), folder
    except Exception as error:  # errors of Arrow, JSON and datasets
        raise BadInput(f"dataset {name!r} cannot be opened: {first_line(error)}; save the dataset again") from None


def _local(path: Path, name: str, settings: CorpusSettings) -> tuple[Any, list[Path]]:
    if path.is_file():
        loader = _LOADERS.get(path.suffix.lower())
        if loader is None:
            raise BadInput(f"dataset {name!r}: {path.suffix or 'no ending'} is not one of {' '.join(_LOADERS)}")
        extra = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        return _load(name, settings, path=loader, data_files={settings.split: str(path)}, **extra), [path]
    files = [p for p in path.rglob("*") if _is_data(p)]
    if not files:
        raise NotFound(f"dataset {name!r} is an empty folder; give one that holds data files")
    return _load(name, settings, path=str(path)), files


def _is_data(path: Path) -> bool:
    # datasets leaves `cache-*.arrow` behind when it transforms a saved dataset.
    return path.is_file() and not path.name.startswith((".", "cache-"))


def _contents(root: Path, files: list[Path], hashes: Hashes) -> str:
    named = [[p.relative_to(root).as_posix() if p != root else "", hashes.facts(p).sha256] for p in sorted(files)]
    hashes.save()
    return digest(named)


def _load(name: str, settings: CorpusSettings, **where: Any) -> Any:
    """Call ``datasets.load_dataset`` with streaming; report failures in one line."""
    import datasets

    try:
        return datasets.load_dataset(**where, name=settings.config, split=settings.split, streaming=True)
    except ValueError as error:  # no such configuration or split; the message lists the known ones
        said = " ".join(str(error).split())[:300]
        raise BadInput(f"dataset {name!r} cannot be opened: {said}; see corpus.config and corpus.split") from None
    except Exception as error:  # errors of the hub, of file systems and of readers
        raise BadInput(f"dataset {name!r} cannot be opened: {first_line(error)}") from None
