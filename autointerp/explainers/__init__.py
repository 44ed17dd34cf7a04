"""From activating contexts to one plain sentence. Each file is one way of doing it; ``base`` is what they share."""
