"""Tables and explanations for other programs: CSV, Parquet, Neuronpedia.

In: a run. Out: files.
Must not import: report.html, command_line.
"""
