"""The formats in which programs keep a dictionary, one file each: what their files hold, read and written.

``native`` is for architectures that no other program has.

Every reader ends with weights of ours, so what a format leaves to its own loader (a factor on the activations, a
bias that is not subtracted, pre-activations scaled by the decoder's lengths) is folded into the weights: the
function stays the same, latent by latent. Beyond that no weight is changed: decoder rows keep the length they
have, and so do activations the scale that their program gives them. Alignment compares directions, so it does
not depend on either.
"""

from __future__ import annotations

from sae.dictionaries.formats import dictionary_learning, native, saelens, sparsify
from sae.dictionaries.formats.base import About, Format, Opened

_OF_OTHERS = (sparsify.FORMAT, saelens.FORMAT, dictionary_learning.FORMAT)
FORMATS: dict[str, Format] = {kind.name: kind for kind in (*_OF_OTHERS, native.FORMAT)}

__all__ = ["FORMATS", "About", "Format", "Opened"]
