"""Print the table of runs; imported only when the table is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autointerp.report.stages import runs_page
from autointerp.report.terminal import print_page
from sae.common.commands import DEFAULT_ROOT


def render_runs(found: Sequence[Mapping[str, Any]], root: Path = DEFAULT_ROOT, damaged: Sequence[str] = ()) -> None:
    print_page(runs_page(found, root, damaged))
