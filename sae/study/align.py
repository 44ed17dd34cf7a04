"""Align runs: find partners by weights, compare firings, and write the overlap tables.

Each pair's files carry the digest of their inputs, so only missing or outdated ones are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sae.alignment.alignment import (
    Alignment,
    align,
    list_pairs,
    pair_inputs,
    pair_path,
    read_alignment,
    read_sides,
    write_alignment,
    write_sides,
)
from sae.common.errors import BadInput, NotFound
from sae.common.files import digest, read_table, table_columns, table_metadata, write_table
from sae.common.progress import say, track
from sae.study.harvest import check_trained, ensure_harvested, group_by_study, is_harvested
from sae.study.run import Run, study_runs
from sae.study.stage import Compute, lock_study

if TYPE_CHECKING:
    from sae.alignment.nulls import Weights


def align_runs(runs: Sequence[Run], compute: Compute, nulls: bool = True, force: bool = False) -> None:
    """Match each pair of ``runs`` by weights, compare their firings, and update the overlap tables.

    Args:
        nulls: also match rotated siblings and compare moved firings (:mod:`sae.alignment.nulls`): twice the work.
        force: align runs of different studies or hookpoints too.
    """
    by_name = {run.name: run for run in runs}
    wanted = [(by_name[a], by_name[b]) for a, b in list_pairs([run.name for run in runs])]
    root = runs[0].root
    for run in runs:
        check_trained(run)
    widths = {run.name: run.record["subject"].get("d_in") for run in runs}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise BadInput(f"only SAEs of activations of the same width can be aligned; d_in is {listed}")
    apart = explain_difference(runs)
    if apart and not force:
        raise BadInput(f"{apart}, so they differ in more than the seed; align runs of one study, or give --force")
    studies = group_by_study(runs)
    ensure_harvested(runs, compute)
    with ExitStack() as locks:
        for study in sorted(studies):
            locks.enter_context(lock_study(root, study))
        matched = [(a, b) for a, b in wanted if not is_aligned(a, b) or (nulls and not _has_nulls(a, b))]
        if matched:
            _align_pairs(matched, compute, nulls)
        for a, b in wanted:
            if not share_tokens(a, b):
                say(f"{a.name} and {b.name} were harvested from different texts or windows: comparing weights only")
        done = {(a, b) for a, b in wanted if is_compared(a, b) and (not nulls or _has_shifted(a, b))}
        compared = [(a, b) for a, b in wanted if (a, b) not in done and share_tokens(a, b)]
        if compared:
            _compare_pairs(compared, compute, nulls)
        for study in studies:
            for run in study_runs(study, root):
                if run.is_trained:
                    _write_overlap(run)


def _places(run: Run) -> list[str]:
    """Return the run's hookpoint, and its target if it is a transcoder."""
    record = run.record
    return [record["hookpoint"], *([f"→ {record['target']}"] if "target" in record else [])]


def explain_difference(runs: Sequence[Run]) -> str | None:
    """Return why ``runs`` differ in more than the seed; ``None`` for runs of one study."""
    studies = group_by_study(runs)
    if len(studies) < 2:
        return None
    names = ", ".join(run.name for run in runs)
    hookpoints = {" ".join([r.record["subject"]["source"], *_places(r)]) for r in runs}
    if len(hookpoints) > 1:
        return f"runs {names} have different hookpoints ({', '.join(sorted(hookpoints))})"
    return f"runs {names} belong to different studies ({', '.join(studies)}): they did not see the same batches"


def _align_pairs(pairs: list[tuple[Run, Run]], compute: Compute, nulls: bool) -> None:
    from sae.alignment.nulls import NULLS, add_null

    device = compute.resolve()
    weights = _Rows()
    with track("align", len(pairs), "pairs") as bar:
        for a, b in pairs:
            names = (a.name, b.name)
            one, other = weights.of_pair(a, b)
            found = align(*one, *other, names=names, device=device)
            if nulls:
                sides = add_null((found.a, found.b), one, other, names, device=device)
                found = Alignment(*sides, {**found.certificate, "nulls": NULLS})
            write_alignment(a.root / "alignments", *names, found, _pair_inputs(a, b))
            bar.advance(note=f"{a.name} × {b.name}")


class _Rows:
    """Encoder and decoder rows of the current pair; consecutive pairs often share the first run."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def of_pair(self, a: Run, b: Run) -> tuple[Weights, Weights]:
        self._held = {name: rows for name, rows in self._held.items() if name in (a.name, b.name)}
        for run in (a, b):
            if run.name not in self._held:
                sae = run.sae()
                self._held[run.name] = (sae.W_enc.numpy(), sae.W_dec.numpy())
        return self._held[a.name], self._held[b.name]


def _pair_inputs(a: Run, b: Run) -> str:
    return digest(sorted([[a.name, a.weights_digest], [b.name, b.weights_digest]]))


def is_aligned(a: Run, b: Run) -> bool:
    """Return whether the pair's alignment exists and matches its weights."""
    return pair_inputs(a.root / "alignments", a.name, b.name) == _pair_inputs(a, b)


def _has_nulls(a: Run, b: Run) -> bool:
    from sae.alignment.nulls import COLUMNS, ROTATED

    return _has_columns(a.root / "alignments", a, b, {f"{column}__{ROTATED}" for column in COLUMNS})


def _has_shifted(a: Run, b: Run) -> bool:
    from sae.alignment.nulls import FIRING_COLUMNS, SHIFTED

    return _has_columns(behaviour_folder(a.root), a, b, {f"{name}__{SHIFTED}" for name in FIRING_COLUMNS})


def _has_columns(folder: Path, a: Run, b: Run, columns: set[str]) -> bool:
    """Return whether the pair's table has these columns (a kill can come between its .json and the table)."""
    path = pair_path(folder, a.name, b.name)
    return path is not None and columns <= set(table_columns(path))


def behaviour_folder(root: Path) -> Path:
    return root / "alignments" / "behaviour"


def share_tokens(a: Run, b: Run) -> bool:
    """Return whether two runs were harvested from the same tokens in the same order."""
    one, other = (run.store().provenance for run in (a, b))
    return all(one[key] == other[key] for key in ("corpus_fingerprint", "order", "context", "window"))


def _compare_pairs(pairs: list[tuple[Run, Run]], compute: Compute, nulls: bool) -> None:
    from sae.alignment.behaviour import Member, compare_behaviour
    from sae.alignment.nulls import draw_offset, rotate_sibling
    from sae.alignment.overlap import find_shared

    device, weights = compute.resolve(), _Rows()
    total = sum(run.store().num_latents for pair in pairs for run in pair) * (2 if nulls else 1)
    with track("compare firings", total, "latents") as bar:
        for a, b in pairs:
            alignment, of_a, of_b = read_alignment(a.root / "alignments", a.name, b.name), *weights.of_pair(a, b)
            members = [
                Member(
                    store=run.store(),
                    W_dec=mine[1],
                    decoder_partner=table["decoder_partner"].to_numpy(np.int32),
                    unshared=find_alive(run) & ~find_shared(table, "strict"),
                    null_of_other=rotate_sibling(theirs, names)[1] if nulls else None,
                )
                for run, table, mine, theirs, names in (
                    (a, alignment.a, of_a, of_b, (a.name, b.name)),
                    (b, alignment.b, of_b, of_a, (b.name, a.name)),
                )
            ]
            offset = None
            if nulls:
                first, second = (member.store for member in members)
                per_sequence = first.window * first.windows_per_sequence
                offset = draw_offset((a.name, b.name), min(first.n_tokens, second.n_tokens), per_sequence)
            found = compare_behaviour(members[0], members[1], device, bar.advance, offset)
            path = pair_path(behaviour_folder(a.root), a.name, b.name)
            order = (b.name, a.name) if path is not None and path.name.startswith(f"{b.name}--") else (a.name, b.name)
            sides = found.sides if order[0] == a.name else found.sides[::-1]
            write_sides(
                behaviour_folder(a.root) / f"{'--'.join(order)}.parquet",
                order,
                sides,
                inputs=_behaviour_inputs(a, b),
                n_tokens=found.n_tokens,
                jaccard_gap_per_latent=found.gap_per_latent,
            )


def _behaviour_inputs(a: Run, b: Run) -> str:
    from sae.firings.store import read_digest

    return digest(["behaviour", _pair_inputs(a, b), sorted(read_digest(run.firings_folder) for run in (a, b))])


def is_compared(a: Run, b: Run) -> bool:
    """Return whether the pair's comparison of firings exists and matches its weights and harvests."""
    stored = pair_inputs(behaviour_folder(a.root), a.name, b.name)
    try:
        return stored is not None and stored == _behaviour_inputs(a, b)
    except NotFound:  # a store has been moved away
        return False


def _write_overlap(run: Run) -> None:
    """Write the run's overlap table over its aligned siblings, unless it is up to date."""
    from sae.alignment.overlap import build_latent_table

    siblings, inputs = _overlap_inputs(run)
    if not siblings or not is_harvested(run) or run.stage_inputs("overlap") == inputs:
        return
    tables = {(run.name, x.name): read_alignment(run.root / "alignments", run.name, x.name).a for x in siblings}
    folder = behaviour_folder(run.root)
    done = {x.name: read_sides(folder, run.name, x.name)[0] for x in siblings if is_compared(run, x)}
    table = build_latent_table(
        run.name, [run.name, *(x.name for x in siblings)], tables, find_alive(run), behaviour=done
    )
    write_table(run.stage_path("overlap"), table, inputs=inputs, against=[x.name for x in siblings])


def _overlap_inputs(run: Run) -> tuple[list[Run], str]:
    """Return the aligned siblings, and the digest of the inputs of the overlap table."""
    siblings = [other for other in run.siblings() if is_aligned(run, other)]
    folder = behaviour_folder(run.root)
    pairs = [
        [_pair_inputs(run, x), _has_nulls(run, x), pair_inputs(folder, run.name, x.name), _has_shifted(run, x)]
        for x in siblings
    ]
    return siblings, digest([pairs, run.stage_inputs("firing")])


def find_alive(run: Run) -> np.ndarray:
    """Return which latents fired in the harvest: bool [M]."""
    return ~read_table(run.stage_path("firing"))["dead"].to_numpy(dtype=bool)


_READ_COLUMNS = (
    *("latent", "jaccard_partner", "jaccard", "max_jaccard", "relation", "relation_covered", "rebuilt"),
    "rebuilt__rotated",
    *("decoder_partner_jaccard", "decoder_partner_p_there", "decoder_partner_p_here"),
)


def read_behaviours(
    root: Path, names: Sequence[str]
) -> tuple[dict[tuple[str, str], pd.DataFrame], dict[tuple[str, str], dict[str, Any]]]:
    """Read the comparisons of firings: {(x, y): x's latents in terms of y's}, without the lists, and {pair: facts}.

    The facts are ``n_tokens`` and ``jaccard_gap_per_latent``, a bound on the distance from the best matching.
    """
    from sae.alignment.nulls import FIRING_COLUMNS, SHIFTED

    tables: dict[tuple[str, str], pd.DataFrame] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    folder, columns = behaviour_folder(root), (*_READ_COLUMNS, *(f"{name}__{SHIFTED}" for name in FIRING_COLUMNS))
    for a, b in combinations(names, 2):
        path = pair_path(folder, a, b)
        if path is not None:
            tables[a, b], tables[b, a] = read_sides(folder, a, b, columns)
            stored = table_metadata(path)
            facts[a, b] = {key: stored[key] for key in ("n_tokens", "jaccard_gap_per_latent")}
    return tables, facts


def ensure_aligned(run: Run, compute: Compute) -> None:
    """Align ``run`` with its siblings if it is not, and print a line."""
    siblings = run.siblings()
    if not siblings:
        raise BadInput(
            f"run {run.name!r} is its study's only run, so nothing can be called shared or unshared; "
            f"{run.suggest_another_run()}, or do not choose latents by sharing"
        )
    missing = [other for other in siblings if not is_aligned(run, other)]
    if missing:
        say(f"{run.name}: not aligned with {', '.join(r.name for r in missing)} yet, aligning first")
    if missing or run.stage_inputs("overlap") != _overlap_inputs(run)[1]:  # a kill can come between the two
        if not missing:
            say(f"{run.name}: the overlap table is out of date, updating it first")
        # Pairs that were aligned without nulls stay without.
        nulls = all(_has_nulls(run, other) for other in siblings if other not in missing)
        align_runs([run, *siblings], compute, nulls)
