"""Whether a checkpoint fits a model, after `matching` has found what belongs together.

A model takes all weights of a file, with two exceptions that are no mistake: it was cut out of a
larger network, or it is the convolutions alone and leaves the file's head. Anything else is refused
with both lists, and the message names the ways on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike

import keras

from vggtorch import weights
from vggtorch.architectures import FEATURES, LAYERS
from vggtorch.keras_graph import raw_value
from vggtorch.models.filling import fill_, named_variables
from vggtorch.models.matching import Match, match
from vggtorch.models.memory import remember_checkpoint_
from vggtorch.telling import tell
from vggtorch.weights import Checkpoint


def matched(
    model: keras.Model,
    variables: Mapping[str, keras.Variable],
    checkpoint: Checkpoint,
    source: object,
    *,
    prefix: str = "",
    backbone: bool = False,
    partial: bool = False,
) -> Match:
    """What `match` finds, where what is left over on both sides may be, or ValueError with both.

    A published VGG checkpoint may go beyond a model that was cut out of its network, and knows
    nothing of layers that the user added; apart from that every name must be on both sides. Of a
    `backbone`, VGG's convolutions, the file's other layers are the head, which may be any. What is
    `partial` may be whatever belongs together. `source` is what the user called the checkpoint.
    """
    found = match(model, variables, checkpoint, prefix=prefix)
    title = "The state_dict" if isinstance(source, Mapping) else repr(str(source))
    in_file = [*(layer or key for key, (layer, _) in found.left.items())]
    in_file += map(_layer, found.names)
    in_file, in_model = _once(in_file), _once(map(_layer, [*found.missing, *found.names]))
    nothing = not (found.values if partial else found.names)
    if nothing and (partial or set(in_file).isdisjoint(in_model)):
        raise ValueError(
            f"No layer of the model is in {title}. The file has "
            f"{weights.shortened(in_file)}; the model has {weights.shortened(in_model)}. "
            f"If the network is nested in the model, load it by itself: "
            f"load_weights(model.get_layer(name), ...).{_advice_of_keras(source)}"
        )
    if partial:
        return found
    left, missing = _unexpected(found, backbone), found.missing
    if backbone or set(in_file) <= set(LAYERS):
        missing = [key for key in missing if _layer(key) in LAYERS]
    if nothing or missing or left or found.differing:
        raise ValueError(
            f"{title} does not fit the model. "
            f"Missing in the file: {weights.shortened(missing) or 'none'}. "
            f"Unexpected in the file: {weights.shortened(left) or 'none'}. "
            f"Shapes that differ: {weights.shortened(found.differing) or 'none'}."
            f"{_advice(missing, in_file, found)}{_advice_of_keras(source)}"
        )
    return found


def _unexpected(found: Match, backbone: bool) -> list[str]:
    """What is in the file and neither in the model nor in a larger network that it was cut from."""
    shared = [LAYERS.index(name) for key in found.names if (name := _layer(key)) in LAYERS]
    beyond: set[str] = set()
    if shared:
        beyond = {*LAYERS[: min(shared)], *LAYERS[max(shared) + 1 :]}
    if backbone:
        return [key for key, (layer, _) in found.left.items() if layer in FEATURES]
    return [key for key, (layer, _) in found.left.items() if layer not in beyond]


def _is_expected(key: str, found: Match) -> bool:
    """Whether a tensor was left that one expects to be.

    That is so of VGG's own classifier, of Dense layers, and of another network that stands beside
    the one that was asked for.
    """
    layer, _ = found.left[key]
    shapes = [shape for other, shape in found.left.values() if other == layer]
    ranks = sorted(len(shape) for shape in shapes)
    return layer.endswith(LAYERS) or ranks in ([2], [1, 2])


def _layer(key: str) -> str:
    return key.rpartition("/")[0]


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _advice(missing: list[str], in_file: list[str], found: Match) -> str:
    """What to do instead."""
    top = {"fc1", "fc2", "predictions"}
    lacking = {_layer(key) for key in missing}
    if missing and lacking <= top and not found.left and not found.differing:
        if lacking == {"predictions"} and "predictions" not in in_file:
            return (
                " It ends at fc2: load it into a model that does too (vt.load_weights(vt.truncate("
                "model, 'fc2'), path)), or build the model with include_top=False."
            )
        if not top & set(in_file):
            return " It has no classifier: build the model with include_top=False."
    return (
        " Built with include_top=False, a model takes the convolutions of a file with any head"
        " (and vt.load_weights(model, path, partial=True) takes what fits, and says what it left)."
    )


def _advice_of_keras(source: object) -> str:
    if not str(source).endswith(".weights.h5"):
        return ""
    return (
        " Keras's own form has no names of weights: into the model that it was saved from, Keras "
        "itself loads it (model.load_weights(path))."
    )


def fill_from_(
    model: keras.Model,
    checkpoint: Checkpoint,
    source: str | PathLike,
    *,
    classes: int,
    prefix: str = "",
) -> keras.Model:
    """Give a model that was built on the meta device a checkpoint's values; it remembers its set.

    Layers that have values keep them. Without classes the model is VGG's convolutions alone, and
    the file may have any head. The file's layers have the prefix of the network's, or none.

    Raises:
        ValueError: names or shapes that differ, with both lists.
    """
    named = named_variables(model)
    variables = {key.removeprefix(prefix): v for key, v in named.items() if raw_value(v).is_meta}
    found = matched(model, variables, checkpoint, source, prefix=prefix, backbone=not classes)
    tell_of(found)
    fill_(model, {prefix + key: value for key, value in found.values.items()})
    return remember_checkpoint_(model, checkpoint, classes)


def tell_of(found: Match, *, partial: bool = False) -> None:
    """Warn of what a user may not expect; what a `partial` load left stands in its report."""
    if found.checkpoint.note:
        tell(found.checkpoint.note)
    if found.renamed:
        tell(
            f"Names differ and were matched by their order, since all shapes agree: "
            f"{weights.shortened(found.renamed)}."
        )
    left = [key for key in found.left if not _is_expected(key, found)]
    if left and not partial:
        layers = _once(found.left[key][0] or key for key in left)
        tell(
            f"These layers of the file are not Dense layers of a head, and were left: "
            f"{weights.shortened(layers)}. If one of them stands "
            f"between the convolutions, those compute something else without it."
        )
