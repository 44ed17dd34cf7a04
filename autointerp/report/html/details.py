"""The details of some latents: everything that ``show`` prints, with verdicts and the partners' contexts.

Details of 32,768 latents would be too large for a browser. So the page has the explained latents, then a fair sample of
the others, until a budget of bytes is spent; it says how many it has, and how to see the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from autointerp.findings.evidence import Study
from autointerp.findings.latent import LatentReader, as_json
from autointerp.journal.journal import open_journal
from autointerp.scoring.setups import verdict_filters
from sae.common.errors import UserError
from sae.common.progress import track

BUDGET = 20_000_000
"""Bytes of details in a page."""
OTHERS = 200
"""Latents that nobody asked to explain, of which details are shown too."""
_CONTEXTS, _OF_PARTNER = 8, 4
_PER_CHUNK = 32  # details that are read together when one of them is opened
_RIGHT, _WRONG = 2, 4  # verdicts shown of each kind
_LEFT_OUT = ("schema", "run", "commands", "study", "threshold", "reliability", "no_logits", "cannot_be_explained")
"""The same of all latents, or, of the last, in ``firing`` too."""


@dataclass(frozen=True)
class Details:
    """``chunks`` are JSON lists of details, safe in a script; ``place`` is latent → chunk."""

    chunks: list[str]
    place: dict[int, int]
    without_contexts: str | None
    """Why contexts are not available; ``None`` where they are."""


def details_of(study: Study, status: Sequence[int], first: Sequence[int], budget: int = BUDGET) -> Details:
    """Return the details of as many latents as fit ``budget`` bytes.

    Args:
        status: [M] of each latent, above 0 if it was to be explained.
        first: latents that come before all others.
    """
    reader = _Reader(study)
    kept: list[tuple[int, str]] = []
    spent = 0
    chosen = order(status, study.alive[study.focus.name], first)
    with track("gathering latents for the page", len(chosen), "latents") as bar:
        for latent in chosen:
            text = str(json_in_script(reader.detail(latent)))
            spent += len(text) + 1
            if spent > budget:
                break
            kept.append((latent, text))
            bar.advance()
    texts = [[text for _, text in kept[i : i + _PER_CHUNK]] for i in range(0, len(kept), _PER_CHUNK)]
    place = {latent: i // _PER_CHUNK for i, (latent, _) in enumerate(kept)}
    return Details([f"[{','.join(chunk)}]" for chunk in texts], dict(sorted(place.items())), reader.without_contexts)


def order(status: Sequence[int], alive: np.ndarray, first: Sequence[int] = ()) -> list[int]:
    """Return the latents to describe, most wanted first: a cut anywhere gives a fair sample.

    After ``first`` come those to be explained, then ``OTHERS`` alive ones, each group in a seeded random order.
    """
    rng = np.random.default_rng(0)
    wanted = np.asarray(status) > 0
    asked = rng.permutation(np.flatnonzero(wanted))
    others = rng.permutation(np.flatnonzero(~wanted & np.asarray(alive, bool)))[:OTHERS]
    return list(dict.fromkeys([*map(int, first), *asked.tolist(), *others.tolist()]))


class _Reader:
    """Reads details; stops reading contexts once they are not available."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._latents = LatentReader(study.focus, study.view.threshold)
        rows = study.score_rows()
        own = rows[rows["control"] == "none"] if rows is not None else pd.DataFrame(columns=["latent"])
        self._explanation = dict(zip(own["latent"], own.get("explanation_id", own["latent"]), strict=True))
        self.without_contexts: str | None = None

    def detail(self, latent: int) -> dict[str, Any]:
        found = self._findings(latent)
        for match in found["matches"]:
            partner = match["decoder_partner"]
            match["contexts"] = [] if partner is None else self._contexts(match["run"], partner)
        found = {key: value for key, value in found.items() if key not in _LEFT_OUT}
        return _shortened({**found, "verdicts": self._verdicts(latent)})

    def _findings(self, latent: int) -> dict[str, Any]:
        if self.without_contexts is None:
            try:
                return self._latents.findings(latent, _CONTEXTS)
            except UserError as error:  # a store moved away, a hub out of reach: the rest is worth showing
                self.without_contexts = str(error)
        return self._latents.findings(latent, 0)

    def _contexts(self, run: str, latent: int) -> list[dict[str, Any]]:
        sibling = next(r for r in self._latents.siblings if r.name == run)
        try:
            found = self._latents.contexts(sibling, latent, _OF_PARTNER) if self.without_contexts is None else []
        except UserError:
            found = []
        return [as_json(context) for context in found]

    def _verdicts(self, latent: int) -> dict[str, Any] | None:
        """Return the judge's verdicts on contexts that the explainer never saw: counts, and some with text."""
        setup, run = self._study.setup, self._study.focus
        if setup is None or latent not in self._explanation or not run.journal_path.exists():
            return None
        with open_journal(run) as journal:
            of = int(self._explanation[latent])
            table = journal.verdicts(explanation_id=of, **verdict_filters(setup))
        if table.empty:
            return None
        failed = table["failure"].notna()
        return {
            "judge": setup["judge"],
            "n_failed": int(failed.sum()),
            "counts": _counts(table[~failed]),
            "shown": list(self._shown(latent, table[~failed])),
        }

    def _shown(self, latent: int, table: pd.DataFrame) -> Iterator[dict[str, Any]]:
        right = table["truth"] == table["label"].astype(bool)
        kinds = [(is_right, truth) for truth in (True, False) for is_right in (True, False)]
        some = pd.concat(
            table[(right == is_right) & (table["truth"] == truth)].head(_RIGHT if is_right else _WRONG)
            for is_right, truth in kinds
        )
        texts = self._windows(latent, [int(window) for window in some["context"]])
        for row in some.to_dict("records"):
            if int(row["context"]) in texts:
                p = None if pd.isna(row["p"]) else float(row["p"])
                verdict = {"truth": bool(row["truth"]), "label": bool(row["label"]), "p": p}
                yield {**verdict, "kind": row["negative_kind"], **texts[int(row["context"])]}

    def _windows(self, latent: int, windows: list[int]) -> dict[int, dict[str, Any]]:
        """Map each window to its tokens and the latent's activation at each."""
        material = self._latents.material(self._study.focus) if self.without_contexts is None else None
        if material is None:
            return {}
        store, at = material.store, np.asarray(windows, np.int64)
        tokens = [store.corpus.decode(row) for row in store.tokens(at)]
        return {
            window: {"tokens": words, "activations": values}
            for window, words, values in zip(windows, tokens, store.activations(latent, at).tolist(), strict=True)
        }


def _counts(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Count verdicts by kind of context, and how many are right."""
    right = table["truth"] == table["label"].astype(bool)
    counts = right.groupby(table["negative_kind"].fillna("active"), sort=False).agg(["size", "sum"])
    return [{"kind": str(kind), "n": int(n), "n_right": int(n_right)} for kind, n, n_right in counts.itertuples()]


def _shortened(value: Any) -> Any:
    """Round numbers to four significant digits; ``None`` for anything not finite."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _shortened(inner) for key, inner in value.items()}
    return [_shortened(inner) for inner in value] if isinstance(value, list | tuple) else value


def json_in_script(value: Any) -> Markup:
    """Return ``value`` as JSON that is safe inside ``<script type="application/json">``.

    ASCII, without characters that could begin markup. Raises ValueError for NaN and infinities.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"}))
