"""Draw the report of the demo study as the picture and the text of the README: ``python docs/make_capture.py``.

Run ``make demo`` first. Writes docs/report.svg (the opening sections, as a terminal shows them in colour) and
docs/report.txt (the full report at 100 columns, as it is when piped).
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.segment import Segment, Segments
from rich.terminal_theme import DIMMED_MONOKAI

from autointerp.findings.study import findings_of
from autointerp.report.report import report_page
from autointerp.report.terminal import print_page
from sae.study.run import study_runs

HERE = Path(__file__).parent
WIDTH, LINES = 100, 78


def main() -> None:
    runs = study_runs("demo", Path("eval_runs"))
    found = findings_of(runs[0], runs)
    text = io.StringIO()
    print_page(report_page(found, is_full=True), Console(file=text, width=WIDTH, color_system=None))
    (HERE / "report.txt").write_text(text.getvalue())
    whole = Console(file=io.StringIO(), width=WIDTH, record=True, force_terminal=True, color_system="truecolor")
    print_page(report_page(found), whole)
    lines = list(Segment.split_lines(whole._record_buffer))[:LINES]
    top = Console(file=io.StringIO(), width=WIDTH, record=True, force_terminal=True, color_system="truecolor")
    for line in lines:
        top.print(Segments([*line, Segment.line()]), end="")
    top.save_svg(str(HERE / "report.svg"), title="python cli.py demo", theme=DIMMED_MONOKAI)


if __name__ == "__main__":
    main()
