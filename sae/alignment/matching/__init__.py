"""The best one-to-one matching of the rows of two matrices, with its certificate.

In: two matrices [M, D]. Out: the partner of each row, and a bound on how far the matching is from the best.
Must not import: the rest of sae.alignment.
"""
