"""Which latent of one dictionary is which of another, and how much the dictionaries share.

In: pairs of dictionaries and their firings. Out: partners, chance levels, overlap with intervals.
Must not import: study.
"""
