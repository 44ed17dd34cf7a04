"""Look up a name on the Hugging Face hub with one short request, before a library retries for a minute.

Unknown names, missing access and a missing network get different errors. Cached models work without a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from sae.common.errors import BadInput, NotFound, Unavailable

_TIMEOUT_SECONDS = 10.0

Kind = Literal["model", "dataset"]


class OnHub(NamedTuple):
    """A repository and its commit. ``offline``: the hub cannot be reached and the cached copy is used."""

    name: str
    commit: str | None
    offline: bool

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` for this commit."""
        return {"revision": self.commit, "local_files_only": self.offline}


def looks_like_path(name: str) -> bool:
    """Return whether ``name`` must be a path, because no hub name looks like this."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/")


def find_on_hub(name: str, kind: Kind) -> OnHub:
    """Look up ``name``, or ``name@revision`` for a branch, tag or commit.

    Raises NotFound for an unknown name or revision, BadInput for a gated repository, and Unavailable if the hub cannot
    be reached and the name is not cached.
    """
    from huggingface_hub import HfApi, errors

    repository, _, revision = name.partition("@")
    try:
        look_up = HfApi().model_info if kind == "model" else HfApi().dataset_info
        found = look_up(repository, revision=revision or None, timeout=_TIMEOUT_SECONDS)
        return OnHub(repository, found.sha, offline=False)
    except errors.HFValidationError:
        raise NotFound(f"{kind} {name!r} is neither a folder here nor a possible hub name") from None
    except errors.GatedRepoError:
        raise BadInput(f"{kind} {name!r} is gated; ask for access on its hub page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise NotFound(f"{kind} {repository!r} has no revision {revision!r} on the hub") from None
    except errors.RepositoryNotFoundError:
        raise NotFound(f"{kind} {name!r} is neither a folder here nor on the hub (or needs HF_TOKEN)") from None
    except Exception as error:  # the HTTP errors, whose module differs between hub versions
        unreachable = first_line(error)
    cached = _cached_commit(repository, revision or "main", kind)
    if cached is None or kind == "dataset":
        raise Unavailable(
            f"{kind} {name!r} is not a folder here, and the Hugging Face hub cannot be reached "
            f"({unreachable}); give a local folder, or connect to the network"
        )
    return OnHub(repository, cached, offline=True)


def _cached_commit(repository: str, revision: str, kind: Kind) -> str | None:
    """Return the commit of the cached snapshot that was used last."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    if reference.is_file():
        return reference.read_text().strip()
    return revision if (folder / "snapshots" / revision).is_dir() else None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
