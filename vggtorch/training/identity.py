"""What makes a run the run that it is: a run that differs in any of it is not carried on.

It is all that decides how a run ends: its settings, the network, the weights that it starts from
and the weight set that they belong to, the images, the batches, and the versions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch

from vggtorch import keras_graph, weights
from vggtorch.models import weight_set
from vggtorch.training import checkpoints
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import DatasetSource, Folder, fingerprint
from vggtorch.training.optimization import name_of
from vggtorch.training.run import RunData

Identity = dict[str, Any]

_ELSEWHERE = {  # settings that don't decide how a run ends
    "output_dir", "cache_dir", "resume", "num_workers", "log_with", "checkpoint_steps",
}  # fmt: skip


def identity_of(config: TrainConfig, read: RunData, model: keras.Model, precision: str) -> Identity:
    """All that decides how a run ends, as plain values that a checkpoint keeps.

    A Dataset is read once, from end to end, unless its attribute `content_name` says what stands
    for its content.
    """
    settings = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(TrainConfig)
        if field.name not in _ELSEWHERE
    }
    images = read.training.data_config  # where the settings leave it open, it is the model's
    settings |= {
        "image_size": images.size,
        "crop_mode": images.crop_mode,
        "crop_pct": images.crop_pct,
        "interpolation": images.interpolation,
    }
    batches = hashlib.sha256(repr(read.plan(0)).encode()).hexdigest()
    return {
        "config": settings,
        # Settings that freeze change the flags from epoch to epoch.
        "network": network_digest(model, flags=config.freeze is None),
        "weights": _weight_digests(model),
        "weight set": weight_set(model),
        "precision": precision,
        "training images": _content(read.training),
        "validation images": _content(read.validation),
        "batches": batches,
        "versions": checkpoints.versions(),
    }


def _plain(value: Any) -> Any:
    """A setting as a checkpoint keeps it: of a function its name, and a hash of what it does."""
    if isinstance(value, functools.partial):
        bound = (value.args, sorted(value.keywords.items()))
        return f"{_plain(value.func)} {_described(bound)}"
    if not callable(value):
        return value
    name = f"{getattr(value, '__module__', '')}.{name_of(value)}"
    code = getattr(value, "__code__", None)
    if code is None:
        return name
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    consts = [c for c in code.co_consts if not inspect.iscode(c)]
    does = [code.co_code, code.co_names, *map(_described, (consts, cells, value.__defaults__))]
    return f"{name} {hashlib.sha256(repr(does).encode()).hexdigest()[:16]}"


def check_identity(path: Path, content: dict[str, Any], now: Identity, model: keras.Model) -> None:
    """See that a checkpoint is of this run; says what differs, and how to go on.

    A model that has the very weights of the checkpoint may have begun with any.
    """

    def others(now: Identity, before: Identity) -> Iterator[tuple[str, Any, Any]]:
        return ((n, v, before.get(n)) for n, v in now.items() if before.get(n) != v)

    changed = [f"{n}={v!r} (was {was!r})" for n, v, was in others(now["config"], content["config"])]
    changed += [
        f"{n} {v} (was {was})" for n, v, was in others(now["versions"], content["versions"])
    ]
    for name, value, was in others(now, content):
        if name in ("weight set", "precision"):
            changed.append(f"{name} {value} (was {was})")
        elif name in ("training images", "validation images", "batches"):
            changed.append(f"other {name}")
    if content["network"] != now["network"]:
        changed.append("another network")
    elif not _has_weights(model, content):
        pairs = zip(content["weights"], now["weights"], strict=True)
        if other := [name for (_, was), (name, digest) in pairs if was != digest]:
            changed.append(
                f"other starting weights of {weights.shortened(other, 4)} "
                f"(vt.load_checkpoint_(model, {str(path)!r}) puts in those of the run)"
            )
    if changed:
        raise ValueError(
            f"{path} belongs to another run: {', '.join(changed)}. Resume as that run began, or "
            f"begin anew in another folder."
        )


def _has_weights(model: keras.Model, content: dict[str, Any]) -> bool:
    """Whether a model's weights are those of a checkpoint, averaged ones included or not."""
    kept = {id(variable) for variable in model.weights}  # not the state of random numbers
    found = [
        (i, variable.value.detach().cpu())
        for i, variable in enumerate(model.variables)
        if id(variable) in kept
    ]
    variables = content["variables"]
    averages = [content["average"].get(i, value) for i, value in enumerate(variables)]
    return len(variables) == len(model.variables) and any(
        all(torch.equal(value, listed[i]) for i, value in found) for listed in (variables, averages)
    )


def network_digest(model: keras.Model, *, flags: bool = True, values: bool = False) -> str:
    """SHA-256 of a network: its operations and how they are connected; not the layers' names.

    With `flags` it counts which layers are trainable, with `values` also what the weights are.
    """
    digest = hashlib.sha256()
    number: dict[int, int] = {}  # of each tensor, in the order of their making
    without = {"name"} if flags else {"name", "trainable"}
    for node in keras_graph.calls(keras_graph.graph_of(model, "finetune")):
        operation = node.operation
        if isinstance(operation, keras_graph.Functional | keras.Sequential):
            config: Any = network_digest(operation, flags=flags, values=values)
        else:
            config = {k: v for k, v in operation.get_config().items() if k not in without}
        arguments = [
            number[id(x)] if isinstance(x, keras.KerasTensor) else repr(x)
            for x in keras.tree.flatten([node.arguments.args, node.arguments.kwargs])
        ]
        number |= {id(x): len(number) + i for i, x in enumerate(node.output_tensors)}
        described = [type(operation).__name__, config, arguments]
        digest.update(json.dumps(described, default=_described, sort_keys=True).encode())
        for weight in getattr(operation, "weights", ()) if values else ():
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(weight)).tobytes())
    return digest.hexdigest()


def _described(value: Any) -> str:
    """What a layer's configuration holds that JSON has no form for; the same in every process."""
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _weight_digests(model: keras.Model) -> list[tuple[str, str]]:
    """Each layer that has weights, its place and name -> SHA-256 of them."""
    found = []
    for layer in keras_graph.all_layers(model):
        own = [v for v in keras_graph.own_variables(layer) if any(v is w for w in layer.weights)]
        if own:
            digest = checkpoints.digest([variable.value for variable in own])
            found.append((layer.name, digest))
    return found


def _content(source: Folder | DatasetSource | None) -> str:
    """What stands for the images of a source, their labels and their classes' names."""
    if source is None:
        return ""
    if isinstance(source, Folder):
        content = source.digest
    elif (name := source.content_name) is not None:
        content = f"{len(source)} items of {name}"
    else:
        content = fingerprint(source, 1)[0]
    return hashlib.sha256(repr((content, source.classes)).encode()).hexdigest()
