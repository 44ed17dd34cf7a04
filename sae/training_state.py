"""What an unfinished training needs to go on: one file per checkpoint and seed, the last two kept.

A state is one safetensors file, written under a temporary name and renamed, so it is whole or not there. Two are
kept because the seeds are trained together but written one after the other: if the process dies in between, the
step before is still on disk for every seed. Only when all seeds have the new step is the oldest deleted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.errors import SettingsDiffer
from sae.files import atomic, mapping_differences
from sae.progress import say

_KEPT = 2
_PREFIX, _SUFFIX = "step-", ".safetensors"


class State(NamedTuple):
    """One seed after some number of steps."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    """any JSON values; ``record["identity"]`` is what must agree for training to go on from here"""


def write_states(folders: Sequence[Path], step: int, states: Sequence[State]) -> None:
    """Write one state for every seed, then delete all but the last two."""
    for folder, state in zip(folders, states, strict=True):
        with atomic(folder / f"{_PREFIX}{step:08d}{_SUFFIX}") as temporary:
            save_file(state.tensors, temporary, metadata={"record": json.dumps(state.record)})
    for folder in folders:
        for old in _steps(folder)[:-_KEPT]:
            _path(folder, old).unlink()


def latest_states(folders: Sequence[Path], identities: Sequence[Mapping[str, Any]]) -> tuple[int, list[State]]:
    """The last step that every seed has a readable state of, and those states; (0, []) where there is none.

    Raises SettingsDiffer where a state was made under another identity.
    """
    common = set.intersection(*(set(_steps(folder)) for folder in folders))
    for step in sorted(common, reverse=True):
        try:
            states = [_read(_path(folder, step)) for folder in folders]
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            say(
                f"the training state of step {step} in {folders[0].parent} cannot be read ({error}); going back further"
            )
            continue
        for folder, state, identity in zip(folders, states, identities, strict=True):
            differences = mapping_differences(state.record["identity"], identity)
            if differences:
                raise SettingsDiffer(
                    f"{folder.parent.name}: an unfinished training of that name had other settings "
                    f"({'; '.join(differences)}); choose another name, or delete {folder}"
                )
        return step, states
    return 0, []


def discard_states(folder: Path) -> None:
    """Delete a finished training's states, once the checkpoint made from them is written."""
    shutil.rmtree(folder, ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    found = folder.glob(f"{_PREFIX}*{_SUFFIX}")
    return sorted(int(p.stem.removeprefix(_PREFIX)) for p in found if p.stem.removeprefix(_PREFIX).isdigit())


def _path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:08d}{_SUFFIX}"


def _read(path: Path) -> State:
    with safe_open(path, framework="pt") as stored:
        record = json.loads((stored.metadata() or {})["record"])
        return State({name: stored.get_tensor(name) for name in stored.keys()}, record)  # noqa: SIM118
