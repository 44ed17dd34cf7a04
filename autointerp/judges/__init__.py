"""From an explanation and a context to P(active). Each file is one way of doing it; ``base`` is what they share."""
