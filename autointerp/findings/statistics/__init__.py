"""Correlations, intervals and estimates from samples, in NumPy and SciPy.

In: arrays. Out: estimates with intervals.
Must not import: the rest of autointerp.
"""
