"""Cut, extend, rearrange and replace layers of a Keras model by name; the pretrained weights stay.

Read `operations` first, which has what users call, then `wiring` (the graph of a model and what can
be asked of it by name), `masks` (what goes with a tensor by itself), `splicing` (what reads what
from now on), `crossing` (the same across the borders of nested models), `rebuild` (the one walk
that makes a new model from an old one), `remaking` (one layer made again), `naming` (names of
layers), `nesting` (nested models made one graph, or seen as one), `inputs` (other sizes and
channels), `built_in` (preprocessing inside a model) and `freezing`. `channels` deletes channels,
which `channel_flow` follows through the graph by the `channel_rules` of the layers. How new layers
get weights with which the network goes on working: `copying` (the same under other settings),
`composition` (exact algebra of linear layers) and `distillation` (training on images without
labels), with `region` (where the new layers sit), `examples` (what they are trained on),
`coordinates` (in which they are trained), `descent` (how long) and `arguments` (images and effort,
checked).
"""

from vggtorch.surgery.arguments import checked_effort, checked_images, unfit_images
from vggtorch.surgery.channels import deletable_channels, delete_channels
from vggtorch.surgery.composition import Composition, compose_
from vggtorch.surgery.descent import Descent, copies, descend_, write_
from vggtorch.surgery.distillation import Distillation, Loss, distill_, relative_error
from vggtorch.surgery.examples import cosines, crops, held_out_of, packed
from vggtorch.surgery.freezing import freeze_, unfreeze_
from vggtorch.surgery.inputs import with_input
from vggtorch.surgery.nesting import flatten, names_when_flat, rename
from vggtorch.surgery.operations import insert, remove, replace, replace_where, stack, truncate
from vggtorch.surgery.remaking import remade

__all__ = [
    "Composition",
    "Descent",
    "Distillation",
    "Loss",
    "checked_effort",
    "checked_images",
    "compose_",
    "copies",
    "cosines",
    "crops",
    "deletable_channels",
    "delete_channels",
    "descend_",
    "distill_",
    "flatten",
    "freeze_",
    "held_out_of",
    "insert",
    "names_when_flat",
    "packed",
    "relative_error",
    "remade",
    "remove",
    "rename",
    "replace",
    "replace_where",
    "stack",
    "truncate",
    "unfit_images",
    "unfreeze_",
    "with_input",
    "write_",
]
