"""Ask a language model over the OpenAI protocol, and pay for each answer once.

In: a request. Out: an answer, from the cache or from a server, and its cost.
Must not import: contexts, explaining, scoring, or anything after them.
"""
