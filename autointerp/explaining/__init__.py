"""Contexts in, explanations out: plain text, the only thing that a judge gets from here.

In: contexts of latents. Out: explanations in the run's journal.
Must not import: scoring, findings, or anything after them.
"""
