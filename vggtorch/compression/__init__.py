"""A network that costs as little as is asked, and sees the same.

Read `compressing` first, which has what users call and all steps in their order. Then `sites` (what
can be replaced), `photographs` (the images, checked, and those held out), `networks` (the original
and the network in work, with the maps that are compared), `composing` (two layers as one),
`statistics` (what layers see, and how much an error at each is at the end), `rows` and `factors`
(cheaper layers in closed form) and `deletion` (fewer channels between two). The steps work on what
`work` holds: `fitting` (what each layer could become, and what was chosen fitted), `choice` (what
it becomes), `joint` (all trained at once) and `building` (the Keras model). `progress` and
`resuming` are what is shown and written down meanwhile, `report` the result.
"""

from vggtorch.compression.compressing import compress
from vggtorch.compression.report import Compression, LayerChange

__all__ = ["Compression", "LayerChange", "compress"]
