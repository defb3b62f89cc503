"""VGG11, VGG13, VGG16 and VGG19 as Keras models, and their weights in and out by layer name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import isqrt
from os import PathLike
from pathlib import Path

import keras
import torch
from keras import layers
from keras.src.applications.imagenet_utils import obtain_input_shape
from keras.src.backend.torch.core import get_device

from vggtorch import files
from vggtorch.architectures import ARCHITECTURES, CLASSES, GRID, WIDTHS, Architecture
from vggtorch.models import preprocessing
from vggtorch.weight_sets import WEIGHT_SETS
from vggtorch.weights import conversion, sources
from vggtorch.weights.conversion import Shape

# torchvision's and the papers' batch norm; Keras's own defaults differ (1e-3 and 0.99).
BATCH_NORM = {"epsilon": 1e-5, "momentum": 0.9}

VGG_LAYERS = frozenset(
    layer.name
    for architecture in ARCHITECTURES.values()
    for layer in (*architecture.features(), *architecture.classifier())
)


def _connect(
    x: keras.KerasTensor,
    architecture: Architecture,
    *,
    include_top: bool,
    pooling: str | None,
    classes: int,
    classifier_activation: str | Callable | None,
    dropout: float,
) -> keras.KerasTensor:
    """The network's layers on top of an image tensor, in keras.applications' order and names."""
    channel_axis = -1 if keras.config.image_data_format() == "channels_last" else 1
    for layer in architecture.features():
        if layer.kind == "conv":
            x = layers.Conv2D(
                layer.outputs,
                (3, 3),
                activation=None if architecture.batch_norm else "relu",
                padding="same",
                name=layer.name,
            )(x)
        elif layer.kind == "batch_norm":
            x = layers.BatchNormalization(channel_axis, name=layer.name, **BATCH_NORM)(x)
            x = layers.Activation("relu", name=layer.name.replace("_bn", "_relu"))(x)
        else:
            x = layers.MaxPooling2D((2, 2), strides=(2, 2), name=layer.name)(x)
    if include_top:
        x = layers.Flatten(name="flatten")(x)
        for layer in architecture.classifier(classes):
            last = layer.name == "predictions"
            activation = classifier_activation if last else "relu"
            x = layers.Dense(layer.outputs, activation=activation, name=layer.name)(x)
            if dropout and not last:
                x = layers.Dropout(dropout, name=f"{layer.name}_dropout")(x)
    elif pooling == "avg":
        x = layers.GlobalAveragePooling2D()(x)
    elif pooling == "max":
        x = layers.GlobalMaxPooling2D()(x)
    return x


def _build(
    architecture: Architecture,
    weights: str | PathLike | None,
    *,
    include_top: bool,
    input_tensor: keras.KerasTensor | None,
    input_shape: tuple[int | None, ...] | None,
    pooling: str | None,
    classes: int,
    classifier_activation: str | Callable | None,
    name: str,
    dropout: float,
    include_preprocessing: bool,
) -> keras.Model:
    if pooling not in (None, "avg", "max"):
        raise ValueError(f"Received pooling={pooling!r}; expected None, 'avg' or 'max'.")
    if not 0 <= dropout < 1:
        raise ValueError(f"Received dropout={dropout!r}; expected a rate from 0 to below 1.")
    published = isinstance(weights, str) and weights in WEIGHT_SETS
    if published and include_top and classes != CLASSES:
        raise ValueError(
            f"Received classes={classes} with weights={weights!r} and include_top=True, whose "
            f"classifier has {CLASSES}. Use include_top=False and stack a head of your own, or "
            f"weights=None."
        )
    if weights is not None and include_top and classifier_activation not in (None, "softmax"):
        raise ValueError(
            f"Received classifier_activation={classifier_activation!r} with pretrained weights; "
            f"expected 'softmax', or None for logits."
        )
    # The checkpoint first: what can't be had should cost no time.
    tensors: dict[str, torch.Tensor] = {}
    weight_set = None
    if weights is not None:
        tensors, weight_set = _tensors(weights, [architecture], include_top=include_top)
    if include_preprocessing and weights is not None and weight_set is None:
        raise ValueError(
            f"include_preprocessing=True needs to know the preprocessing, and {weights!r} does not "
            f"say which weight set it belongs to. Use include_preprocessing=False and preprocess()."
        )

    input_shape = obtain_input_shape(
        input_shape,
        default_size=224,
        min_size=32,
        data_format=keras.config.image_data_format(),
        require_flatten=include_top,
        weights="imagenet" if published else None,
    )
    # Random values that the checkpoint would replace are never made: the model is built without.
    with keras.device("meta") if tensors else keras.device(get_device()):
        if input_tensor is None:
            inputs = image = layers.Input(shape=input_shape)
        elif keras.backend.is_keras_tensor(input_tensor):
            image, inputs = input_tensor, keras.utils.get_source_inputs(input_tensor)
        else:
            raise ValueError(
                f"Received input_tensor of type {type(input_tensor).__name__}; expected a Keras "
                f"tensor, such as keras.Input(shape=(160, 160, 3))."
            )
        if include_preprocessing:
            image = preprocessing.as_layers(image, weight_set or "imagenet")
        outputs = _connect(
            image,
            architecture,
            include_top=include_top,
            pooling=pooling,
            classes=classes,
            classifier_activation=classifier_activation,
            dropout=dropout,
        )
        model = keras.Model(inputs, outputs, name=name)
    if weights is not None:
        _match(named_variables(model), tensors, weights)
        fill_(model, tensors)
    return preprocessing.remember_(model, weight_set)


def _constructor(plain_name: str) -> Callable[..., keras.Model]:
    """The public function that builds one of the four networks, with or without batch norm."""

    def build(
        include_top: bool = True,
        weights: str | PathLike | None = "imagenet",
        input_tensor: keras.KerasTensor | None = None,
        input_shape: tuple[int | None, ...] | None = None,
        pooling: str | None = None,
        classes: int = CLASSES,
        classifier_activation: str | Callable | None = "softmax",
        name: str | None = None,
        *,
        batch_norm: bool = False,
        dropout: float = 0.0,
        include_preprocessing: bool = False,
    ) -> keras.Model:
        architecture = ARCHITECTURES[plain_name + ("_bn" if batch_norm else "")]
        return _build(
            architecture,
            weights,
            include_top=include_top,
            input_tensor=input_tensor,
            input_shape=input_shape,
            pooling=pooling,
            classes=classes,
            classifier_activation=classifier_activation,
            name=name or architecture.name,
            dropout=dropout,
            include_preprocessing=include_preprocessing,
        )

    title = plain_name.upper()
    build.__name__ = build.__qualname__ = title
    build.__doc__ = f"""{title} as a Keras Functional model on torch.

    Signature, defaults, layer names and order are those of keras.applications; batch norm layers,
    which that does not have, are named `block1_bn1` and their ReLU `block1_relu1`.

    Args:
        include_top: whether flatten, fc1, fc2 and predictions are included.
        weights: `imagenet`, `features`, `oxford`, the path of a checkpoint, or None for random.
        input_tensor: a Keras tensor to use as the image, (N, H, W, 3) in channels-last.
        input_shape: (H, W, 3), at least 32x32; without a top, H and W may be None.
        pooling: without a top: None for the feature map, `avg` or `max` for its mean or maximum.
        classes: units of predictions.
        classifier_activation: of predictions; None for logits.
        name: the model's name; the architecture's by default.
        batch_norm: the network with batch norm after each convolution.
        dropout: rate of a Dropout after fc1 and after fc2 (torchvision trains with 0.5).
        include_preprocessing: the model then takes RGB images of 0 to 255 as they are.

    Returns:
        The model; `vggtorch.weight_set(model)` says which preprocessing it expects.

    Raises:
        ValueError: arguments that don't go together, or a checkpoint that does not fit.
        OSError: the checkpoint can't be had.

    Source: Simonyan and Zisserman, ICLR 2015.
    """
    return build


VGG11 = _constructor("vgg11")
VGG13 = _constructor("vgg13")
VGG16 = _constructor("vgg16")
VGG19 = _constructor("vgg19")


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise ValueError(
            f"Unknown architecture {name!r}; expected one of {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[name]


def constructor(architecture: str) -> Callable[..., keras.Model]:
    """The function that builds one of the eight networks: `VGG16`, say, for "vgg16_bn" too.

    Raises ValueError for a name that isn't in ARCHITECTURES.
    """
    plain = {"vgg11": VGG11, "vgg13": VGG13, "vgg16": VGG16, "vgg19": VGG19}
    network = _architecture(architecture)
    return partial(plain[network.name.removesuffix("_bn")], batch_norm=network.batch_norm)


def named_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """A model's weights by name: `layer/variable`, with the nested model's name before it.

    Trainable weights and state such as moving means; random seeds are not weights.
    """
    named = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            inner = named_variables(layer)
            named.update({f"{layer.name}/{key}": variable for key, variable in inner.items()})
        else:
            for variable in layer.weights:
                tail = variable.path.split(f"{layer.name}/", 1)[-1]
                named[f"{layer.name}/{tail}"] = variable
    return named


def fill_(model: keras.Model, tensors: Mapping[str, torch.Tensor]) -> keras.Model:
    """Give a model that was built on the meta device its values, in place, without copying them.

    Layers that have values, such as those before the user's `input_tensor`, keep them.

    Args:
        model: built under `keras.device("meta")`.
        tensors: a tensor for each of `named_variables(model)` that has no value; the variables
            share their memory where the tensors are already on Keras's device and of the
            variable's dtype.
    """
    device = get_device()
    for key, variable in named_variables(model).items():
        if not variable._value.is_meta:
            continue
        dtype = getattr(torch, variable.dtype)
        value = tensors[key].to(device=device, dtype=dtype)
        variable._value = torch.nn.Parameter(value, requires_grad=variable.trainable)
    inner = list(model._flatten_layers())
    # A seed's value was lost on the meta device too.
    for generator in (g for layer in inner for g in getattr(layer, "_seed_generators", ())):
        if generator.state._value.is_meta:
            fresh = keras.random.SeedGenerator(generator._initial_seed)
            generator.state._initialize(fresh.state.value)
    for layer in inner:
        layer._track_variables()  # Keras listed the Parameters that were replaced
    return model


def _tensors(
    source: str | PathLike, candidates: list[Architecture], *, include_top: bool = False
) -> tuple[dict[str, torch.Tensor], str | None]:
    """The Keras-named tensors of a weight set or a file, and which weight set they are."""
    path = _path(source, candidates, include_top=include_top)
    checkpoint = sources.converted(path, lambda c: conversion.to_views(c.tensors, c.form))
    return conversion.flattened(checkpoint.tensors), checkpoint.weight_set


def _path(
    source: str | PathLike, candidates: list[Architecture], *, include_top: bool = False
) -> Path:
    """The file of a weight set, or of a path that exists."""
    if isinstance(source, str) and source in WEIGHT_SETS:
        known = [a for a in candidates if sources.exists(source, a.name)] or candidates
        if len(known) > 1:
            names = ", ".join(a.name for a in known)
            raise ValueError(
                f"This model may be a part of any of {names}, so weights={source!r} could mean "
                f"several files. Give the model the name of its network, or pass a path."
            )
        return sources.find(source, known[0].name, include_top=include_top)
    if not Path(source).exists():
        raise ValueError(
            f"Received weights={str(source)!r}; expected one of {', '.join(WEIGHT_SETS)} or "
            f"the path of an existing file."
        )
    return Path(source)


def _match(
    variables: Mapping[str, keras.Variable],
    tensors: Mapping[str, torch.Tensor],
    source: str | PathLike,
) -> None:
    """Check that `tensors` are the weights of `variables`, or raise ValueError with the lists.

    A published VGG checkpoint may go beyond a model that was cut out of its network, and knows
    nothing of layers that the user added; apart from that every name must be on both sides.
    """
    in_file = list(dict.fromkeys(key.rsplit("/", 1)[0] for key in tensors))
    in_model = {key.rsplit("/", 1)[0] for key in variables}
    shared = [i for i, layer in enumerate(in_file) if layer in in_model]
    if not shared:
        raise ValueError(
            f"No layer of the model is in {str(source)!r}. The file has "
            f"{conversion.shortened(in_file)}; the model has {conversion.shortened(in_model)}. "
            f"If the network is nested in the model, load it by itself: "
            f"load_weights(model.get_layer(name), ...)."
        )
    beyond = {*in_file[: shared[0]], *in_file[shared[-1] + 1 :]} & VGG_LAYERS
    published = VGG_LAYERS.issuperset(in_file)
    missing = [
        key
        for key in variables
        if key not in tensors and not (published and key.rsplit("/", 1)[0] not in VGG_LAYERS)
    ]
    unexpected = [
        key for key in tensors if key not in variables and key.rsplit("/", 1)[0] not in beyond
    ]
    differing = [
        f"{key} has {tuple(tensors[key].shape)}, expected {tuple(variables[key].shape)}"
        for key in variables
        if key in tensors and tuple(tensors[key].shape) != tuple(variables[key].shape)
    ]
    if not (missing or unexpected or differing):
        return
    advice = ""
    if missing and all(key.split("/")[0] in ("fc1", "fc2", "predictions") for key in missing):
        advice = " It has no classifier: build the model with include_top=False."
    raise ValueError(
        f"{str(source)!r} does not fit the model. "
        f"Missing in the file: {conversion.shortened(missing) or 'none'}. "
        f"Unexpected in the file: {conversion.shortened(unexpected) or 'none'}. "
        f"Shapes that differ: {conversion.shortened(differing) or 'none'}.{advice}"
    )


def load_weights(model: keras.Model, source: str | PathLike) -> keras.Model:
    """Load weights into a model by layer name, in place; also into keras.applications' own.

    A model that was cut takes its part of a published checkpoint, and layers that were added to it
    keep their values. Nothing is changed unless everything fits.

    Args:
        model: any Keras model with VGG's layers, or the one that a file was saved from.
        source: `imagenet`, `features`, `oxford`, or the path of a checkpoint.

    Returns:
        The model, which from now on remembers the weight set.

    Raises:
        ValueError: names or shapes that differ (with both lists), or a damaged file.
        OSError: the checkpoint can't be had.
    """
    variables = named_variables(model)
    shapes = {
        key: tuple(variable.shape)
        for key, variable in variables.items()
        if key.split("/")[0] in VGG_LAYERS
    }
    candidates = conversion.identify(shapes) or list(ARCHITECTURES.values())
    candidates = [a for a in candidates if a.name == model.name] or candidates
    include_top = any(key.startswith(("fc1/", "fc2/", "predictions/")) for key in shapes)
    tensors, weight_set = _tensors(source, candidates, include_top=include_top)
    _match(variables, tensors, source)
    for key, variable in variables.items():
        if key in tensors:
            variable.assign(tensors[key])
    preprocessing.remember_(model, weight_set)
    return model


def save_weights(model: keras.Model, path: str | PathLike) -> None:
    """Save a model's weights; the ending chooses the form.

    Args:
        model: any Keras model; for .pth and .bin, VGG layers only.
        path: `.safetensors` (Keras names, weight set kept), `.weights.h5` (Keras 3's own form),
            `.pth` (torchvision's keys and layout) or `.bin` (timm's).

    Raises:
        ValueError: another ending, or layers that torchvision has no keys for.
        OSError: the file can't be written; one that stood there before is then still whole.
    """
    if str(path).endswith(".weights.h5"):
        with files.atomic(path) as temporary:
            model.save_weights(temporary)
    else:
        tensors = {key: variable.value for key, variable in named_variables(model).items()}
        _write(path, tensors, preprocessing.weight_set(model))


def _write(
    path: str | PathLike, tensors: Mapping[str, torch.Tensor], weight_set: str | None
) -> None:
    """Write Keras-named tensors by the names that the ending asks for."""
    sources.write(path, _renamed(path, tensors), weight_set)


def _renamed(
    path: str | PathLike, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Keras-named tensors as they are, or as torchvision's (.pth) or timm's (.bin)."""
    if str(path).endswith(".pth"):
        return conversion.keras_to_torchvision(tensors)
    if str(path).endswith(".bin"):
        return conversion.keras_to_timm(tensors)
    return tensors


def convert(
    source: str | PathLike, target: str | PathLike, architecture: str | None = None
) -> list[tuple[str, Shape, str, Shape]]:
    """Write a checkpoint in another form.

    Args:
        source: a weight set or a checkpoint of any form that can be read.
        target: the ending chooses the form: `.safetensors`, `.pth` (torchvision's names), `.bin`
            (timm's), `.weights.h5`, or with the network around the weights `.keras` or `.h5`.
        architecture: a name in ARCHITECTURES; recognised from the tensors where it isn't given.

    Returns:
        Name and shape in the source, name and shape in the target of each tensor, in network order.

    Raises:
        ValueError: the source fits no network, or not this one, or the target has another ending.
        OSError: the source can't be had or the target can't be written.
    """
    checkpoint = sources.read(_path(source, [_architecture(architecture or "vgg16")]))
    tensors = conversion.to_keras(checkpoint.tensors, checkpoint.form)
    network = conversion.architecture_of(tensors, architecture)
    order = [rule.keras_key for rule in conversion.rules(network, include_top=True)]
    tensors = {key: tensors[key] for key in order if key in tensors}
    if str(target).endswith((".h5", ".keras")):
        # Keras orders these forms by the layers of a model, so one is built around the tensors.
        grid, classes = GRID, CLASSES
        if top := "predictions/bias" in tensors:
            grid = isqrt(tensors["fc1/kernel"].shape[0] // WIDTHS[-1])
            classes = len(tensors["predictions/bias"])
        size = grid * 2 ** len(WIDTHS)
        with keras.device("meta"):
            model = constructor(network.name)(
                weights=None, include_top=top, classes=classes, input_shape=(size, size, 3)
            )
        _match(named_variables(model), tensors, source)
        preprocessing.remember_(fill_(model, tensors), checkpoint.weight_set)
        if str(target).endswith(".weights.h5"):
            save_weights(model, target)
        else:
            with files.atomic(target) as temporary:
                model.save(temporary)
    else:
        _write(target, tensors, checkpoint.weight_set)
    before = conversion.traced(
        checkpoint.tensors, lambda read: conversion.to_keras(read, checkpoint.form)
    )
    after = conversion.traced(tensors, lambda read: _renamed(target, read))
    written = _renamed(target, tensors)
    return [
        (name, tuple(checkpoint.tensors[name].shape), key, tuple(written[key].shape))
        for key in after
        for name in [before[after[key]]]
    ]


def describe(name: str | PathLike) -> keras.Model:
    """A model to look at: a network by its name, with random weights, or a .keras file.

    Raises:
        ValueError: neither of the two.
    """
    if str(name) in ARCHITECTURES:
        return constructor(str(name))(weights=None)
    if not Path(name).is_file():
        raise ValueError(
            f"Received {str(name)!r}; expected one of {', '.join(ARCHITECTURES)} or a .keras file."
        )
    return keras.saving.load_model(name)
