"""Models that come with the package, and how they were made."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parent / "pystdlib-4m"
"""What the name ``bundled`` stands for wherever a model is asked for."""
