"""The stage `logits`: which tokens each latent promotes and suppresses, for all latents in one pass.

Direct logit attribution: the effect of a latent's decoder row on the logits through the final norm's gain and the
unembedding, without the modules in between (VocabProj of Gur-Arieh et al. 2025, arXiv 2501.08319). The scale of the
norm depends on the text and stays open: logits are per unit of activation, for a residual stream of RMS 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sae.common.errors import NotApplicable
from sae.common.files import digest, read_table, table_metadata, write_table
from sae.common.progress import say, track
from sae.study.run import Run
from sae.study.stage import Compute, check_same_inputs, get_source_key

if TYPE_CHECKING:
    import torch

    from sae.activations.subject import Subject

N_TOKENS = 10  # promoted and suppressed ones that are kept
MOMENTS = ("logit_mean", "logit_std", "logit_skewness", "logit_kurtosis")
_METHOD = 1  # raise it when the same weights would give another table
_ENTRIES = 1 << 24  # logits held at once: 64 MiB
_REASON = "not_applicable"


@dataclass(frozen=True)
class TokenLogit:
    """A token, and the change of its logit per unit of activation."""

    token: str
    logit: float


@dataclass(frozen=True)
class Logits:
    """What one latent does to the logits of all V tokens: the extremes, and the moments of their distribution.

    ``promoted`` begins with the largest logit, ``suppressed`` with the smallest. The kurtosis of a normal distribution
    is 3.
    """

    promoted: tuple[TokenLogit, ...]
    suppressed: tuple[TokenLogit, ...]
    mean: float
    std: float
    skewness: float
    kurtosis: float


class LogitTable:
    """The logits of a run's latents, read from its table."""

    def __init__(self, run: Run) -> None:
        """Raise NotFound if there is no table, NotApplicable if the latents promote no tokens."""
        path = run.stage_path("logits")
        if not path.exists():
            raise run.missing_error("promoted and suppressed tokens", "harvest")
        if reason := table_metadata(path).get(_REASON):
            raise NotApplicable(reason)
        self.table = read_table(path)  # in the order of latents

    def __getitem__(self, latent: int) -> Logits:
        row: dict[Any, Any] = self.table.iloc[latent].to_dict()
        sides = [
            tuple(TokenLogit(str(token), float(x)) for token, x in zip(row[side], row[f"{side}_logits"], strict=True))
            for side in ("promoted", "suppressed")
        ]
        return Logits(sides[0], sides[1], *(float(row[name]) for name in MOMENTS))


def ensure_logits(runs: Sequence[Run], compute: Compute) -> None:
    """Write the missing tables of ``runs``, opening each subject model once. Where they do not apply, they say why."""
    sources: dict[Any, list[Run]] = {}
    for run in runs:
        if run.stage_inputs("logits") != _compute_inputs(run):
            sources.setdefault(get_source_key(run.settings), []).append(run)
    for sharing in sources.values():
        _compute_sharing(sharing, compute)


def _compute_sharing(runs: Sequence[Run], compute: Compute) -> None:
    from sae.activations.unembedding import Unembedding

    try:
        subject = compute.load_subject(runs[0].settings, with_unembedding=True)
        for run in runs:
            check_same_inputs(run, subject=subject.fingerprint)
        unembedding = Unembedding(subject)
    except NotApplicable as error:
        for run in runs:
            _write_reason(run, error)
        return
    for run in runs:
        try:
            unembedding.check_writes(run.record.get("target", run.record["hookpoint"]))
        except NotApplicable as error:
            _write_reason(run, error)
            continue
        table = _compute_table(run, unembedding.rows, subject)
        write_table(run.stage_path("logits"), table, inputs=_compute_inputs(run))


def _write_reason(run: Run, error: NotApplicable) -> None:
    say(f"{run.name}: {error}")
    write_table(run.stage_path("logits"), pd.DataFrame(), inputs=_compute_inputs(run), **{_REASON: str(error)})


def _compute_table(run: Run, rows: torch.Tensor, subject: Subject) -> pd.DataFrame:
    """Return one row per latent, from the map to the logits ``rows`` [V, D]."""
    import torch

    decoder = torch.from_numpy(np.asarray(run.read_decoder(), dtype=np.float32)).to(rows.device)
    rows = rows[: len(subject.tokenizer)]  # some models have more rows than tokens
    n, step = min(N_TOKENS, len(rows)), max(1, _ENTRIES // len(rows))
    columns: dict[str, list[np.ndarray]] = {}
    with track(f"tokens that latents of {run.name} promote", len(decoder), "latents") as bar:
        for piece in decoder.split(step):
            logits = piece @ rows.T
            (highest, promoted), (lowest, suppressed) = (logits.topk(n, largest=largest) for largest in (True, False))
            found = {"promoted": promoted, "promoted_logits": highest}
            found |= {"suppressed": suppressed, "suppressed_logits": lowest}
            found |= zip(MOMENTS, _compute_moments(logits), strict=True)
            for name, values in found.items():
                columns.setdefault(name, []).append(values.cpu().numpy())
            bar.advance(len(piece))
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    texts = _Texts(subject.tokenizer)
    table = pd.DataFrame({"latent": np.arange(len(decoder), dtype=np.int32)})
    for side in ("promoted", "suppressed"):
        ids = joined[side]
        known = {i: texts.read(i) for i in np.unique(ids).tolist()}
        table[f"{side}_ids"] = list(ids.astype(np.int32))
        table[side] = [[known[i] for i in row] for row in ids.tolist()]
        table[f"{side}_logits"] = list(joined[f"{side}_logits"])
    return table.assign(**{name: joined[name] for name in MOMENTS})


def _compute_moments(logits: torch.Tensor) -> list[torch.Tensor]:
    """Return mean, standard deviation, skewness and kurtosis of each row of ``logits`` [m, V], in place."""
    mean = logits.mean(dim=1, keepdim=True)
    logits -= mean
    std = logits.square().mean(dim=1, keepdim=True).sqrt()
    logits /= std.clamp_min(1e-30)
    squares = logits.square()
    return [mean[:, 0], std[:, 0], (squares * logits).mean(dim=1), squares.square_().mean(dim=1)]


class _Texts:
    """The text of single tokens, with the space at their beginning that some tokenizers drop."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def read(self, token: int) -> str:
        """Return a token's text; for part of a character, the tokenizer's own name of it."""
        alone, both = self._decode(self._before), self._decode([*self._before, token])
        text = both.removeprefix(alone) if both.startswith(alone) else self._decode([token])
        return str(self._tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _compute_inputs(run: Run) -> str:
    record = run.record
    inputs = [run.weights_digest, record["subject"]["fingerprint"], record["hookpoint"]]
    return digest({"inputs": inputs, "method": _METHOD, "tokens": N_TOKENS})
