"""Transfer learning and model surgery on pretrained VGG networks, the Keras way, on PyTorch.

Importing vggtorch selects Keras's torch backend, so import it before Keras.
"""

from __future__ import annotations

import os
import sys


def _select_torch_backend() -> None:
    """Make Keras run on torch, or say clearly why it can't any more."""
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "torch"
    import keras

    if keras.config.backend() != "torch":
        raise ImportError(
            f"vggtorch needs Keras on its torch backend, but Keras already runs on "
            f"{keras.config.backend()!r}. Import vggtorch before keras, or set "
            f"KERAS_BACKEND=torch before Python starts."
        )


_select_torch_backend()

# Only now that the backend is torch:
from vggtorch.lowering.exporting import export  # noqa: E402
from vggtorch.lowering.lowered import accelerate_, lower  # noqa: E402
from vggtorch.measuring.benchmark import bench  # noqa: E402
from vggtorch.measuring.costs import compare, draw, inspect  # noqa: E402
from vggtorch.models.preprocessing import decode_predictions, preprocess, weight_set  # noqa: E402
from vggtorch.models.vgg import (  # noqa: E402
    VGG11,
    VGG13,
    VGG16,
    VGG19,
    load_weights,
    named_variables,
    save_weights,
)
from vggtorch.surgery.composition import compose_  # noqa: E402
from vggtorch.surgery.distillation import fit_  # noqa: E402
from vggtorch.surgery.operations import (  # noqa: E402
    freeze_,
    insert,
    remove,
    replace,
    stack,
    truncate,
    unfreeze_,
)
from vggtorch.training.advice import advise  # noqa: E402
from vggtorch.training.config import TrainConfig  # noqa: E402
from vggtorch.training.loop import find_learning_rate, finetune  # noqa: E402
from vggtorch.training.report import save_trained, write_report  # noqa: E402

__all__ = [
    "VGG11",
    "VGG13",
    "VGG16",
    "VGG19",
    "TrainConfig",
    "accelerate_",
    "advise",
    "bench",
    "compare",
    "compose_",
    "decode_predictions",
    "draw",
    "export",
    "find_learning_rate",
    "finetune",
    "fit_",
    "freeze_",
    "insert",
    "inspect",
    "load_weights",
    "lower",
    "named_variables",
    "preprocess",
    "remove",
    "replace",
    "save_trained",
    "save_weights",
    "stack",
    "truncate",
    "unfreeze_",
    "weight_set",
    "write_report",
]
