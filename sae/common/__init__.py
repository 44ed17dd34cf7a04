"""Errors, files, progress, processes and the database: used by all packages, with no knowledge of SAEs.

In: nothing. Out: small tools with one meaning everywhere.
Must not import: any other package of this project.
"""
