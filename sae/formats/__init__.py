"""The formats in which other programs keep a dictionary, one file each: what their files hold, read and written.

Every reader ends with weights of ours, so what a format leaves to its own loader (a factor on the activations, a
bias that is not subtracted, pre-activations scaled by the decoder's lengths) is folded into the weights: the
function stays the same, latent by latent. Beyond that no weight is changed: decoder rows keep the length they
have, and so do activations the scale that their program gives them. Alignment compares directions, so it does
not depend on either.
"""

from __future__ import annotations

from sae.formats import dictionary_learning, saelens, sparsify
from sae.formats.base import About, Format, Opened

FORMATS: dict[str, Format] = {kind.name: kind for kind in (sparsify.FORMAT, saelens.FORMAT, dictionary_learning.FORMAT)}

__all__ = ["FORMATS", "About", "Format", "Opened"]
