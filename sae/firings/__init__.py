"""Which latent fires where, and how strongly: recorded once, then looked up.

In: a stream of activations and S dictionaries. Out: one firing store per dictionary.
Must not import: training, alignment, study.
"""
