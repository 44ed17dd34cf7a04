"""The paper's findings, each measured on the user's own runs: see :class:`autointerp.findings.finding.Finding`."""

from autointerp.findings.finding import AGREES, DISAGREES, UNDECIDED, Finding, Verdict

__all__ = ["AGREES", "DISAGREES", "UNDECIDED", "Finding", "Verdict"]
