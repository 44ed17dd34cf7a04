"""Training logs sent to Weights & Biases, for those who ask for it and have it.

Never on by default, and nothing of it is part of what a run is: the same rows are in ``training.parquet`` with or
without it. The key is W&B's own affair (``wandb login``, or its environment); it is never read, said or stored here.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from sae.common.errors import Unavailable, UserError
from sae.common.files import digest

if TYPE_CHECKING:
    from sae.study.run import Run
    from sae.training.learner import LogRow


class Tracker:
    """One W&B run for each of our runs, in one project; a training that goes on goes on in the same W&B runs.

    Raises UserError at once where the package is not installed.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError:
            raise UserError(
                "--wandb needs the package wandb, which is not installed; "
                "install it with `pip install wandb`, or leave --wandb out"
            ) from None
        self._runs: dict[str, Any] = {}

    def begin(self, run: Run) -> None:
        """Open the W&B run of ``run``. Raises Unavailable where W&B refuses."""
        settings = run.settings
        try:
            self._runs[run.name] = self._wandb.init(
                project=self.project,
                name=run.name,
                group=run.study,
                id=digest([run.name, run.record["created"]])[:16],
                resume="allow",
                reinit="create_new",  # several at once
                config={
                    **settings.identity(),
                    "study": run.study,
                    "seed": run.seed,
                    "hookpoint": run.record["hookpoint"],
                },
                settings=self._wandb.Settings(silent=True),
            )
        except Exception as error:  # its own errors, those of the network and of its service process
            raise Unavailable(
                f"--wandb: W&B cannot be used ({_without_key(error)}); see `wandb login`, set WANDB_MODE=offline, "
                "or leave --wandb out"
            ) from None

    def row(self, run: str, row: LogRow) -> None:
        """Log a row of the training log; W&B leaves out those that it has from before an interruption."""
        self._runs[run].log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def end(self, run: str) -> None:
        self._runs.pop(run).finish()

    def abandon(self) -> None:
        """Close what is open as failed: the training has stopped, and may be taken up again."""
        while self._runs:
            self._runs.popitem()[1].finish(exit_code=1)


def _without_key(error: Exception) -> str:
    said = (str(error) or type(error).__name__).splitlines()[0][:200]
    key = os.environ.get("WANDB_API_KEY")
    return said.replace(key, "…") if key else said
