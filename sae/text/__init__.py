"""Text as packed token sequences.

In: files, folders, datasets, a tokenizer. Out: a :class:`~sae.text.corpus.Corpus` on disk, in a seeded order.
Must not import: dictionaries, activations, or anything after them.
"""
