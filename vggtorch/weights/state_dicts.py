"""State dicts as torch's ecosystem writes them: where they stand in a file, and their plain names.

A trainer puts a state_dict inside of a checkpoint, and wrappers put names before the network's own:
DataParallel's `module.`, torch.compile's `_orig_mod.`, a Lightning module's `model.`. Here the
state_dict is found and its names become those that the network itself has. Nothing is guessed: of
two networks in one file each keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vggtorch.architectures import WIDTHS

Tensors = dict[str, torch.Tensor]
Way = tuple[str, ...]


class UnsupportedError(ValueError):
    """A file, or a dict, that is whole and holds what can't be loaded."""


# What trainers call the state_dict, the likeliest first.
_USUAL = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights",
    "params", "backbone",
)  # fmt: skip
# What averages of a network are called: model_ema, netEMA, swa_model; not "schema" or "swap".
_AVERAGED = re.compile(r"(?i:(?<![a-z])(?:ema|swa)(?![a-z])|averag|teacher)|EMA|SWA")
_DEEPEST = 4  # dicts inside of dicts that are looked into


def state_dict_in(loaded: object) -> tuple[Tensors, dict[str, str]]:
    """The state_dict in what torch.load gave.

    Args:
        loaded: a state_dict, or dicts around one, as a training checkpoint has them.

    Returns:
        The tensors by their names, and what is said of them: the `weight_set`, `data_config` and
        `writer` that `save_weights` has noted beside them, and a `note` for the user, which other
        state_dict of the file was not taken.

    Raises:
        UnsupportedError: none, or several of which none is the usual one.
        ValueError: values that are no tensors.
    """
    found = dict(_state_dicts(loaded, ()))
    texts: dict[str, str] = {}
    if found:
        way = _likeliest(list(found))
        chosen: Any = found[way]
        others = [_subscript(other) for other in found if other != way]
        if others:
            texts["note"] = (
                f"The file holds several state_dicts; {_subscript(way)} was taken, and not "
                f"{' or '.join(others)}. To take another, load it by itself: "
                f"vt.load_weights(model, torch.load(path){others[0]})."
            )
    else:
        chosen = loaded
        if isinstance(loaded, dict):
            chosen = next((loaded[k] for k in _USUAL if isinstance(loaded.get(k), dict)), loaded)
    if not isinstance(chosen, Mapping) or not chosen:
        raise UnsupportedError(
            f"it holds a {type(loaded).__name__}, and no state_dict (a dict of tensors). Save "
            f"model.state_dict()"
        )
    said = getattr(chosen, "_metadata", None)
    said = said.get("") if isinstance(said, Mapping) else None
    for name in ("weight_set", "data_config", "writer"):
        if isinstance(said, Mapping) and isinstance(said.get(name), str):
            texts[name] = said[name]
    return _checked(chosen), texts


def _state_dicts(value: object, way: Way) -> Iterator[tuple[Way, Mapping[Any, Any]]]:
    """The dicts that name tensors as networks do, with a dot or a slash, and the way to each."""
    if not isinstance(value, Mapping):
        return
    if any(
        isinstance(key, str) and re.search(r"[./]", key) and isinstance(inner, torch.Tensor)
        for key, inner in value.items()
    ):
        yield way, value
    elif len(way) < _DEEPEST:
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _state_dicts(inner, (*way, key))


def _likeliest(ways: list[Way]) -> Way:
    """The way to the weights that were trained; averages of them are taken where they are alone."""

    def rank(way: Way) -> tuple[bool, int]:
        averaged = any(_AVERAGED.search(key) for key in way)
        last = way[-1] if way else ""
        return averaged, _USUAL.index(last) if last in _USUAL else len(_USUAL)

    ranks = sorted(map(rank, ways))
    if len(ranks) > 1 and ranks[0] == ranks[1]:
        listed = ", ".join(map(_subscript, ways))
        raise UnsupportedError(
            f"it holds several state_dicts: {listed}. Load one of them by itself: "
            f"vt.load_weights(model, torch.load(path){_subscript(ways[0])})"
        )
    return min(ways, key=rank)


def _subscript(way: Way) -> str:
    return "".join(f"[{key!r}]" for key in way) or "the outermost"


def _checked(state: Mapping[Any, Any]) -> Tensors:
    """The tensors of a state_dict without what isn't a weight; ValueError for other values."""
    tensors = {}
    if {"format", "versions", "variables"} <= state.keys():
        raise UnsupportedError(
            "it is the checkpoint of a run. Take the run's model.keras, which has the weights by "
            "name (vt.load_checkpoint_(model, path) gives them to the model that trained)"
        )
    for key, value in state.items():
        if not isinstance(key, str):
            raise UnsupportedError(f"{key!r} is the name of a tensor, expected a text")
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedError(f"{key!r} is a {type(value).__name__}, expected a tensor")
        tensor = value.detach()
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UnsupportedError(
                f"{key} is sparse, quantized or without values; expected a plain tensor, as "
                f".to_dense() and .dequantize() make it"
            )
        tensors[key] = tensor
    return tensors


# Names

# Components that wrappers of torch put into names, wherever they stand.
_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
_VARIABLE = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
_FEATURES = re.compile(rf"^(?:(.*)\.)?features\.\d+\.{_VARIABLE}$")
_NUMBERED = re.compile(rf"^(?:(.*)\.)?\d+\.{_VARIABLE}$")


def plain_names(tensors: Tensors, *, counters: bool = False) -> tuple[Tensors, str | None]:
    """A state_dict's tensors by the names that the network itself gives them.

    Names of wrappers are taken out, and what stands before `features.` (or before the numbers of
    the convolutions, where a network keeps torchvision's `features` under another name) is too.
    Where several networks stand side by side, their names stay: `left.features.0.weight`; but of a
    network and averages of it, the network alone is taken. Counters, such as the `n_averaged` of
    torch's averaged models, are left out, unless `counters` are wanted.

    Returns:
        The tensors, and what to tell the user: which network was not taken.

    Raises:
        ValueError: two tensors whose plain names are the same.
    """
    plain: Tensors = {}
    for key, tensor in tensors.items():
        counts = tensor.ndim == 0 and not tensor.is_floating_point()
        if counts and not (counters or key.endswith("num_batches_tracked")):
            continue
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        name = ".".join(parts) or key
        if name in plain:
            raise ValueError(f"a name stands in it with and without 'module.': {name}")
        plain[name] = tensor
    before, to = {match[1] or "" for key in plain if (match := _FEATURES.match(key))}, ""
    if not before:
        matches = (match for key in plain if (match := _NUMBERED.match(key)))
        before, to = {match[1] or "" for match in matches if _begins(plain, match)}, "features."
    averages = {prefix for prefix in before if _AVERAGED.search(prefix)}
    note = None
    if averages and averages != before:
        before -= averages
        plain = {
            k: t for k, t in plain.items() if not k.startswith(tuple(f"{p}." for p in averages))
        }
        other = f"{min(averages)}."
        note = (
            f"The state_dict holds several networks; {_listed(before)} was taken, and not "
            f"{_listed(averages)}. To take another, load it by itself: vt.load_weights(model, "
            f"{{k.removeprefix('{other}'): t for k, t in state_dict.items() "
            f"if k.startswith('{other}')}})."
        )
    if len(before) == 1 or "" in before:
        prefix = "" if "" in before else f"{min(before)}."
        return _lifted(plain, prefix, to), note
    for prefix in before if to else ():  # each of several has torchvision's names behind its own
        plain = _lifted(plain, f"{prefix}.", f"{prefix}.{to}")
    return plain, note


def _listed(prefixes: set[str]) -> str:
    return " and ".join(repr(f"{prefix}.") for prefix in sorted(prefixes))


def _begins(tensors: Tensors, match: re.Match[str]) -> bool:
    """Whether a run of numbered modules begins with VGG's first convolution."""
    first = tensors.get(f"{match[1]}.0.weight" if match[1] else "0.weight")
    return first is not None and first.ndim == 4 and tuple(first.shape) == (WIDTHS[0], 3, 3, 3)


def _lifted(tensors: Tensors, prefix: str, to: str) -> Tensors:
    """The tensors of one network with what stands before their names replaced by `to`."""
    lifted: Tensors = {}
    for key, tensor in tensors.items():
        inside = key.startswith(prefix) and (not to or re.match(r"\d+\.", key[len(prefix) :]))
        name = to + key.removeprefix(prefix) if inside else key
        if name in lifted:
            raise ValueError(f"a name stands in it with and without '{prefix}': {name}")
        lifted[name] = tensor
    return lifted


def is_plain_name(name: str, torchvision: set[str], tensors: Tensors) -> bool:
    """Whether `plain_names` leaves a name as it is and nobody takes it for torchvision's or timm's.

    Args:
        name: of a tensor in a state_dict.
        torchvision: the names of torchvision's, or timm's, layers beside it.
        tensors: what is beside it: `head.0.weight` is a VGG's only if that begins as one does.
    """
    parts, match = name.split("."), _NUMBERED.match(name)
    numbered = match is not None and (not match[1] or _begins(tensors, match))
    taken = numbered or name.startswith(("pre_logits.", "head.fc."))
    return not (taken or name in torchvision or set(parts) & _WRAPPERS)
