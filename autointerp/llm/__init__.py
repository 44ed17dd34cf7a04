"""Talking to a language model over the OpenAI protocol: requests, retries, the answer cache, what was spent."""
