"""Checkpoints of VGG networks: where they are published, fetched, verified, read and converted.

The way of weights is: find, read, convert, store a copy, map it. Read `sources` first (finding,
fetching, reading any form, writing), then `published` (the table of checkpoints), `downloads` (from
a server or a package index), `hub` (from the Hugging Face hub, and to it), `readers` (the forms of
file: PyTorch's and Keras's own, with `hdf5`, `safetensors`, `onnx`, `archives` and the check of
`pickles` in a file each), `state_dicts` (where trainers put one, and what wrappers put before its
names), `conversion` (pure maps between torchvision's names and layouts and Keras's) and `copies`
(Keras's tensors in the cache, mapped at every later load). Nothing here knows Keras.
"""

from vggtorch.weights.archives import check_archive
from vggtorch.weights.conversion import (
    NORM,
    Rule,
    Shape,
    architecture_of,
    identify,
    keras_to_timm,
    keras_to_torchvision,
    kernel,
    rules,
    shortened,
    to_keras,
    traced,
    unmoved,
    with_counters,
)
from vggtorch.weights.copies import converted, verify
from vggtorch.weights.hub import file_from_hub, folder_from_hub, folder_to_hub
from vggtorch.weights.pickles import unpickled
from vggtorch.weights.published import PUBLISHED, Published, publications
from vggtorch.weights.sources import Checkpoint, fetch, find, local_copies, read, write
from vggtorch.weights.state_dicts import is_plain_name

__all__ = [
    "NORM",
    "PUBLISHED",
    "Checkpoint",
    "Published",
    "Rule",
    "Shape",
    "architecture_of",
    "check_archive",
    "converted",
    "fetch",
    "file_from_hub",
    "find",
    "folder_from_hub",
    "folder_to_hub",
    "identify",
    "is_plain_name",
    "keras_to_timm",
    "keras_to_torchvision",
    "kernel",
    "local_copies",
    "publications",
    "read",
    "rules",
    "shortened",
    "to_keras",
    "traced",
    "unmoved",
    "unpickled",
    "verify",
    "with_counters",
    "write",
]
