"""VGG11 to VGG19 as Keras models, their weights in and out, and what they expect of an image.

Read `vgg` first (the constructors), then `filling` (a model's variables by name, and how they get
values), `torch_form` (a model's weights as torch has them), `matching` (which tensor belongs to
which weight), `rows` (VGG's layers by their shapes alone), `leftovers` (whether what belongs
nowhere may be), `prefixed` (networks under a prefix), `loading` (`load_weights`, `save_weights`),
`converting`, `memory` (how a model remembers what it expects of an image), `images` (files and PIL
images as upright RGB), `fitting` (those at the model's size) and `preprocessing` (images into what
a weight set expects, and probabilities into names).
"""

from vggtorch.models.converting import convert
from vggtorch.models.filling import (
    best_weight_set,
    fill_,
    held_tensors,
    named_variables,
    settle_,
)
from vggtorch.models.fitting import fitted, fitted_arrays, recipe
from vggtorch.models.images import (
    ADVICE_IF_DARK,
    BRIGHTEST,
    DARK,
    SEVERAL_FRAMES,
    PixelGate,
    read_image,
    to_rgb,
)
from vggtorch.models.loading import (
    PartialLoad,
    load_model,
    load_weights,
    model_from_name,
    save_weights,
)
from vggtorch.models.memory import (
    PREPROCESSING_SUFFIX,
    data_config,
    image_readers,
    image_tensors,
    remember_,
    remembered,
    weight_set,
    written_on,
)
from vggtorch.models.preprocessing import (
    as_layers,
    decode_predictions,
    preprocess,
)
from vggtorch.models.torch_form import rule_of
from vggtorch.models.vgg import VGG11, VGG13, VGG16, VGG19, constructor

__all__ = [
    "ADVICE_IF_DARK",
    "BRIGHTEST",
    "DARK",
    "PREPROCESSING_SUFFIX",
    "SEVERAL_FRAMES",
    "VGG11",
    "VGG13",
    "VGG16",
    "VGG19",
    "PartialLoad",
    "PixelGate",
    "as_layers",
    "best_weight_set",
    "constructor",
    "convert",
    "data_config",
    "decode_predictions",
    "fill_",
    "fitted",
    "fitted_arrays",
    "held_tensors",
    "image_readers",
    "image_tensors",
    "load_model",
    "load_weights",
    "model_from_name",
    "named_variables",
    "preprocess",
    "read_image",
    "recipe",
    "remember_",
    "remembered",
    "rule_of",
    "save_weights",
    "settle_",
    "to_rgb",
    "weight_set",
    "written_on",
]
