"""What `compress` leaves in a folder, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import torch

from vggtorch import files
from vggtorch.keras_graph import calls, graph_of, raw_value

FILE = "compress.pt"
FORMAT = 3


def _fingerprint(model: keras.Model, images: torch.Tensor, settings: Mapping[str, Any]) -> str:
    """A hash of all that decides the result."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    places: dict[int, int] = {}
    for node in calls(graph_of(model, "compress")):
        layer = node.operation
        config = layer.get_config() if isinstance(layer, keras.Layer) else {}
        if node.is_input:  # whose name says how many models there were before this one
            config.pop("name", None)
        origins = [places[id(t)] for t in node.input_tensors]
        digest.update(repr((type(layer).__name__, config, origins)).encode())
        places.update({id(t): len(places) + i for i, t in enumerate(node.outputs)})
    for variable in model.variables:
        digest.update(_bytes_of(raw_value(variable).detach()))
    for image in images:
        digest.update(_bytes_of(image))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


class Notebook:
    """What is known so far, in memory, and in a folder if there is one."""

    def __init__(
        self,
        folder: str | os.PathLike | None,
        model: keras.Model,
        images: torch.Tensor,
        settings: Mapping[str, Any],
    ) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"{folder} is a file; name a folder to write the progress to.")
        self.known: dict[str, Any] = {}
        self._begun = time.monotonic()
        if self.path is None:
            return
        mark = _fingerprint(model, images, settings)
        self.known = {"format": FORMAT, "mark": mark, "seconds": 0.0}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        try:
            known = torch.load(self.path, weights_only=True)
            form, other = known["format"], known["mark"]
        except Exception as error:
            raise ValueError(
                f"{self.path} can't be read as what compress leaves ({files.first_line(error)}). "
                f"Delete it, or name another folder."
            ) from error
        if form != FORMAT:
            raise ValueError(
                f"{self.path} has the format {form}, which this version can't read: finish the run "
                f"with the version that began it, or delete the file."
            )
        if other != mark:
            raise ValueError(
                f"{self.path} belongs to another run: another model, other images or settings. "
                f"Name another folder, or delete it to begin anew."
            )
        self.known = known
        self._begun -= known["seconds"]

    @property
    def seconds(self) -> float:
        """How long the run has taken, interrupted or not."""
        return time.monotonic() - self._begun

    def __getitem__(self, name: str) -> Any:
        return self.known.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.known[name] = value
        self.known["seconds"] = self.seconds
        if self.path is not None:
            with files.atomic(self.path) as temporary:
                torch.save(self.known, temporary)
