"""Put explanations to the test.

In: explanations and test contexts. Out: verdicts in the run's journal, and the score table made from them.
Must not import: findings, report, or anything after them.
"""
