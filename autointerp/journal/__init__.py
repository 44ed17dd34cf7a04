"""What was asked, answered, spent and failed: one SQLite file per run.

In: explanations, verdicts, usage. Out: the same, queried.
Must not import: any other package of autointerp.
"""
