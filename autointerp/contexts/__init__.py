"""Which latents are explained, and which text is shown for each.

In: a run with its firing store. Out: samples of latents, and contexts in which they fire or are silent.
Must not import: llm, explaining, scoring, or anything after them.
"""
