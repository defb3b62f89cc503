"""A Keras model as a network of torch's own modules on the same memory, run fast; and its export.

Read in this order: `ties` (Keras variables and torch parameters on one memory), `settings` (what
else a network has of Keras layers, and whether it still is so), `layer_modules` and `batch_norm`
(what torch.nn has no exact module for), `sites`, `products` and `converters` (Keras layers as
torch.nn's modules), `kernels` (what torch computes faster than its public functions do),
`constants` (what is made of parameters once), `fused` (steps that do the work of several modules),
`steps` (a torch.fx graph as a list of steps), `trimming` (pixels that nobody takes), `fusing`
(which steps run in place of the graph's), `running` (how they run: in groups, and again in
backward), `plan` (all of it, and when it may run), `network` (the torch network), `calls` (what a
call of a Keras layer takes and gives), `writing` (`to_torch`, which writes the graph down),
`on_keras` (the network on Keras's own variables), `accelerating` (the Keras model itself runs it);
`winograd`, `fixed` (steps whose weights never change), `recorded` (steps as graphs of oneDNN's) and
`inference` (a model as it is now, prepared to answer fast, by these); and `exporting`.
"""

from vggtorch.lowering.accelerating import accelerate_
from vggtorch.lowering.batch_norm import BatchNorm2d, synchronize_
from vggtorch.lowering.exporting import export
from vggtorch.lowering.fused import FusedConv2d, PreparedConv2d
from vggtorch.lowering.inference import optimize_for_inference
from vggtorch.lowering.kernels import conv2d, has_fused_ops, prepared_weight, stands_for_many
from vggtorch.lowering.network import TorchNetwork
from vggtorch.lowering.on_keras import OnKeras, Product, between
from vggtorch.lowering.sites import all_ranks
from vggtorch.lowering.winograd import Workspace, finite
from vggtorch.lowering.writing import network_of, to_torch

__all__ = [
    "BatchNorm2d",
    "FusedConv2d",
    "OnKeras",
    "PreparedConv2d",
    "Product",
    "TorchNetwork",
    "Workspace",
    "accelerate_",
    "all_ranks",
    "between",
    "conv2d",
    "export",
    "finite",
    "has_fused_ops",
    "network_of",
    "optimize_for_inference",
    "prepared_weight",
    "stands_for_many",
    "synchronize_",
    "to_torch",
]
