"""The installed command ``autointerp``, also as ``python -m autointerp``."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec


def main() -> None:
    """Run the command line: ``cli.py``, which is ``autointerp/_cli.py`` in an installed package."""
    import_module("autointerp._cli" if find_spec("autointerp._cli") else "cli").main()


if __name__ == "__main__":
    main()
