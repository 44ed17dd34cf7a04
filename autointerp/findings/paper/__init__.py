"""The claims of the paper, each measured on the user's own runs by one written rule.

In: the findings of a study or a sweep. Out: one :class:`~autointerp.findings.paper.finding.Finding` per claim.
Must not import: report, command_line.
"""
