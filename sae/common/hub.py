"""Is a name on the Hugging Face hub, and can the hub be reached? Asked once, before any library tries.

The libraries retry a hub that cannot be reached for most of a minute and then answer with a paragraph.
One short request first tells apart the three cases that need different advice: no such name, no access,
no network. Without a network whatever the local cache holds is used.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, NamedTuple

from sae.common.errors import BadInput, NotFound, Unavailable

_TIMEOUT_SECONDS = 10.0


class Kind(enum.Enum):
    MODEL = "model"
    DATASET = "dataset"


class OnHub(NamedTuple):
    """A repository and its commit; ``offline`` where the hub cannot be reached and a cached copy stands in."""

    name: str
    commit: str | None
    offline: bool

    def arguments(self) -> dict[str, Any]:
        """For ``from_pretrained``: the very commit that was found, from the cache alone where offline."""
        return {"revision": self.commit, "local_files_only": self.offline}


def looks_like_path(name: str) -> bool:
    """Whether ``name`` can only be meant as a path (a hub name has at most one slash)."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/")


def find_on_hub(name: str, kind: Kind) -> OnHub:
    """Look ``name`` up, ``name@revision`` for a branch, tag or commit other than the default.

    Raises:
        NotFound: the hub knows no such name or revision.
        BadInput: it is no name at all, or access to it must be asked for.
        Unavailable: the hub cannot be reached and nothing of that name is cached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")
    try:
        look_up = HfApi().model_info if kind is Kind.MODEL else HfApi().dataset_info
        found = look_up(repository, revision=revision or None, timeout=_TIMEOUT_SECONDS)
        return OnHub(repository, found.sha, offline=False)
    except HFValidationError:
        raise NotFound(f"{kind.value} {name!r} is neither a folder here nor a possible hub name") from None
    except GatedRepoError:
        raise BadInput(
            f"{kind.value} {name!r} is gated on the hub; ask for access on its page and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise NotFound(f"{kind.value} {repository!r} has no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise NotFound(f"{kind.value} {name!r} is neither a folder here nor on the hub (or needs HF_TOKEN)") from None
    except Exception as error:  # the HTTP library's errors, whose module differs between hub versions
        unreachable = first_line(error)
    cached = _cached_commit(repository, revision or "main", kind)
    if cached is None or kind is Kind.DATASET:
        raise Unavailable(
            f"{kind.value} {name!r} is no folder here, and the Hugging Face hub cannot be reached "
            f"({unreachable}); give a local folder, or connect"
        )
    return OnHub(repository, cached, offline=True)


def _cached_commit(repository: str, revision: str, kind: Kind) -> str | None:
    """The commit of a cached snapshot; what was looked at last names it."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind.value}s--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    if reference.is_file():
        return reference.read_text().strip()
    return revision if (folder / "snapshots" / revision).is_dir() else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened: a library's paragraph made fit for one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
