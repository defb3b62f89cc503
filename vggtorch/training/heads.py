"""The top of a network: new heads on feature maps, and the logits that training needs of any."""

from __future__ import annotations

import keras
from keras import layers

from vggtorch import surgery
from vggtorch.keras_graph import calls, graph_of, producer, without_activation
from vggtorch.lowering import OnKeras, between
from vggtorch.models import remember_, remembered
from vggtorch.telling import tell
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import seeded
from vggtorch.weights import shortened


def tutorial_head(classes: int) -> list[keras.Layer]:
    """The tutorial's small network as new layers, for a cut network with feature maps.

    Batch norm stands first because some weight sets (`oxford`) put out features as large as pixel
    values. Taken as they are, they saturate the softmax at once, and a saturated softmax learns
    nothing.

    >>> import vggtorch as vt
    >>> from vggtorch.training import tutorial_head
    >>> vgg = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> vt.stack(vt.truncate(vgg, "block2_pool"), tutorial_head(classes=10)).output_shape
    (None, 10)
    """
    return [
        _batch_norm("head_norm"),
        layers.Conv2D(64, 3, activation="relu", name="head_conv"),
        layers.MaxPooling2D(2, name="head_pool"),
        layers.Flatten(name="head_flatten"),
        layers.Dense(256, activation="relu", name="head_hidden"),
        layers.Dropout(0.5, name="head_dropout"),
        layers.Dense(classes, activation="softmax", name="head_predictions"),
    ]


def with_head(model: keras.Model, config: TrainConfig, classes: int) -> keras.Model:
    """A new model: `model` up to `config.cut` with the head that `config.head` names.

    `linear` and `mlp` are fastai's, on the mean and the maximum of each feature map, normalised.
    `multilevel` is the MLP on the maps of three depths together, those of the last pooling layers,
    and on the mean of each quarter of them too.

    Sources: Howard and Gugger, "fastai: a layered API", 2020; Hariharan et al., "Hypercolumns for
    Object Segmentation and Fine-grained Localization", 2015 (features of several depths); He et
    al., "Spatial Pyramid Pooling in Deep Convolutional Networks", 2014 (quarters).

    Raises:
        ValueError: the model has no feature maps where it is cut, or the classes aren't known.
    """
    if classes < 2:
        raise ValueError(
            f"The head {config.head!r} needs to know the classes, and the data doesn't name them. "
            f"Give the Dataset an attribute `classes` with their names, as torchvision's have, or "
            f"stack a head of your own first."
        )
    with seeded(config.seed):
        base = surgery.truncate(model, config.cut or model.layers[-1].name)
        maps = base.output
        if len(maps.shape) != 4:
            raise ValueError(
                f"The head {config.head!r} needs feature maps (N, H, W, C) under it; {base.name} "
                f"ends in {tuple(maps.shape)}. Name a layer to cut at: cut='block5_pool'."
            )
        x = maps
        if config.head == "tutorial":
            for layer in tutorial_head(classes):
                x = layer(x)
        else:
            levels = _levels(base) if config.head == "multilevel" else [maps]
            pooled = []
            for i, level in enumerate(levels, 1):
                number = str(i) if len(levels) > 1 else ""
                pooled += [
                    layers.GlobalAveragePooling2D(name=f"head_mean{number}")(level),
                    layers.GlobalMaxPooling2D(name=f"head_max{number}")(level),
                ]
                if config.head == "multilevel" and not {1, None} & set(level.shape[1:3]):
                    quarters = layers.AdaptiveAveragePooling2D(2, name=f"head_quarters{number}")
                    flat = layers.Flatten(name=f"head_flat{number}")
                    pooled.append(flat(quarters(level)))
            x = layers.Concatenate(name="head_pool")(pooled)
            x = _batch_norm("head_norm")(x)
            if config.head != "linear":
                x = layers.Dropout(0.25, name="head_dropout")(x)
                x = _dense(512, "relu", "head_hidden")(x)
                x = _batch_norm("head_norm2")(x)
                x = layers.Dropout(0.5, name="head_dropout2")(x)
            x = _dense(classes, "softmax", "head_predictions")(x)
        return remember_(keras.Model(base.input, x, name=model.name), remembered(model))


def _levels(base: keras.Model) -> list[keras.KerasTensor]:
    """The maps of up to three depths of a network: its output, and the last pools below it."""
    pools = [
        call.output_tensors[0]
        for call in calls(graph_of(base, "finetune"))
        if isinstance(call.operation, layers.MaxPooling2D | layers.AveragePooling2D)
    ]
    below = [tensor for tensor in pools if tensor is not base.outputs[0]]
    return [*below[-2:], base.outputs[0]]


def check_frozen(before: keras.Model, model: keras.Model, config: TrainConfig) -> None:
    """See that what is to be frozen and unfrozen isn't in what was cut away of `before`."""
    known = {layer.name for layer in model.layers}
    cut_away = {layer.name for layer in before.layers} - known
    stages = [f"({epoch}, {name!r})" for epoch, name in config.unfreeze if name in cut_away]
    named = [f"freeze={config.freeze!r}"] if config.freeze in cut_away else []
    named += [f"unfreeze=({', '.join(stages)},)"] if stages else []
    if named:
        raise ValueError(
            f"Received cut={config.cut!r} with {' and '.join(named)}, which lies above the cut and "
            f"was cut away. Name a layer that is kept: freeze={config.cut!r} freezes all of them."
        )


def _dense(units: int, activation: str, name: str) -> keras.Layer:
    """A dense layer that begins as torch's Linear does, uniform within 1 / sqrt(inputs).

    Keras's own begins two and a half times as large on thousands of inputs, and on few images what
    is random in it outweighs what is learned: it is worse on folds of training images.
    """
    begin = keras.initializers.VarianceScaling(1 / 3, mode="fan_in", distribution="uniform")
    return layers.Dense(units, activation=activation, kernel_initializer=begin, name=name)


def _batch_norm(name: str) -> keras.Layer:
    """Batch norm that follows a short training sooner than Keras's default momentum of 0.99."""
    return layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name=name)


def class_names(
    model: keras.Model,
    classes: tuple[str, ...],
    *,
    is_part: bool = False,
    before: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """The names of the model's outputs; numbers where the data has no names.

    Data that is a part of a larger Dataset may have but the first of that one's classes. Warns
    where outputs that had a name `before` get another.

    Raises:
        ValueError: the model doesn't put out one value for each class, or isn't a graph of layers.
    """
    graph_of(model, "finetune")
    shape = model.output_shape
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(
            f"{model.name} puts out {shape}; expected (N, classes). Stack a head on it, or name "
            f"one: TrainConfig(head='multilevel')."
        )
    if is_part:
        classes = classes[: shape[1]]
    if classes and len(classes) != shape[1]:
        raise ValueError(
            f"The data has {len(classes)} classes ({', '.join(classes)}), and {model.name} "
            f"puts out {shape[1]}. Stack a head of {len(classes)} on it, or name one: "
            f"TrainConfig(head='multilevel')."
        )
    renamed = [f"{old} is {new}" for old, new in zip(before, classes, strict=False) if old != new]
    if renamed:
        tell(
            f"The classes of {model.name} were others: {shortened(renamed, 4)} from now on. What "
            f"its head has learned of them is unlearned first; a new one has nothing to unlearn "
            f"(head='linear', cut='block5_pool', say).",
        )
    return classes or tuple(map(str, range(shape[1])))


def last_layer(model: keras.Model) -> keras.layers.Layer:
    """The layer that makes a model's output, inside the models that it may be nested in."""
    layer = producer(model.outputs[0])
    while isinstance(layer, keras.Model):
        layer = producer(layer.outputs[0])
    return layer


def ends_in_logits(model: keras.Model) -> bool:
    """Whether a model ends in a dense layer without an activation, which puts out logits."""
    layer = last_layer(model)
    return isinstance(layer, layers.Dense) and layer.activation is keras.activations.linear


def logits_network(model: keras.Model, start: keras.KerasTensor) -> OnKeras:
    """What a model does from a tensor on, as a torch network that puts out logits.

    A softmax at the end is left out: the cross-entropy of logits keeps its gradient where a
    probability rounds to 0 or 1. The model itself isn't changed; the parameters are its own.

    Raises:
        ValueError: the model ends in another activation, so that it puts out neither.
    """
    layer = last_layer(model)
    activation = getattr(layer, "activation", keras.activations.linear)
    allowed = (keras.activations.softmax, keras.activations.linear)
    if isinstance(layer, layers.Softmax) or activation not in allowed:
        raise ValueError(
            f"{model.name} ends in {layer.name} ({type(layer).__name__}, activation "
            f"{getattr(activation, '__name__', activation)}); expected "
            f"Dense(classes, activation='softmax'), or activation=None for logits."
        )
    end = model.outputs[0]
    softmax = activation is keras.activations.softmax
    return between(start, without_activation(end) if softmax else end)
