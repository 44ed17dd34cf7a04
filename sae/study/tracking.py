"""Send training logs to Weights & Biases, if the user asks for it and has the package.

The same rows are always in ``training.parquet``. W&B finds its key itself (``wandb login``).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sae.common.errors import Unavailable, UserError
from sae.common.files import digest

if TYPE_CHECKING:
    from sae.study.run import Run
    from sae.training.learner import LogRow


class Tracker:
    """One W&B run for each run, in one project, continued on resume. Raises UserError without the package."""

    def __init__(self, project: str) -> None:
        self.project = project
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError:
            raise UserError("--wandb needs the package wandb; run `pip install wandb`, or drop --wandb") from None
        self._runs: dict[str, Any] = {}

    @contextmanager
    def follow(self, runs: Sequence[Run]) -> Iterator[None]:
        """Open the W&B runs of ``runs``; mark those still open as failed if the block stops with an error."""
        try:
            for run in runs:
                self._begin(run)
            yield
        except BaseException:
            while self._runs:
                self._runs.popitem()[1].finish(exit_code=1)
            raise

    def _begin(self, run: Run) -> None:
        """Open the W&B run of ``run``. Raises Unavailable if W&B fails."""
        facts = {"study": run.study, "seed": run.seed, "hookpoint": run.record["hookpoint"]}
        try:
            self._runs[run.name] = self._wandb.init(
                project=self.project,
                name=run.name,
                group=run.study,
                id=digest([run.name, run.record["created"]])[:16],
                resume="allow",
                reinit="create_new",  # several at once
                config={**run.settings.identity(), **facts},
                settings=self._wandb.Settings(silent=True),
            )
        except Exception as error:  # of W&B, the network or its service process
            raise Unavailable(
                f"--wandb: W&B cannot be used ({_without_key(error)}); see `wandb login`, set WANDB_MODE=offline, "
                "or drop --wandb"
            ) from None

    def row(self, run: str, row: LogRow) -> None:
        """Log a row of the training log; W&B skips the rows that it already has."""
        self._runs[run].log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def end(self, run: str) -> None:
        self._runs.pop(run).finish()


def _without_key(error: Exception) -> str:
    said = (str(error) or type(error).__name__).splitlines()[0][:200]
    key = os.environ.get("WANDB_API_KEY")
    return said.replace(key, "…") if key else said
