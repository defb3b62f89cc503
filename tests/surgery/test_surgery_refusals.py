"""What surgery can't do it refuses, and says why; the model stays as it was."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from contract import identity, same_snapshot, shared, snapshot, vgg
from keras import layers as kl

from vggtorch.surgery import distill_, freeze_, insert, remove, replace, stack, truncate, unfreeze_

pytestmark = pytest.mark.usefixtures("one_thread")


def two_outputs():
    inputs = keras.Input((4,), name="in")
    a = kl.Dense(4, name="a")(inputs)
    return keras.Model(inputs, [a, kl.Dense(3, name="b")(a)], name="two")


class Subclassed(keras.Model):
    def call(self, x):
        return x


class OwnCall(keras.Model):
    """It has a graph, which its `call` doesn't run."""

    def call(self, x):
        return 2 * super().call(x)


def ends():
    inputs = keras.Input((4,))
    return inputs, kl.Dense(3, name="x")(inputs)


def used(name="used"):
    layer = kl.Dense(3, name=name)
    layer(keras.Input((4,)))
    return layer


class Forgetful(kl.Layer):
    """Its config leaves out how many weights it has."""

    def __init__(self, weights=0, **kwargs):
        super().__init__(**kwargs)
        self.count = weights

    def build(self, input_shape):
        for n in range(self.count):
            self.add_weight(name=f"weight{n}")

    def call(self, x):
        return x

    def get_config(self):
        return {"name": self.name}


class Unwritten(kl.Layer):
    """It has no config."""

    def get_config(self):
        raise NotImplementedError("no config")

    def call(self, x):
        return x


class Moody(kl.Layer):
    """Its config leaves out what its call needs."""

    def __init__(self, mood="bad", **kwargs):
        super().__init__(**kwargs)
        self.mood = mood

    def call(self, x):
        if self.mood == "bad":
            raise RuntimeError("not today")
        return x

    def get_config(self):
        return {"name": self.name}


def with_layer(layer):
    inputs = keras.Input((4, 3), name="in")
    return keras.Model(inputs, kl.Dense(2, name="after")(layer(inputs)))


def recurrent():
    inputs = keras.Input((4, 3), name="in")
    states = kl.LSTM(5, return_state=True, name="lstm")(inputs)
    return keras.Model(inputs, kl.Dense(2, name="after")(states[0]), name="recurrent")


def residual():
    inputs = keras.Input((8, 8, 3))
    x = kl.Conv2D(4, 3, padding="same", name="stem")(inputs)
    return keras.Model(inputs, kl.Add(name="add")([kl.ReLU(name="relu")(x), x]))


ERRORS = {
    "unknown name": (
        lambda m: truncate(m, "block1_pol"),
        r"'vgg16' has no layer 'block1_pol'\. Did you mean 'block1_pool'.*Its layers: .*block2_p",
    ),
    "torchvision's name": (
        lambda m: truncate(m, "features.4"),
        r"torchvision's features\.4 is 'block1_pool' here",
    ),
    "torchvision's ReLU": (
        lambda m: truncate(m, "features.3"),
        r"torchvision's features\.3 is 'block1_conv2' here",
    ),
    "unknown start": (lambda m: truncate(m, "block2_pool", start="blck"), "no layer 'blck'"),
    "unknown in remove": (lambda m: remove(m, ["block1_conv1", "x"]), "no layer 'x'"),
    "unknown in freeze": (lambda m: freeze_(m, "block9"), "has no layer 'block9'"),
    "a model on itself": (lambda m: stack(m, m), "'vgg16' has been called before and belongs to"),
    "a tensor": (
        lambda m: truncate(m, m.get_layer("block1_pool").output),
        "received <MaxPooling2D name=block1_pool, built=True>; pass its name",
    ),
    "no names": (lambda m: truncate(m, []), "truncate received no layer names"),
    "no names to remove": (lambda m: remove(m, []), "remove received no layer names"),
    "no names to replace": (
        lambda m: replace(m, [], identity()),
        "replace received no layer names",
    ),
    "name twice": (lambda m: remove(m, ["fc", "fc"]), "a layer name twice: 'fc'"),
    "not a name": (lambda m: remove(m, [m]), "expects layer names, received <Functional"),
    "no layers": (lambda m: stack(m, []), "stack received no layers"),
    "no layers to insert": (lambda m: insert(m, "block1_pool", []), "insert received no layers"),
    "not a layer": (lambda m: stack(m, ["Dense"]), "stack expects Keras layers.*received 'Dense'"),
    "an input as a layer": (
        lambda m: stack(m, kl.InputLayer(shape=(3,))),
        "stack expects Keras layers.*received <InputLayer",
    ),
    "truncate at the input": (
        lambda m: truncate(m, m.layers[0].name),
        "truncate at 'input.*' leaves no layer: 'input.*' is an input",
    ),
    "end before start": (
        lambda m: truncate(m, "block1_pool", start="block2_pool"),
        "can't start at 'block2_pool' and end at 'block1_pool': 'block1_pool' doesn't come after",
    ),
    "end is start": (
        lambda m: truncate(m, "block2_pool", start="block2_pool"),
        "can't start at 'block2_pool' and end at 'block2_pool'",
    ),
    "remove the input": (
        lambda m: remove(m, m.layers[0].name),
        "remove can't take 'input.*': it is an input of 'vgg16'",
    ),
    "replace the input": (
        lambda m: replace(m, m.layers[0].name, identity()),
        "replace can't take 'input.*': it is an input of 'vgg16'",
    ),
    "removal breaks shapes": (
        lambda m: remove(m, "block1_conv1"),
        r"'block1_conv2' \(Conv2D\) expects \(None, 32, 32, 64\) \(from 'block1_conv1'\) and would "
        r"now get \(None, 32, 32, 3\)\. .*put something in place that gives \(None, 32, 32, 64\)",
    ),
    "replacement with other channels": (
        lambda m: replace(m, "block2_conv2", kl.Conv2D(96, 3, padding="same")),
        r"'block3_conv1' \(Conv2D\) expects \(None, 8, 8, 128\) \(from 'block2_pool'\) and would "
        r"now get \(None, 8, 8, 96\)",
    ),
    "new layer can't take its input": (
        lambda m: stack(m, [kl.Flatten(), kl.Conv2D(3, 3, name="conv")]),
        r"new layer 'conv' \(Conv2D\) can't take its input of shape \(None, 512\)",
    ),
    "two ways in": (
        lambda m: replace(m, ["block1_conv2", "block2_conv1"], identity()),
        "one way in; 'block1_conv2', 'block2_conv1' have 2: 'block1_conv1' -> 'block1_conv2', "
        "'block1_pool' -> 'block2_conv1'",
    ),
    "name taken": (
        lambda m: stack(m, kl.Flatten(name="block1_conv1")),
        "The name 'block1_conv1' of a new layer is taken",
    ),
    "layer of another model": (
        lambda m: stack(m, used()),
        "'used' has been called before and belongs to another model",
    ),
    "not a model": (lambda m: truncate(3, "x"), "truncate needs a Keras model, received int"),
    "stack on two outputs": (
        lambda m: stack(two_outputs(), kl.Dense(3)),
        r"stack needs a model with one output; 'two' has 2 \('a', 'b'\)",
    ),
    "two ways out": (
        lambda m: replace(two_outputs(), ["a", "b"], kl.Dense(3)),
        "one way out; 'a', 'b' have 2: 'a' -> the model's output, 'b' -> the model's output",
    ),
    "truncate at a shared layer": (
        lambda m: truncate(shared(), "shared"),
        "'shared' is shared, called 2 times, and so has 2",
    ),
    "remove a join": (
        lambda m: remove(shared(), "sum"),
        "can't take out 'sum': it joins 2 tensors \\(from 'only_a', 'shared'\\)",
    ),
    "remove everything": (
        lambda m: remove(two_outputs(), ["a", "b"]),
        "remove would leave no layer of 'two' but its inputs",
    ),
    "start that is gone around": (
        lambda m: truncate(shared(), "sum", start="only_a"),
        "starts at 'only_a' would be open: 'shared' -> 'sum' goes around it",
    ),
    "cut at a layer with several outputs": (
        lambda m: truncate(recurrent(), "lstm"),
        "truncate needs a layer with one output; 'lstm' has 3",
    ),
    "insert after a layer with several outputs": (
        lambda m: insert(recurrent(), "lstm", identity()),
        "insert needs a layer with one output; 'lstm' has 3",
    ),
    "new layer with several outputs": (
        lambda m: stack(residual(), [kl.Reshape((64, 4)), kl.GRU(2, return_state=True, name="g")]),
        r"new layer 'g' \(GRU\) must put out one tensor; it puts out 2",
    ),
    "branches that no longer fit together": (
        lambda m: replace(residual(), "relu", kl.Conv2D(5, 1)),
        r"'add' \(Add\) expects \[\(None, 8, 8, 4\), \(None, 8, 8, 4\)\] \(from 'relu', 'stem'\) "
        r"and would now get \[\(None, 8, 8, 5\), \(None, 8, 8, 4\)\]",
    ),
    "layer that can't be called again": (
        lambda m: insert(with_layer(Moody("good", name="mine")), "after", identity()),
        r"'mine' \(Moody\) can't be called again as it was: [\s\S]*not today",
    ),
    "layer without a config": (
        lambda m: insert(with_layer(Unwritten(name="mine")), "after", identity()),
        r"'mine' \(Unwritten\) can't be made again from its config, which saving needs too: no con",
    ),
    "layer with half a config": (
        lambda m: insert(with_layer(Forgetful(2, name="mine")), "after", identity()),
        r"'mine' \(Forgetful\) has 2 variables, but made again from its config it has 0",
    ),
    "unknown in unfreeze": (lambda m: unfreeze_(m, "block9"), "has no layer 'block9'"),
    "unknown in insert": (lambda m: insert(m, "block9", identity()), "has no layer 'block9'"),
    "unknown in replace": (lambda m: replace(m, "block9", identity()), "has no layer 'block9'"),
    "inputs of a replaced set": (
        lambda m: replace(shared(), ["shared", "sum"], identity()),
        "one way in; 'shared', 'sum' have 3: 'a' -> 'shared', .*'only_a' -> 'sum'",
    ),
}


VERBS = {
    "truncate": lambda m: truncate(m, "x"),
    "stack": lambda m: stack(m, identity()),
    "insert": lambda m: insert(m, "x", identity()),
    "remove": lambda m: remove(m, "x"),
    "replace": lambda m: replace(m, "x", identity()),
    "freeze_": freeze_,
    "unfreeze_": unfreeze_,
    "distill_": lambda m: distill_(m, m, "x", np.zeros((10, 4))),
}


@pytest.mark.parametrize("verb", VERBS)
def test_models_without_a_graph_get_one_answer(verb):
    for model in (Subclassed(name="mine"), OwnCall(*ends(), name="mine")):
        with pytest.raises(
            ValueError,
            match=rf"'mine' is a subclassed model .*{verb} needs a Functional or Sequential model",
        ):
            VERBS[verb](model)
    with pytest.raises(
        ValueError, match=rf"'mine' has no graph yet, which {verb} needs: it doesn't know its input"
    ):
        VERBS[verb](keras.Sequential([kl.Dense(3)], name="mine"))


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    model, _ = vgg()
    operation, text = ERRORS[case]
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        operation(model)
    same_snapshot(before, snapshot(model))


def test_messages_list_layers_in_the_order_of_the_network():
    inputs = keras.Input((4,), name="in")
    branches = [kl.Dense(2, name=name)(inputs) for name in "dbca"]
    model = keras.Model(inputs, kl.Add(name="join")(branches[::-1]))
    listed = ", ".join(layer.name for layer in model.layers)
    with pytest.raises(ValueError, match=f"Its layers: {listed}"):
        truncate(model, "nope")
    two = keras.Model(inputs, branches, name="two")
    outputs = ", ".join(f"'{layer.name}'" for layer in two.layers[1:])
    with pytest.raises(ValueError, match=f"way out; {outputs} have 4"):
        replace(two, ["a", "b", "c", "d"], identity())


def test_errors_leave_new_layers_unbuilt():
    model, _ = vgg()
    new = kl.Conv2D(7, 3)
    with pytest.raises(ValueError, match="would now get"):
        replace(model, "block1_conv1", new)
    assert not new.built
    assert not new._inbound_nodes
