"""Which rows of a run's score table stand, so that a `score` makes again only what has changed.

A row takes a test set to make, drawn anew, and a table may hold the rows of many set-ups. Beside the rows the table
keeps, for each set-up, what they were made from: the contexts, the columns, and the state of its verdicts in the
journal. It also keeps which calls of `score` came to their end, so that the same call again has nothing to do, whatever
other judges and scorers did meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp.contexts.material import Material
from autointerp.journal.journal import Journal
from autointerp.llm.opening import get_capabilities
from autointerp.scoring.judges.base import Judge
from autointerp.scoring.score_table import COLUMNS, UNTESTED, SetUp, Test, judged_by, plans_of, records_of, score_table
from autointerp.scoring.scorers import SCORERS
from sae.common.files import digest, read_table, table_metadata, write_table
from sae.common.progress import track

State = tuple[int, int, int, str, str]
"""Of a set-up's verdicts: see :meth:`autointerp.journal.journal.Journal.verdict_states`."""
_NONE: State = (0, 0, 0, "", "")
_CALLS = 16
"""Calls remembered of each set-up."""
_WHOLE = {"latent", "explanation_id", "draw", "replicate", *(name for name in COLUMNS if name.startswith("n_"))}


def states_of(journal: Journal) -> dict[SetUp, State]:
    """What the journal's verdicts are like now, of the set-ups whose scorers there are."""
    return {SetUp._make(key): state for key, state in journal.verdict_states().items() if key[1] in SCORERS}


@dataclass(frozen=True)
class Inputs:
    """What a set-up's rows were made from."""

    state: State
    is_known: bool
    """Whether it was known what should have been judged: what was missing is then counted."""
    calls: tuple[str, ...] = ()
    """Those that came to their end."""

    def calls_at(self, state: State) -> tuple[str, ...]:
        """Those that still have nothing to ask: verdicts were only added since, to the same journal."""
        count, *_, began, _ = self.state
        return self.calls if count <= state[0] and began in ("", state[3]) else ()


@dataclass(frozen=True)
class KeptScores:
    """The score table as it is on disk, and what it was made from."""

    path: Path
    inputs: dict[SetUp, Inputs] = field(default_factory=dict)
    """Empty where the table is of other contexts or columns: then no row stands."""
    explanations: list[int] | None = None
    """The state of the journal's explanations."""
    capabilities: dict[str, Any] | None = None
    """Of the servers that a language model judged by last."""

    @classmethod
    def of(cls, path: Path, material: str) -> KeptScores:
        """Those at ``path``. ``material`` is the digest of the run's contexts."""
        told = table_metadata(path)
        servers = told.get("capabilities")
        if told.get("material") != material or told.get("columns") != digest(COLUMNS):
            return cls(path, capabilities=servers)
        inputs = {
            SetUp(*entry["set_up"]): Inputs(_state(entry["verdicts"]), entry["is_known"], tuple(entry["calls"]))
            for entry in told.get("set_ups", ())
        }
        return cls(path, inputs, told.get("explanations"), servers)

    def keys(self) -> set[tuple[str, str]]:
        """The scorers and settings of which there are rows."""
        if not self.path.exists():
            return set()
        before = read_table(self.path, ["scorer", "settings_hash"]).drop_duplicates()
        return {(row["scorer"], row["settings_hash"]) for row in records_of(before)}

    def standing(self, states: Mapping[SetUp, State], known: Set[tuple[str, str]]) -> set[SetUp]:
        """The set-ups whose rows need not be made again; ``known`` are the keys of those of which it is known now what
        should have been judged."""
        return {
            set_up
            for set_up, made in self.inputs.items()
            if made.state == states.get(set_up, _NONE) and (made.is_known or set_up.key not in known)
        }

    def known(self) -> set[tuple[str, str]]:
        """The keys of set-ups of which it was known what should have been judged: those that had too few contexts for
        it are on record."""
        return {set_up.key for set_up, made in self.inputs.items() if made.is_known}

    def is_done(self, set_up: SetUp, call: str, states: Mapping[SetUp, State]) -> bool:
        """Whether ``call`` came to its end before and has nothing left to ask."""
        made, state = self.inputs.get(set_up), states.get(set_up, _NONE)
        return made is not None and not _failed(state) and call in made.calls_at(state)

    def rows(self, standing: Set[SetUp]) -> tuple[dict[SetUp, list[dict[str, Any]]], list[dict[str, Any]]]:
        """Those of the ``standing`` set-ups, and those without scores of all: which latents have contexts enough does
        not depend on verdicts."""
        judged: dict[SetUp, list[dict[str, Any]]] = {set_up: [] for set_up in standing}
        untested = []
        for row in records_of(read_table(self.path)) if self.inputs else []:
            if row["judge"] is None or judged_by(row) not in self.inputs:
                continue
            if row["status"] == UNTESTED:
                untested.append(_as_made(row))
            elif judged_by(row) in standing:
                judged[judged_by(row)].append(_as_made(row))
        return judged, untested

    def metadata(
        self, states: Mapping[SetUp, State], known: Set[tuple[str, str]], done: SetUp, call: str | None
    ) -> dict[str, Any]:
        """What the table is to keep when all rows are there as of ``states``, and ``call`` of the set-up ``done``, if
        any, has asked what it had to."""
        standing = self.standing(states, known)
        entries = []
        for set_up in sorted({*states, done, *standing}):
            state = states.get(set_up, _NONE)
            before = self.inputs.get(set_up)
            calls = before.calls_at(state) if before else ()
            if call is not None and set_up == done and not _failed(state):
                calls = (*(c for c in calls if c != call), call)[-_CALLS:]
            is_known = self.inputs[set_up].is_known if set_up in standing else set_up.key in known
            entries.append({"set_up": set_up, "verdicts": state, "is_known": is_known, "calls": calls})
        return {"set_ups": entries, "columns": digest(COLUMNS)}


def brought_up_to_date(
    kept: KeptScores,
    journal: Journal,
    material: Material,
    tests: Sequence[Test],
    readable: Mapping[str, pd.DataFrame],
    call: str | None,
    judge: Judge,
) -> pd.DataFrame:
    """The score table, in which the rows of set-ups that have changed are made again.

    Args:
        tests: those of which it is known what should have been judged; the last is the one of ``call``.
        call: what came to its end just now; ``None``: that is not new.
    """
    run, test = material.run, tests[-1]
    states, explained = states_of(journal), journal.explanation_state()
    plans = plans_of(run, journal)
    if test.plan:  # its contexts have been read already
        plans[test.set_up.settings_hash] = {
            **plans.get(test.set_up.settings_hash, {}),
            test.scorer.name: test.plan,
        }
    known = {each.key for each in tests} | {(name, key) for key, of in plans.items() for name in of}
    standing = kept.standing(states, known)
    if call is None and kept.explanations == explained and standing >= states.keys():
        return read_table(kept.path)  # nothing was added, and nothing failed that could be tried again
    made = kept.keys() - kept.known()
    if call is not None:
        made |= {test.key}
    judged, untested = kept.rows(standing)
    n = sum(state[0] for set_up, state in states.items() if set_up not in standing)
    with track(f"score table of {run.name}", n, "verdicts") if n else nullcontext() as bar:
        advance = bar.advance if bar else None
        table = score_table(journal, tests, readable, made, plans, judged, untested, advance)
    told = kept.metadata(states, known, test.set_up, call)
    told |= {"material": material.digest, "explanations": explained}
    found = get_capabilities(judge)
    write_table(kept.path, table, **told, capabilities=found.as_dict() if found else kept.capabilities)
    return table


def _failed(state: State) -> int:
    return state[2]


def _state(stored: list[Any]) -> State:
    count, last, failed, began, ended = stored
    return count, last, failed, began, ended


def _as_made(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it was before it was written: whole numbers whole, lists, and without what it does not have."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, np.ndarray):
            found[name] = value.tolist()
        elif value is not None and value == value:
            found[name] = int(value) if name in _WHOLE else value
    return found
