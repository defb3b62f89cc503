"""A network that costs as little as is asked, and sees the same.

Read `compressing` first, which has what users call. Then `sites` (what can be replaced),
`photographs` (the images, checked, and those held out), `networks` (the original and the network in
work, with the maps that are compared), `statistics` (what layers see, and how much an error at each
is at the end), `rows` and `factors` (cheaper layers in closed form), `deletion` (fewer channels
between two), `composing` (two layers as one), `choice` (which of them), `clocks` (how long they
take), `joint` (all trained at once), `work` (all of this in its order), `building` (the Keras
model), `resuming` and `report`.
"""

from vggtorch.compression.compressing import compress
from vggtorch.compression.report import Compression, LayerChange

__all__ = ["Compression", "LayerChange", "compress"]
