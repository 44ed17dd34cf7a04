"""The best one-to-one matching of the rows of two matrices, with its certificate.

In: two matrices [M, D]. Out: the partner of each row, and an upper bound on the sum of every matching.
Must not import: the rest of sae.alignment.
"""
