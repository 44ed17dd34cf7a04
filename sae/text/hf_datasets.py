"""Read a corpus from a dataset: saved on disk, local data files, or on the hub, always streamed.

In its own module because ``datasets`` is slow to import.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import check_regular, digest, expand_user, read_json
from sae.common.hub import find_on_hub, first_line, looks_like_path
from sae.common.progress import say
from sae.settings import CorpusSettings
from sae.text.columns import Reader
from sae.text.sources import Document, Hashes, TextSource, find_form

_FIRST_ROWS = 100
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


def open_datasets(settings: CorpusSettings, hashes: Hashes, tokenizer: Any) -> TextSource:
    """Open the datasets ``settings.source``, each a folder, data file or hub name.

    Several are interleaved document by document in the proportion of ``settings.weights``, until one of them ends.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    n = len(settings.source)
    for name, given in (("columns", settings.columns), ("weights", settings.weights)):
        if given and len(given) != n:
            raise BadInput(f"corpus.{name} has {len(given)} values for {n} datasets; give one for each, or none")
    columns = settings.columns or (settings.column,) * n
    opened = [
        _open_dataset(settings.model_copy(update={"source": (name,), "column": column}), hashes, tokenizer)
        for name, column in zip(settings.source, columns, strict=True)
    ]
    if n == 1:
        return opened[0]
    weights = settings.weights or (1.0,) * n
    counts = [source.total for source in opened if source.total is not None]
    total = int(sum(weights) * min(c / w for c, w in zip(counts, weights, strict=True))) if len(counts) == n else None
    return TextSource(
        {"kind": "datasets", "of": [source.identity for source in opened], "weights": list(weights)},
        {
            "source": list(settings.source),
            "datasets": [source.info for source in opened],
            "weights": list(weights),
            "interleaving": "documents in the proportion of the weights, until a dataset ends",
        },
        lambda: interleave([source.documents() for source in opened], weights),
        total,
        "documents",
        any(source.has_markers for source in opened),
    )


def interleave(sources: Sequence[Iterator[Document]], weights: Sequence[float]) -> Iterator[Document]:
    """Yield whole documents of all sources until one ends; each time of the source that is furthest behind its weight.

    After n documents, each source has given its share of n to within one per source.
    """
    given = [0] * len(sources)
    while True:
        number = min(range(len(sources)), key=lambda i: ((given[i] + 1) / weights[i], i))
        for piece in sources[number]:
            yield piece
            if piece.ends:
                given[number] += 1
                break
        else:
            return


def _open_dataset(settings: CorpusSettings, hashes: Hashes, tokenizer: Any) -> TextSource:
    (name,), column = settings.source, settings.column
    path = expand_user(name)
    check_regular(path, "dataset")
    identity: dict[str, Any] = {"kind": "dataset", "column": column}
    info: dict[str, Any] = {"source": name, "split": settings.split, "column": column}
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
    form = find_form(first.get(column))
    reader = Reader(form, column, f"dataset {name!r}", tokenizer)
    reader.check(first)
    if form != "text":
        template = {"chat_template": digest(reader.template)} if form == "messages" else {}
        identity |= {"form": form, **template}
        info |= {"form": form, **template}
        say(f"dataset {name!r}: {reader.describe(first)}")
    count = getattr(rows, "num_rows", None) or _known_rows(rows, settings.split)
    if settings.shuffle_buffer:
        shuffling = {"shuffle_buffer": settings.shuffle_buffer, "shuffle_seed": settings.shuffle_seed}
        identity |= shuffling
        info |= shuffling
        rows = _shuffle(rows, settings)
    return TextSource(identity, info, lambda: _documents(rows, name, reader), count, "documents", form != "text")


def _shuffle(rows: Any, settings: CorpusSettings) -> Any:
    """Return the rows streamed through a seeded buffer; the order of the data files is shuffled too."""
    streamed = rows.to_iterable_dataset() if hasattr(rows, "to_iterable_dataset") else rows
    return streamed.shuffle(seed=settings.shuffle_seed, buffer_size=settings.shuffle_buffer)


def _documents(rows: Any, name: str, reader: Reader) -> Iterator[Document]:
    try:
        for number, row in enumerate(rows.select_columns([reader.column])):
            yield from reader.read(f"{name}:{number}", row, f"dataset {name!r} row {number}")
    except (OSError, ValueError) as error:
        raise BadInput(f"dataset {name!r} is cut short: {first_line(error)}; run the same command to resume") from None


def _first_row(rows: Any, name: str, settings: CorpusSettings) -> dict[str, Any]:
    """Return the first row that has a value, of the first few."""
    try:
        found = list(itertools.islice(iter(rows), _FIRST_ROWS))
    except Exception as error:  # datasets passes on any error of a parser
        raise BadInput(f"dataset {name!r} cannot be read: {first_line(error)}; check its files") from None
    if not found:
        raise BadInput(f"dataset {name!r}, split {settings.split!r}, has no rows; choose another split")
    return next((row for row in found if row.get(settings.column)), found[0])


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
