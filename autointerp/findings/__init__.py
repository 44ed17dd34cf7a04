"""What the scores and alignments mean: figures with intervals, controls and counts of failures.

In: tables, alignments and journals. Out: the findings that terminal, HTML page, JSON and service show.
Must not import: notebook, report, command_line.
"""
