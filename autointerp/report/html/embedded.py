"""How data and scripts stand in the page, so that nothing in the data can ever be taken for markup or for a script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

# ASCII alone leaves the file, so that no mark of reading direction, control character or half of a surrogate pair is in
# it as itself; of what is left these three begin whatever HTML might read as the end of a script.
_ESCAPED = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def json_in_script(value: Any) -> Markup:
    """``value`` as JSON that is inert between ``<script type="application/json">`` and its end.

    NaN and infinities, which JSON does not have, are refused with a ValueError.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPED))


def script(source: str) -> Markup:
    """A script of ours or of a library, as it stands between the tags. It must not hold what would end it."""
    lowered = source.lower()
    if "</script" in lowered or "<!--" in lowered:
        raise ValueError("a script that is put into a page must hold neither </script nor <!--")
    return Markup(source)


def policy(scripts: Sequence[str]) -> str:
    """A content security policy: these scripts alone run, and nothing is fetched from anywhere.

    Plotly writes style sheets and styles of its own, and makes its pictures as data and blob URLs.
    """
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
