"""The report as one HTML file that opens without a network.

In: findings and the open study. Out: one file with its data, figures and scripts.
Must not import: report.export, command_line.
"""
