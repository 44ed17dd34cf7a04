"""A language model's activations at a hookpoint, as one stream.

In: token sequences and a model. Out: activations, computed once, and batches of them for training.
Must not import: training, firings, or anything after them.
"""
