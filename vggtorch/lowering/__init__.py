"""A Keras model as a torch network on the same memory, run the fast way; and its export.

Read in this order: `conventions` (layouts, dtypes, padding), `kernels` (what torch computes faster
than its public functions do), `modules` (each Keras layer as a torch module), `as_keras` (layers
that run as Keras runs them), `handlers` (which layer becomes which module), `fused` (steps that do
the work of several modules), `steps` (a network as a list of steps, and the passes that make it
faster), `running` (how steps run: in groups, and again in backward), `graphs` (all of it as one
module), `lowered` (`lower` and `between`), `accelerating` (the Keras model itself runs it) and
`exporting`.

Beside it stands the same network for torch's own tools: `ties` (Keras variables and torch
parameters on one memory), `layer_modules` (what torch.nn has no module for), `converters` (Keras
layers as torch.nn's modules) and `network` (`to_torch`, which writes the graph down).
"""

from vggtorch.lowering.accelerating import accelerate_
from vggtorch.lowering.exporting import export
from vggtorch.lowering.kernels import has_fused_ops
from vggtorch.lowering.lowered import Lowered, between, lower
from vggtorch.lowering.modules import BatchNorm, Conv2D, Dense
from vggtorch.lowering.network import TorchNetwork, to_torch

__all__ = [
    "BatchNorm",
    "Conv2D",
    "Dense",
    "Lowered",
    "TorchNetwork",
    "accelerate_",
    "between",
    "export",
    "has_fused_ops",
    "lower",
    "to_torch",
]
