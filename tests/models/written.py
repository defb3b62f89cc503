"""Models written to files of any form."""

from __future__ import annotations

from pathlib import Path

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras


def write(model: keras.Model, path: Path) -> Path:
    """By Keras itself where it has the form, and else by us."""
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    elif path.suffix in (".keras", ".h5"):
        model.save(path)
    else:
        vt.save_weights(model, path)
    return path
