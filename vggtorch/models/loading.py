"""Weights into models and out of them by layer name."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

import keras

from vggtorch import files, paths, weights
from vggtorch.architectures import ARCHITECTURES
from vggtorch.checks import switch
from vggtorch.keras_graph import all_layers, check_model, raw_value
from vggtorch.models.filling import checkpoint_of, named_variables, settle_
from vggtorch.models.leftovers import matched, tell_of
from vggtorch.models.matching import Match
from vggtorch.models.memory import (
    data_config,
    remember_checkpoint_,
    remembered,
    weight_set,
)
from vggtorch.models.prefixed import names_layers_of, networks_of, prefixes_of
from vggtorch.models.torch_form import in_torch_form
from vggtorch.models.vgg import constructor
from vggtorch.telling import tell
from vggtorch.weight_sets import WEIGHT_SETS, DataConfig

Source = str | PathLike | Mapping[str, Any]


MODELS = (".keras", ".h5", ".hdf5")  # which Keras reads
ENDINGS = (".safetensors", ".weights.h5", ".pth", ".bin")


@dataclass(frozen=True)
class PartialLoad:
    """What `load_weights(..., partial=True)` did.

    Attributes:
        model: the model, in which the weights are.
        loaded: names of the model's weights that were loaded.
        left: names in the file that no weight of the model was loaded from.
        kept: names of the model's weights that kept the values that they had.
        differing: of weights on both sides whose shapes differ, the name and both shapes; they are
            among `left` and `kept` too.
    """

    model: keras.Model
    loaded: tuple[str, ...]
    left: tuple[str, ...]
    kept: tuple[str, ...]
    differing: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.kept)
        parts = [f"{len(self.loaded)} of {total} weights loaded"]
        named = {
            "left in the file": self.left,
            "kept as they were": self.kept,
            "shapes that differ": self.differing,
        }
        parts += [f"{text}: {weights.shortened(names)}" for text, names in named.items() if names]
        return "; ".join(parts)


@overload
def load_weights(
    model: keras.Model, source: Source, *, partial: Literal[False] = False
) -> keras.Model: ...


@overload
def load_weights(model: keras.Model, source: Source, *, partial: Literal[True]) -> PartialLoad: ...


def load_weights(
    model: keras.Model, source: Source, *, partial: bool = False
) -> keras.Model | PartialLoad:
    """Load weights into a model by layer name, in place; also into keras.applications' own.

    A model that was cut takes its part of a published checkpoint, and layers that were added to it
    keep their values. Networks whose layers have a prefix each get the values of a weight set, or
    of a file of plain names; of a file with several networks, `left_` gets those of `left`. Nothing
    is changed unless everything fits.

    Names that wrappers and trainers of torch add are taken off. Where Keras's automatic names
    differ (`dense` was saved, the model has `dense_1`), and where VGG's convolutions have other
    names, layers are matched by their order if all shapes agree, with a warning.

    Args:
        model: any Keras model with VGG's layers, or the one that a file was saved from.
        source: `imagenet`, `features`, `oxford`, the path of a checkpoint of any form (Keras's
            .weights.h5, .keras and .h5, .safetensors, PyTorch's, ONNX), `hf://owner/name/file`, or
            a state_dict: a dict of tensors, arrays or variables by torchvision's names, those of
            `to_torch`, or Keras's.
        partial: load whatever names and shapes agree for, and say what was left.

    Returns:
        The model, which from now on remembers the weight set; with `partial`, a report that has
        `model`, `loaded`, `left`, `kept` and `differing`.

    Raises:
        ValueError: names or shapes that differ (with both lists), or a damaged file; with
            `partial`, nothing that fits.
        OSError: the checkpoint can't be had.

    Example:
        >>> import keras, tempfile, torch
        >>> import vggtorch as vt
        >>> first, second = (vt.VGG11(weights=None, include_top=False) for _ in range(2))
        >>> part = vt.truncate(second, "block1_pool")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vt.save_weights(vt.truncate(first, "block2_pool"), f"{folder}/two.safetensors")
        ...     part = vt.load_weights(part, f"{folder}/two.safetensors")  # takes what it has
        >>> bool((part.get_weights()[0] == first.get_weights()[0]).all())
        True
        >>> model = vt.stack(part, keras.layers.Conv2D(8, 1, name="mine"))
        >>> mine = {"mine.bias": torch.ones(8), "mine.weight": torch.ones(8, 64, 1, 1)}
        >>> print(vt.load_weights(model, mine, partial=True))
        2 of 4 weights loaded; kept as they were: block1_conv1/kernel, block1_conv1/bias
    """
    _check_built(model, "load_weights")
    partial = switch("partial", partial)
    prefixed, variables = bool(prefixes_of(model)), named_variables(model)
    checkpoint = None  # where each network under a prefix has its own
    if isinstance(source, Mapping):
        plain = {k: raw_value(v) if isinstance(v, keras.Variable) else v for k, v in source.items()}
        checkpoint = weights.converted(plain if type(source) is dict else source)
    elif not (prefixed and isinstance(source, str) and source in WEIGHT_SETS):
        checkpoint = checkpoint_of(source, variables, model.name)
    if checkpoint is None or (prefixed and not names_layers_of(model, checkpoint)):
        networks = networks_of(model, source, checkpoint, partial=partial)
    else:
        networks = [matched(model, variables, checkpoint, source, partial=partial)]
    return _loaded_(model, networks, partial)


def _loaded_(model: keras.Model, networks: list[Match], partial: bool) -> keras.Model | PartialLoad:
    """Give a model what was found for it, all of it or, with `partial`, a part."""
    for one in networks:
        tell_of(one, partial=partial)
    for one in networks:
        for key, value in one.values.items():
            one.variables[key].assign(value)
    settle_(model)
    values = {one.prefix + key for one in networks for key in one.values}
    variables = named_variables(model)
    # The layer that sees the image decides what the model expects of one.
    if not partial or next(iter(variables)) in values:
        _remember_anew(model, networks[0].checkpoint, list(variables)[-1] in values)
    if not partial:
        return model
    loaded = {id(variables[key]) for key in values}
    unused = [
        [*one.left, *(n for key, n in one.names.items() if key not in one.values)]
        for one in networks
    ]
    return PartialLoad(
        model,
        loaded=tuple(key for key in variables if key in values),
        left=tuple(name for name in unused[0] if all(name in names for names in unused)),
        kept=tuple(key for key, variable in variables.items() if id(variable) not in loaded),
        differing=tuple(one.prefix + text for one in networks for text in one.differing),
    )


def _remember_anew(model: keras.Model, checkpoint: weights.Checkpoint, labelled: bool) -> None:
    """Let a model remember what its new weights expect, and say where that isn't known.

    A network that is nested in the model remembers it, and the model itself only if it did before;
    it has the names of the classes if its last layer is `labelled`, loaded too.
    """
    network = _first_network(model)
    before = weight_set(network) or weight_set(model)
    classes = _classes(model) if labelled else 0
    remember_checkpoint_(network, checkpoint, classes if network is model else 0)
    if network is not model and weight_set(model) is not None:
        remember_checkpoint_(model, checkpoint, classes)
    if checkpoint.weight_set is None and before is not None:
        tell(
            f"The file does not say which weight set its weights belong to, so {network.name!r} no "
            f"longer remembers {before!r}: name it, preprocess(images, {before!r}), if they do."
        )


def _classes(model: keras.Model) -> int:
    """The units of a model's one output, 0 where it has several, or none that one knows."""
    outputs = getattr(model, "outputs", None) or []  # a subclassed model has none
    return int(outputs[0].shape[-1] or 0) if len(outputs) == 1 else 0


def _first_network(model: keras.Model) -> keras.Model:
    """The model, or the one nested in it, whose own layer has the first weight."""
    for layer in model.layers:
        if layer.weights:
            return _first_network(layer) if isinstance(layer, keras.Model) else model
    return model


def save_weights(model: keras.Model, path: str | PathLike) -> None:
    """Save a model's weights, and what it expects of an image; the ending chooses the form.

    Args:
        model: any Keras model.
        path: `.safetensors` (Keras's names), `.weights.h5` (Keras 3's own form), `.pth` (for VGG's
            layers torchvision's keys and layout, for others those of `to_torch`) or `.bin` (the
            same with timm's).

    Raises:
        ValueError: another ending, or a layer whose name can't stand in a file of torch's form.
        OSError: the file can't be written; one that stood there before is then still whole.

    Example:
        >>> import keras, tempfile, torch
        >>> import vggtorch as vt
        >>> model = vt.truncate(vt.VGG11(weights=None, include_top=False), "block1_pool")
        >>> model = vt.stack(model, keras.layers.Conv2D(8, 1, name="mine"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vt.save_weights(model, f"{folder}/mine.pth")
        ...     list(torch.load(f"{folder}/mine.pth"))  # torchvision's names where it has them
        ['features.0.weight', 'features.0.bias', 'mine.weight', 'mine.bias']
    """
    _check_built(model, "save_weights")
    if not isinstance(path, str | PathLike) or not str(path).endswith(ENDINGS):
        is_whole = str(path).endswith(MODELS)
        whole = " (model.save(path) writes the whole model)" if is_whole else ""
        raise ValueError(
            f"Received {path!r}; expected a name that ends in {', '.join(ENDINGS)}.{whole}"
        )
    _check_kept(model)
    network = model if remembered(model) != DataConfig() else _first_network(model)
    name, said = weight_set(network), None
    if remembered(network) != DataConfig():
        config = dataclasses.replace(data_config(network), preprocessing_inside=False)
        said = json.dumps(config.as_dict())
    if str(path).endswith(".weights.h5"):
        import h5py

        with files.atomic(path) as temporary:
            model.save_weights(temporary)
            with h5py.File(temporary, "r+") as file:  # Keras looks at no attribute of the root
                notes = {"vggtorch_weight_set": name, "vggtorch_data_config": said}
                file.attrs.update({key: text for key, text in notes.items() if text is not None})
    else:
        tensors = {key: variable.value for key, variable in named_variables(model).items()}
        if not str(path).endswith(".safetensors"):
            tensors = in_torch_form(model, tensors, timm=str(path).endswith(".bin"))
        weights.write(path, tensors, name, said)


def _check_built(model: keras.Model, verb: str) -> None:
    """Raise where a model has no weights yet, of which nothing could be loaded or saved."""
    check_model(model, verb)
    if not model.built:
        raise ValueError(
            f"{verb} received {model.name!r}, which isn't built and has no weights yet. Call the "
            f"model on some data first, or model.build(input_shape)."
        )


def _check_kept(model: keras.Model) -> None:
    """Raise where layers hold tensors of torch's that no file of weights would have."""
    known = {raw_value(variable).untyped_storage().data_ptr() for variable in model.variables}
    lost = [
        f"{layer.name}.{key}"
        for layer in all_layers(model)
        for key, tensor in (*layer._parameters.items(), *layer._buffers.items())
        if tensor is not None
        and key not in layer._non_persistent_buffers_set
        and tensor.untyped_storage().data_ptr() not in known
    ]
    if lost:
        raise ValueError(
            f"{model.name!r} holds tensors of torch's that are no weights of Keras's and would be "
            f"lost: {weights.shortened(lost)}. Make them weights (self.add_weight), or buffers "
            f"with persistent=False where they are no state."
        )


MARGIN = 2**26  # bytes by which a configuration may ask for more weights than a file has
KEPT = ("config.json", "metadata.json", "model.weights.h5")  # a model that Keras keeps as a folder


def load_model(source: str | PathLike) -> keras.Model:
    """A model from a run's folder, a .keras or .h5 file, or the Hugging Face hub (hf://owner/name).

    No code that a file brings is run. What is on the hub is fetched by its own client, with its
    token (`hf auth login`, HF_TOKEN), and only what has changed.

    >>> import tempfile, keras, vggtorch as vt
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(f"{folder}/model.keras")
    ...     vt.load_model(folder).output_shape
    (None, 2)

    Args:
        source: a folder with model.keras in it, or one that Keras wrote with `zipped=False`; a
            file; or `hf://owner/name`, with `@revision` where one is meant.

    Raises:
        ValueError: no model there, a damaged one, or layers that Keras doesn't find; names it.
        OSError: the hub can't be reached, or doesn't have it.
    """
    path = paths.as_path(source)
    if paths.is_on_hub(source):
        path = weights.folder_from_hub(str(source), ["model.keras", *KEPT])
    if path.is_dir():
        if (path / "model.keras").is_file():
            path = path / "model.keras"
        elif not all((path / name).is_file() for name in KEPT):
            raise ValueError(
                f"{source} has no model.keras{_instead(path)}. Expected the folder of a run that "
                f"has ended, or one that Keras has written. Weights alone go into a model that is "
                f"there (vt.load_weights(model, path))."
            )
    elif not path.is_file():
        raise ValueError(paths.missing_model(source))
    elif path.name.endswith(ENDINGS):
        raise ValueError(
            f"{source} is a file of weights, which has no model in it. Weights go into a model "
            f"that is there (vt.load_weights(model, path))."
        )
    elif path.suffix not in MODELS:
        raise ValueError(
            f"{source} is no model of Keras by its ending. Expected the folder of a run that has "
            f"ended, or a file that ends in {', '.join(MODELS)}.{_made_of(path)}"
        )
    try:
        if path.suffix == ".keras":
            weights.check_archive(path)
            _check_size(path)
        model = keras.saving.load_model(path, safe_mode=True)
    except Exception as error:  # Keras raises all kinds for damaged and for foreign files
        raise ValueError(
            f"{source} can't be loaded as a Keras model: {files.first_line(error)}"
        ) from error
    return _remembering(model, path) if path.suffix in (".h5", ".hdf5") else model


def _remembering(model: keras.Model, path: Path) -> keras.Model:
    """A model of Keras's older form, which names no classes of others, with what its file says."""
    network = _first_network(model)
    if remembered(network) != DataConfig():
        return model
    try:
        checkpoint = weights.read(path, whole_numbers=True)
    except ValueError as error:
        tell(f"What {path} may say of the images that the model expects can't be read: {error}")
        return model
    remember_checkpoint_(network, checkpoint, _classes(model) if network is model else 0)
    return model


def _made_of(path: Path) -> str:
    """Where the model is that a file was made of."""
    if path.suffix in paths.EXPORTED:
        return " What was exported isn't read back: pass the model that it was exported from."
    run = path.parent
    return f" It belongs to a run: pass {run}." if (run / "model.keras").is_file() else ""


def _check_size(path: Path) -> None:
    """Refuse a configuration whose weights take far more memory than the file has of them.

    The model is made without memory first. Layers that can't be made so are left to Keras.
    """
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
        there = archive.getinfo("model.weights.h5").file_size
    drawn = random.getstate()  # which initializers take their seeds from
    try:
        config.pop("compile_config", None)
        with keras.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = keras.saving.deserialize_keras_object(config, safe_mode=True)
            wanted = sum(v.value.numel() * v.value.element_size() for v in model.variables)
    except Exception:
        return
    finally:
        random.setstate(drawn)
    if wanted > 4 * there + MARGIN:
        raise ValueError(
            f"its configuration asks for {wanted} bytes of weights, and there are {there}"
        )


def _instead(folder: Path) -> str:
    """What a run's folder holds in the place of a model."""
    if (folder / "last.pt").is_file():
        return (
            ", but a checkpoint: that run hasn't ended (carry it on with resume=True), or it was "
            "vt.finetune's and nobody has written its model (vt.save_trained(history, folder))"
        )
    return ""


def model_from_name(name: str | PathLike) -> keras.Model:
    """A model to look at: a network by its name, with random weights, or what `load_model` takes.

    Raises:
        ValueError: neither of the two.
        OSError: the hub can't be reached, or doesn't have it.
    """
    if str(name) in ARCHITECTURES:
        return constructor(str(name))(weights=None)
    paths.check_model(str(name))
    return load_model(name)
