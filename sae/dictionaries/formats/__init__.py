"""The formats in which programs keep a dictionary, one file each: how their files are read and written.

Every reader returns our own weights. Anything that a format leaves to its own loader (a factor on the activations, a
bias that is not subtracted, pre-activations scaled by the decoder's lengths) is folded into them, so each latent
computes the same. Otherwise no weight changes: decoder rows keep their length, and activations their scale.
"""

from __future__ import annotations

from sae.dictionaries.formats import dictionary_learning, native, saelens, sparsify
from sae.dictionaries.formats.base import About, Format, Opened

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT for module in (sparsify, saelens, dictionary_learning, native)
}

__all__ = ["FORMATS", "About", "Format", "Opened"]
