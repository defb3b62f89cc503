"""Random programs of all operations over branched, nested and shared graphs keep the contract.

VGGTORCH_PROGRAMS=2000 runs that many; the suite runs a few.
"""

from __future__ import annotations

import os
import random
import warnings

import keras
import numpy as np
import pytest
import torch
from contract import equal, run, same_snapshot, shake_, snapshot
from keras import layers as kl
from test_any_sequence import small
from test_nested import layers, outer, sequential, siamese, two

from vggtorch.keras_graph import functional, graph_of
from vggtorch.lowering import to_torch
from vggtorch.surgery import (
    delete_channels,
    flatten,
    freeze_,
    insert,
    remove,
    rename,
    replace,
    replace_where,
    stack,
    truncate,
    unfreeze_,
    with_input,
)
from vggtorch.surgery.wiring import owner

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

GRAPHS = [small, outer, lambda: siamese(across=False), sequential, two]
KEEPING = ("truncate", "insert", "remove", "replace", "stretch", "stack", "size")
PROGRAMS = int(os.environ.get("VGGTORCH_PROGRAMS", "8"))


def new_layer(draw, name):
    make = draw.choice(
        [
            lambda: kl.Activation("relu", name=name),
            lambda: kl.BatchNormalization(name=name),
            lambda: kl.Conv2D(draw.choice([4, 6]), 3, padding="same", name=name),
            lambda: kl.Dropout(0.5, name=name),
        ]
    )
    return make()


def step(model, draw, count):
    """One random operation: its name, and its result, or the refusal that it raises."""
    paths = list(layers(model))
    name, other = draw.choice(paths), draw.choice(paths)
    verbs = [*KEEPING, "where", "freeze", "flatten", "rename", "delete", "start", "channels"]
    verb = draw.choice(verbs)
    new = new_layer(draw, f"new{count}")
    own = [path for path in paths if not any(p.startswith(f"{path}/") for p in paths)]
    first = draw.randrange(len(own))
    stretch = own[first : first + draw.choice([2, 3])]
    shapes = {t.name: (12, 12, t.shape[-1]) for t in model.inputs}
    single = len(model.inputs) == 1
    if verb == "freeze":
        clone = truncate(
            model, list(dict.fromkeys(owner(t) for t in graph_of(model, "a test").outputs))
        )
        freeze_(clone, name)
        unfreeze_(clone, other)
        return verb, clone
    return verb, {
        "truncate": lambda: truncate(model, [name, other] if name != other else name),
        "start": lambda: truncate(model, other, start=name),
        "insert": lambda: insert(model, name, new),
        "remove": lambda: remove(model, {name, other}),
        "replace": lambda: replace(model, name, new),
        "stretch": lambda: replace(model, stretch, new),
        "stack": lambda: stack(model, new),
        "size": lambda: with_input(model, shapes if not single else next(iter(shapes.values()))),
        "channels": lambda: with_input(model, channels=4, rule="mean"),
        "where": lambda: replace_where(
            model, kl.MaxPooling2D, lambda old: kl.AveragePooling2D(2, name=f"{old.name}_{count}")
        ),
        "flatten": lambda: flatten(model),
        "rename": lambda: rename(model, draw.choice([f"p{count}_", {name: f"name{count}"}])),
        "delete": lambda: delete_channels(model, name, [0]),
    }[verb]()


def inputs_for(model):
    made: list[torch.Tensor] = []
    for t in graph_of(model, "a test").inputs:
        size = [n or 8 for n in t.shape[1:]]
        values = np.random.default_rng(len(made)).uniform(0, 1, (2, *size))
        made.append(torch.from_numpy(values.astype(t.dtype)))
    return made


def check_result(verb, model, result, folder):
    old, now = layers(model), layers(result)
    if verb in KEEPING:
        for path in set(old) & set(now):
            if type(old[path]) is type(now[path]) and functional(old[path]) is None:
                weights = [getattr(x[path], "variables", ()) for x in (old, now)]
                pairs = zip(*weights, strict=True)
                for a, b in pairs:
                    equal(a.value, b.value)
    if verb in ("flatten", "rename"):
        assert sorted(w.sum() for w in model.get_weights()) == sorted(
            w.sum() for w in result.get_weights()
        )
    x = inputs_for(result)
    given = x if len(x) > 1 else x[0]
    y = keras.tree.flatten(run(result, given))
    result.save(folder / "m.keras")
    loaded = keras.saving.load_model(folder / "m.keras")
    clone = keras.models.clone_model(result)
    clone.set_weights(result.get_weights())
    for other in (loaded, clone):
        for a, b in zip(y, keras.tree.flatten(run(other, given)), strict=True):
            equal(a, b)
    network = to_torch(result, share=False).eval()
    with torch.no_grad():
        for a, b in zip(y, keras.tree.flatten(network(*x)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_a_random_program_keeps_the_contract(seed, tmp_path):
    draw = random.Random(seed)
    keras.utils.set_random_seed(seed)
    model = shake_(GRAPHS[seed % len(GRAPHS)]())
    for count in range(4):
        before = snapshot(model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verb, result = step(model, draw, count)
        except ValueError:
            same_snapshot(before, snapshot(model))
            continue
        same_snapshot(before, snapshot(model))
        check_result(verb, model, result, tmp_path)
        model = result
