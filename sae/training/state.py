"""The states that an unfinished training resumes from: one file per checkpoint and seed, the last two kept.

A state is one safetensors file with a checksum (XXH3 in 128 bits), written under a temporary name and renamed; if it is
damaged, training resumes from the one before. Each seed resumes from its own last state. A seed that is ahead, after a
kill or because the study has grown by seeds, waits until the batches have come that far.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.common.errors import SettingsDiffer
from sae.common.files import atomic, mapping_differences
from sae.common.progress import say

_KEPT = 2
_PREFIX, _SUFFIX = "step-", ".safetensors"


class State(NamedTuple):
    """One seed after some number of steps."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]  # any JSON values; training resumes only if ``record["identity"]`` agrees


def write_state(folder: Path, step: int, state: State) -> None:
    """Write one seed's state after ``step`` steps, then delete all but it and the one before."""
    with atomic(_path(folder, step)) as temporary:
        record = json.dumps(state.record)
        checksum = _checksum(record, state.tensors)
        save_file(state.tensors, temporary, metadata={"record": record, "checksum": checksum})
    # Later states were unreadable, or training would have resumed from them.
    kept = [old for old in kept_steps(folder) if old <= step][-_KEPT:]
    for old in set(kept_steps(folder)) - set(kept):
        _path(folder, old).unlink(missing_ok=True)


def latest_state(folder: Path, identity: Mapping[str, Any]) -> tuple[int, State | None]:
    """Return the last readable state in ``folder`` and its step, or (0, None); SettingsDiffer for another identity."""
    for step in reversed(kept_steps(folder)):
        try:
            state = _read(_path(folder, step))
            found = state.record["identity"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            say(f"{folder.parent.name}: its state of step {step} cannot be read ({reason}); trying the one before")
            continue
        differences = mapping_differences(found, identity)
        if differences:
            raise SettingsDiffer(
                f"{folder.parent.name}: an unfinished training of that name had other settings "
                f"({'; '.join(differences)}); choose another name, or delete {folder}"
            )
        return step, state
    return 0, None


def discard_states(folder: Path) -> None:
    """Delete a finished training's states, once its checkpoint is written."""
    shutil.rmtree(folder, ignore_errors=True)


def kept_steps(folder: Path) -> list[int]:
    """Return the steps of the states in ``folder``, ascending."""
    found = folder.glob(f"{_PREFIX}*{_SUFFIX}")
    return sorted(int(p.stem.removeprefix(_PREFIX)) for p in found if p.stem.removeprefix(_PREFIX).isdigit())


def _path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:08d}{_SUFFIX}"


def _read(path: Path) -> State:
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata() or {}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    if metadata.get("checksum") != _checksum(metadata.get("record", ""), tensors):
        raise ValueError("it does not match its checksum")
    return State(tensors, json.loads(metadata["record"]))


def _checksum(record: str, tensors: Mapping[str, Tensor]) -> str:
    hasher = xxhash.xxh3_128(record.encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
