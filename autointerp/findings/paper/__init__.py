"""The paper's findings, each measured on the user's own runs: see
:class:`autointerp.findings.paper.finding.Finding`."""

from autointerp.findings.paper.finding import AGREES, DISAGREES, UNDECIDED, Finding, Verdict

__all__ = ["AGREES", "DISAGREES", "UNDECIDED", "Finding", "Verdict"]
