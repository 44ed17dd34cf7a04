"""Train S dictionaries side by side on the same batches.

In: batches of activations [B, D]. Out: trained dictionaries, and checkpoints to resume from.
Must not import: firings, alignment, study.
"""
