"""Delete channels: the filters that make them, and everything in the weights that reads them.

`channel_flow` says which channels hang together; here is what users call, the refusals, and the
slicing of the weights.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import torch

from vggtorch.keras_graph import Functional, raw_value
from vggtorch.models import remember_, remembered
from vggtorch.surgery.channel_flow import Channels, Flow, Following, Ids
from vggtorch.surgery.channel_rules import rule_of
from vggtorch.surgery.rebuild import Instead, Rebuild
from vggtorch.surgery.remaking import changed_copy
from vggtorch.surgery.wiring import Wiring, layer_names

_VERB = "delete_channels"
_TRUTHS = ("bool", "torch.bool")  # which Python takes for the numbers 0 and 1


def delete_channels(
    model: keras.Model,
    layer: str | Iterable[str] | Mapping[str, int | Iterable[int]],
    channels: int | Iterable[int] | None = None,
) -> Functional:
    """`model` without some channels of a layer, and without all that reads them.

    The layer loses the filters or units that make the channels, each batch norm, depthwise
    convolution or PReLU behind it its entries, and each kernel that reads them its rows, through
    pools, activations, Flatten, concatenations and nested models. The result computes what `model`
    computes when every kernel reads zeros in their place.

    Where an Add (or a product, or a layer called on both) ties channels of several layers, they
    can go only together: name all these layers, or the Add itself, whose channels are those of all
    that it adds. Naming any layer means the channels that it puts out, so "block1_bn1" is as good
    as "block1_conv1". A layer that the model puts out loses channels only if it is named itself. A
    branch of a concatenation that loses all its channels goes as a whole.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> smaller = vt.delete_channels(vgg, "block1_conv1", [0, 5, -1])
    >>> smaller.get_layer("block1_conv1").filters, vgg.get_layer("block1_conv1").filters
    (61, 64)
    >>> smaller = vt.delete_channels(vgg, {"block1_conv1": [0], "block4_conv2": range(256)})
    >>> smaller.get_layer("block4_conv3").kernel.shape
    (3, 3, 256, 512)

    Args:
        model: a Functional or Sequential model; it stays as it was.
        layer: the name of a layer, several names that lose the same channels, or a dict from names
            to channels, all of which are deleted in one go. "vgg16/block1_conv1" is a layer of a
            nested model.
        channels: which channels, from 0; negative ones count from the end. None with a dict.

    Raises:
        ValueError: channels that the layer doesn't have, that can go only with others (the message
            gives the dict to pass), or that must stay because a layer mixes them (softmax, layer or
            group normalization, attention, layers of one's own) or the model puts them out.

    Follows keras-surgeon (https://github.com/BenWhetton/keras-surgeon).
    """
    wiring = Wiring(model, _VERB)
    asked = _asked(wiring, layer, channels)
    flow = Flow(wiring, rule_of)
    named = {path: _named(flow, path, numbers) for path, numbers in asked.items()}
    gone = np.isin(flow.root, flow.root[np.concatenate(list(named.values()))])
    _refuse_held(flow, asked, gone)
    _refuse_ties(flow, asked, named, gone)
    vanished = _vanished(flow, gone)
    alive = {id(call.layer) for call, _ in flow.calls if id(call.node.outputs[0]) not in vanished}
    changed = {
        key: _smaller(following, gone)
        for key, following in flow.following.items()
        if any(gone[ids].any() for ids in following.arrays())
        and (key in alive or isinstance(following.layer, keras.layers.InputLayer))
    }
    inputs, outputs = wiring.functional.input, wiring.functional.output
    rebuild = Rebuild(wiring, _bypassed(flow, vanished), copies=changed, vanished=vanished)
    result = rebuild.model(wiring, inputs, outputs)
    config = remembered(model)
    lost = [gone[out.ids] for _, out in flow.outputs if gone[out.ids].any()]
    if config.label_names and lost:  # an output that is named may be a classifier's
        names = zip(config.label_names, ~lost[0], strict=False)
        left = tuple(name for name, stays in names if stays)
        fits = len(lost[0]) == len(config.label_names)
        remember_(result, dataclasses.replace(config, label_names=left if fits else ()))
    return result


def deletable_channels(model: keras.Model) -> list[dict[str, list[int]]]:
    """Everything that `delete_channels` can delete: which channels, and which only together.

    Each entry holds channels that go only together, by the names of the layers that make them; it
    may be passed to `delete_channels` as it is. (Grouped convolutions must also keep equally many
    in each group.)

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> units = vt.deletable_channels(vgg)
    >>> len(units), units[64]
    (3712, {'block1_conv2': [0]})

    Raises:
        ValueError: a model without a graph of layers.
    """
    flow = Flow(Wiring(model, "deletable_channels"), rule_of)
    stays = np.zeros(len(flow.root), bool)
    for ids in [*(ids for ids, _ in flow.held), *(out.ids for _, out in flow.outputs)]:
        stays[flow.root[ids]] = True
    units: dict[int, dict[str, list[int]]] = {}
    for one, (path, place) in flow.made.items():
        root = int(flow.root[one])
        if not stays[root]:
            units.setdefault(root, {}).setdefault(path, []).append(place)
    return list(units.values())


# What is asked for


def _asked(wiring: Wiring, layer: Any, channels: Any) -> dict[str, list[int]]:
    """The channels to delete by the full names of layers, as the user numbered them."""
    if isinstance(layer, Mapping):
        if channels is not None:
            raise ValueError(
                f"{_VERB} received a dict of channels, and channels={channels!r} beside it: pass "
                f"one or the other."
            )
        by_name = dict(layer)
        names = layer_names(by_name, _VERB)
    else:
        names = layer_names(layer, _VERB)
        if channels is None:
            raise ValueError(
                f"{_VERB} received no channels: pass {_VERB}(model, {names[0]!r}, [0, 1]), or a "
                f"dict from names to channels."
            )
        if isinstance(channels, Iterator):  # which serves once, and the names may be several
            channels = list(channels)
        by_name = dict.fromkeys(names, channels)
    asked = {}
    for name in names:
        path = "/".join(wiring.route(name))
        if path in asked:
            raise ValueError(f"{_VERB} received the layer {path!r} twice.")
        asked[path] = _numbers(name, by_name[name])
    return asked


def _numbers(name: str, channels: Any) -> list[int]:
    try:
        several = isinstance(channels, Iterable) and not isinstance(channels, str | Mapping)
        found = list(channels) if several else [channels]
        if any(str(getattr(c, "dtype", type(c).__name__)) in _TRUTHS for c in found):
            raise TypeError("a mask; its indices are numpy.flatnonzero(mask)")
        numbers = [operator.index(c) for c in found]
    except TypeError as error:
        raise ValueError(
            f"{_VERB} expects the channels of {name!r} as a list of whole numbers, received "
            f"{channels!r} ({error})."
        ) from None
    if not numbers:
        raise ValueError(f"{_VERB} received no channels of {name!r} to delete.")
    return numbers


def _named(flow: Flow, path: str, numbers: list[int]) -> Ids:
    """The ids of the channels of a layer that a user numbered; makes the numbers positive."""
    if path not in flow.put_out:
        call = next((call for call, _ in flow.calls if call.path == path), None)
        reason = next((r for _, r in flow.held if r.startswith(f"{path!r} ")), None)
        if reason is None and call is not None and rule_of(call.layer) is None:
            reason = f"{call.what} is none of the layers whose channels are known"
        raise ValueError(
            f"{_VERB} can't delete channels of {path!r}: "
            f"{reason or 'it makes none, and none that a layer makes reach it'}."
        )
    size = len(flow.put_out[path][0].ids)
    if wrong := [n for n in numbers if not -size <= n < size]:
        raise ValueError(f"{path!r} has {size} channels, 0 to {size - 1}; received {wrong}.")
    positive = [n % size for n in numbers]
    if len(set(positive)) != len(positive):
        twice = sorted({n for n in positive if positive.count(n) > 1})
        raise ValueError(f"{_VERB} received channels of {path!r} twice: {twice}.")
    numbers[:] = sorted(positive)
    return np.unique([out.ids[numbers] for out in flow.put_out[path]])


# Refusals


def _shown(asked: Mapping[str, list[int]]) -> str:
    """Channels by layer as text, long lists cut."""
    parts = [f"{_short(numbers)} of {path!r}" for path, numbers in asked.items()]
    return ", ".join(parts if len(parts) <= 6 else [*parts[:5], f"and {len(parts) - 5} more"])


def _short(numbers: list[int]) -> str:
    if len(numbers) <= 8:
        return str(numbers)
    return f"[{', '.join(map(str, numbers[:6]))}, ... {len(numbers)} in all]"


def _refuse_held(flow: Flow, asked: Mapping[str, list[int]], gone: np.ndarray) -> None:
    """Raise if what must stay would go."""
    for ids, reason in flow.held:
        if gone[ids].any():
            raise ValueError(f"{_VERB} can't delete channels {_shown(asked)}: {reason}.")
    for name, out in flow.outputs:
        if name not in asked and gone[out.ids].any():
            raise ValueError(
                f"{_VERB} can't delete channels {_shown(asked)}: the model puts them out, at "
                f"{name!r}. If the output is to lose them, name {name!r}: "
                f"{_VERB}(model, {{{name!r}: {_short(np.flatnonzero(gone[out.ids]).tolist())}}})."
            )


def _refuse_ties(
    flow: Flow, asked: Mapping[str, list[int]], named: Mapping[str, Ids], gone: np.ndarray
) -> None:
    """Raise if more would go than was asked for, or a layer would keep nothing."""
    covered = flow.sources(np.concatenate(list(named.values())))
    together: dict[str, list[int]] = {}
    missing = False
    for one, (path, place) in flow.made.items():
        if gone[one]:
            together.setdefault(path, []).append(place)
            missing |= one not in covered
    if missing:
        by = ", ".join(dict.fromkeys(what for ids, what in flow.ties if gone[ids].any()))
        raise ValueError(
            f"{_VERB} can't delete channels {_shown(asked)} alone: {by} ties them to others. "
            f"Delete all that hang together: {_VERB}(model, {_as_argument(together)})."
        )
    for path, numbers in asked.items():
        for out in flow.put_out[path]:
            more = sorted(set(np.flatnonzero(gone[out.ids]).tolist()) - set(numbers))
            if more:
                raise ValueError(
                    f"{_VERB} can't delete channels {_short(numbers)} of {path!r} without "
                    f"{_short(more)}: they are made of the same channels, {_shown(together)}."
                )


def _vanished(flow: Flow, gone: np.ndarray) -> set[int]:
    """The ids of tensors that keep no channel; raises unless all that read them do without."""
    found = {
        id(tensor): call
        for call, leaving in flow.calls
        for tensor, out in zip(call.node.outputs, leaving, strict=True)
        if out is not None and gone[out.ids].all()
    }
    for call, _ in flow.calls:
        lost = [found[id(t)] for t in call.tensors if id(t) in found]
        if not lost or all(id(t) in found for t in call.node.outputs):
            continue
        if type(call.layer) is not keras.layers.Concatenate:
            raise ValueError(
                f"{_VERB} would leave {lost[0].path!r} without a channel, and {call.what} with "
                f"nothing to read. Keep one channel; or, where the branch ends in a concatenation, "
                f"name all channels of {call.path!r} too; or take layers out: vt.remove."
            )
    for name, out in flow.outputs:
        if gone[out.ids].all():
            raise ValueError(f"{_VERB} would leave {name!r}, an output of the model, no channel.")
    return set(found)


def _bypassed(flow: Flow, vanished: set[int]) -> Instead:
    """What is read in place of a concatenation of one tensor: that tensor."""
    bypassed: Instead = {}
    for call, _ in flow.calls:
        left = [t for t in call.tensors if id(t) not in vanished]
        if len(left) == 1 < len(call.tensors):
            bypassed[id(call.node.outputs[0])] = (left[0], ())
    return bypassed


def _as_argument(together: Mapping[str, list[int]]) -> str:
    """Channels by layer as what a user passes: names and channels, or a dict where they differ."""
    numbers, *others = together.values()
    if all(other == numbers for other in others):
        return f"{list(together)}, {_short(numbers)}"
    return "{" + ", ".join(f"{path!r}: {_short(n)}" for path, n in together.items()) + "}"


# Slicing


def _smaller(following: Following, gone: np.ndarray) -> keras.Layer:
    """A copy of a layer without the channels that go."""
    layer = following.layer
    settings: dict[str, Any] = {}
    for name, counted in following.settings.items():
        if isinstance(counted, tuple):
            settings[name] = _sized(counted[0], Channels(*counted[1:]), gone)
        else:
            settings[name] = int((~gone[counted]).sum())
    if "target_shape" in settings:
        settings["target_shape"] = settings["target_shape"][1:]  # Reshape leaves out the batch
    shape = _sized(following.shape, following.read, gone)
    values = []
    groups = following.groups
    kept = None
    if groups > 1:
        kept, settings["groups"] = _kept_groups(following, gone)
    for variable in layer.variables:
        value = raw_value(variable).detach()
        axes = following.weights.get(id(variable), {})
        if kept is not None and len(axes) == 2:
            values.append(_grouped_kernel(value, kept, groups))
        else:
            values.append(_sliced(value, {a: ~gone[ids] for a, ids in axes.items()}))
    return changed_copy(layer, settings, shape, values)


def _sized(
    shape: tuple[int | None, ...], channels: Channels | None, gone: np.ndarray
) -> tuple[int | None, ...]:
    if channels is None:
        return shape
    sizes = list(shape)
    sizes[channels.axis] = int((~gone[channels.ids]).sum())
    return tuple(sizes)


def _sliced(value: torch.Tensor, keep: Mapping[int, np.ndarray]) -> torch.Tensor:
    """A copy of a tensor with some of its rows along some axes, in the same memory layout."""
    order = sorted(range(value.ndim), key=value.stride, reverse=True)
    dense = value.permute(order)  # the axes as they lie in memory
    result = dense.clone(memory_format=torch.contiguous_format)
    for axis, rows in keep.items():
        index = torch.from_numpy(np.flatnonzero(rows)).to(value.device)
        result = result.index_select(order.index(axis), index)
    return result.permute([order.index(axis) for axis in range(value.ndim)])


def _kept_groups(
    following: Following, gone: np.ndarray
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Which inputs and filters of a grouped convolution stay, by group, and how many groups do."""
    (made,) = (ids for ids in following.settings.values() if not isinstance(ids, tuple))
    assert following.read is not None
    reads = np.split(~gone[following.read.ids], following.groups)
    makes = np.split(~gone[made], following.groups)
    counts = [
        (int(read.sum()), int(make.sum()))
        for read, make in zip(reads, makes, strict=True)
        if read.any() or make.any()
    ]
    if len(set(counts)) != 1 or 0 in counts[0]:
        raise ValueError(
            f"{_VERB} can't leave the {following.groups} groups of {following.path!r} with "
            f"different numbers of channels: they would read {[r for r, _ in counts]} and make "
            f"{[m for _, m in counts]}. Delete equally many from each group, or whole groups with "
            f"all that they read and make."
        )
    return list(zip(reads, makes, strict=True)), len(counts)


def _grouped_kernel(
    kernel: torch.Tensor, kept: list[tuple[np.ndarray, np.ndarray]], groups: int
) -> torch.Tensor:
    """(..., in/groups, out) with the rows of each group that it keeps."""
    rank = kernel.ndim
    parts = [
        _sliced(part, {rank - 2: read, rank - 1: make})
        for part, (read, make) in zip(kernel.chunk(groups, -1), kept, strict=True)
        if make.any()
    ]
    return torch.cat(parts, -1)
