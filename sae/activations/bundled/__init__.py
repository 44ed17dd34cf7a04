"""The bundled model and the script that trained it."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parent / "pystdlib-4m"  # the folder of the model named ``bundled``
