"""Findings as a person reads them: terminal, HTML, tables.

In: findings. Out: what a command prints or writes; everything here only arranges what ``autointerp.findings`` measured.
Must not import: command_line.
"""
