"""From latents to scores, and what they mean. In a notebook: ``from autointerp import Run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autointerp.notebook import Run

__all__ = ["Run"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: commands import this package for its rooms, and most need no notebook.
    if name == "Run":
        import sae  # noqa: F401  # before other packages: refuses a system that the program does not run on
        from autointerp.notebook import Run

        return Run
    raise AttributeError(f"module 'autointerp' has no attribute {name!r}")
