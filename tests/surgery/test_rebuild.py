"""A rebuilt model has all that the old one had, wherever its layers keep it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from contract import (
    check,
    equal,
    every_layer,
    identity,
    operations,
    run,
    same_snapshot,
    shake_,
    snapshot,
    vgg,
)
from keras import layers as kl

import vggtorch as vt
from vggtorch.surgery import insert, remove, replace, stack, truncate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_nothing_is_initialised_that_is_about_to_be_replaced():
    class Watched(keras.initializers.Initializer):
        real = 0

        def __call__(self, shape, dtype=None):
            value = keras.ops.zeros(shape, dtype)
            Watched.real += not value.is_meta
            return value

        def get_config(self):
            return {}

    with keras.saving.custom_object_scope({"Watched": Watched}):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, kl.Dense(3, kernel_initializer=Watched(), name="d")(inputs))
        assert Watched.real == 1
        insert(model, "d", kl.Activation("linear"))
        assert Watched.real == 1
        stack(model, kl.Dense(2, kernel_initializer=Watched()))
        assert Watched.real == 2  # the new layer, once


def test_memory_format_of_kernels_is_kept():
    model, _ = vgg()
    model = truncate(model, "block1_pool")
    kernel = model.get_layer("block1_conv2").kernel._value  # HWIO
    kernel.data = kernel.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # stored OHWI
    result = stack(model, kl.Flatten())
    check(model, result, new=[result.layers[-1]])
    assert result.get_layer("block1_conv2").kernel._value.stride() == kernel.stride()


@pytest.mark.slow
def test_a_model_without_values_stays_without():
    with keras.device("meta"):
        model = keras.applications.VGG16(weights=None)
    result = replace(model, "block1_conv1", kl.Conv2D(64, 5, padding="same", name="new"))
    assert all(v._value.is_meta for v in result.variables)
    check(model, result, new=[result.get_layer("new")], gone=["block1_conv1"])


@pytest.mark.gpu
def test_results_stay_on_the_device_of_their_input():
    for device in ("cpu", "cuda:0"):
        with keras.device(device):
            model = keras.applications.VGG16(
                weights=None, include_top=False, input_shape=(32, 32, 3)
            )
        result = stack(model, [kl.Flatten(), kl.Dense(2), torch.nn.Linear(2, 2)])
        check(model, result, new=result.layers[-3:])
        assert {str(v._value.device) for v in result.variables} == {device}


@pytest.mark.slow
def test_operations_masks_and_layers_of_many_kinds():
    class Custom(kl.Layer):
        """Keeps tensors wherever torch and Keras let a layer keep them."""

        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.dense = kl.Dense(units, activation=lambda x: scale * x, name="inside")
            self.register_buffer("steps", torch.zeros(1))
            self.shift = torch.nn.Parameter(torch.zeros(1))
            self.norm = torch.nn.BatchNorm1d(units)
            self.constant = torch.ones(1)

        def call(self, x):
            return self.norm(self.dense(x)) + self.steps + self.shift + self.constant

        def compute_output_shape(self, input_shape):
            return (*input_shape[:-1], self.units)

        def get_config(self):
            return {**super().get_config(), "units": self.units}

    scale = 3.0
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    x = kl.Embedding(10, 6, mask_zero=True, name="embed")(tokens)
    x = kl.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = kl.Bidirectional(kl.GRU(4), name="gru")(x)
    x = keras.ops.concatenate([x, keras.ops.mean(x, axis=-1, keepdims=True) * 2.0], axis=-1)
    normalise = kl.Normalization(name="normalise")
    normalise.adapt(np.random.default_rng(0).normal(1, 2, (20, 9)).astype("float32"))
    x = normalise(x)
    x = kl.Lambda(lambda t: t * scale, name="lambda", dtype="float64")(x)
    x = kl.Dense(4, activation=torch.nn.functional.gelu, name="gelu")(x)
    x = Custom(4, name="custom")(x)
    x = kl.TorchModuleWrapper(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)),
        output_shape=(None, 4),
        name="torch",
    )(x)
    model = shake_(keras.Model(tokens, kl.Dropout(0.5, seed=1, name="drop")(x)))
    custom, torch_layer = model.get_layer("custom"), model.get_layer("torch")
    custom.dense.trainable = False
    with torch.no_grad():
        for tensor in (custom.steps, custom.shift, custom.constant):
            tensor += 0.5
        for norm in (custom.norm.module, torch_layer.module[1]):
            norm.running_mean += 0.3
    numbers = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    y = run(model, numbers)
    before = snapshot(model)
    result = insert(model, "lambda", identity())
    same_snapshot(before, snapshot(model))
    equal(run(result, numbers), y)
    for name in operations(model):
        old, new = operations(model)[name], operations(result)[name]
        if isinstance(old, kl.Layer):
            flags = [layer.trainable for layer in every_layer(old)]
            assert [layer.trainable for layer in every_layer(new)] == flags, name
            assert new.dtype_policy.name == old.dtype_policy.name, name
    again = remove(truncate(result, "drop", start="gru"), "identity")
    equal(run(again, run(truncate(model, "gru"), numbers)), y)
    equal(result(numbers, training=True), model(numbers, training=True))  # one seed, one mask
    for layer in every_layer(result):
        assert not any(isinstance(t, torch.Tensor) and t.is_meta for t in vars(layer).values())
        for parameter in layer.named_parameters():
            assert not parameter[1].is_meta


@pytest.mark.parametrize("regularizer", ["L1", "L2", "L1L2", "OrthogonalRegularizer"])
def test_policies_regularisers_constraints_and_flags_are_kept(regularizer):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        inputs = keras.Input((8,))
        x = kl.Dense(
            8,
            kernel_regularizer=getattr(keras.regularizers, regularizer)(),
            kernel_constraint=keras.constraints.MaxNorm(1.0),
            name="a",
        )(inputs)
        x = kl.BatchNormalization(name="norm", dtype="float32")(x)
        model = keras.Model(inputs, kl.Dense(2, name="b", dtype="float64")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    shake_(model)
    model.get_layer("a").trainable = True
    model.get_layer("b").trainable = False
    model.get_layer("norm").gamma.trainable = False
    result = insert(model, "norm", identity())
    check(model, result, new=[result.get_layer("identity")])
    policies = [layer.dtype_policy.name for layer in model.layers]
    assert policies[1:] == ["mixed_bfloat16", "float32", "float64"]
    assert result.dtype_policy == model.dtype_policy
    assert len(result.losses) == len(model.losses) == 1
    equal(result.losses[0], model.losses[0])
    x = torch.rand(3, 8)
    equal(run(remove(result, "identity"), x), run(model, x))


def test_a_policy_that_keras_leaves_out_of_a_config_is_kept():
    inputs = keras.Input((4, 4, 2), dtype="float16")
    drop = kl.SpatialDropout2D(0.5, name="drop", dtype="mixed_float16")
    model = keras.Model(inputs, drop(inputs))
    result = insert(model, "drop", kl.Activation("linear", dtype="mixed_float16", name="identity"))
    check(model, result, new=[result.get_layer("identity")])
    assert run(result, torch.rand(1, 4, 4, 2)).dtype == torch.float16


@pytest.mark.slow
def test_layers_that_were_changed_after_they_were_made():
    """LoRA, int8 and layers unfrozen in a frozen model are part of what is kept."""
    inputs = keras.Input((6,))
    x = kl.Dense(4, name="lora")(inputs)
    model = keras.Model(inputs, kl.Dense(4, name="int8")(kl.Dense(4, name="plain")(x)))
    model.get_layer("lora").enable_lora(2)
    model.get_layer("int8").quantize("int8")
    model.trainable = False
    model.get_layer("plain").trainable = True
    shake_(model)
    result = insert(model, "plain", identity())
    check(model, result, new=[result.get_layer("identity")])
    x = torch.rand(3, 6)
    equal(run(result, x), run(model, x))


def test_models_whose_class_has_a_constructor_of_its_own():
    class Backbone(keras.Model):
        def __init__(self, units, **kwargs):
            inputs = keras.Input((6,))
            super().__init__(inputs, kl.Dense(units, name="dense")(inputs), **kwargs)
            self.units = units

        def get_config(self):
            return {"units": self.units, "name": self.name, "trainable": self.trainable}

        @classmethod
        def from_config(cls, config):
            return cls(**config)

    backbone = Backbone(4, name="backbone")
    inputs, x = keras.Input((6,)), torch.rand(3, 6)
    model = keras.Model(inputs, kl.Dense(2, name="top")(backbone(inputs)))
    result = insert(model, "backbone", identity())
    check(model, result, new=[result.get_layer("identity")])
    equal(run(result, x), run(model, x))
    alone = insert(backbone, "dense", identity())  # it can't be made from inputs and outputs
    assert type(alone) is type(keras.Model(inputs, model.output))
    equal(run(alone, x), run(backbone, x))


class WithOwnWeight(keras.Model):
    """A graph of layers, and a weight beside it that none of them reads."""

    def __init__(self, **kwargs):
        inputs = keras.Input((3,))
        super().__init__(inputs, keras.layers.Dense(3, name="dense")(inputs), name="own")
        self.extra = self.add_weight(shape=(3,), name="extra")


def test_a_weight_that_no_layer_reads_is_not_dropped_without_a_word():
    model = WithOwnWeight()
    inputs = keras.Input((3,))
    around = keras.Model(inputs, model(inputs))
    for call in (
        lambda: vt.rename(model, "left_"),
        lambda: vt.stack(model, keras.layers.ReLU()),
        lambda: vt.flatten(around),
    ):
        with pytest.warns(
            UserWarning, match=r"'own' \(WithOwnWeight\) holds weights itself, extra"
        ):
            assert len(call().weights) == 2
    assert len(vt.stack(around, keras.layers.ReLU()).weights) == 3  # a layer that stays what it is


class _Drops(keras.layers.Layer):
    """As Keras's MLP-Mixer example has it: two Sequential models, built when they are called."""

    def __init__(self, **settings):
        super().__init__(**settings)
        first, second = keras.layers.Dense(4), keras.layers.Dense(4)
        self.first = keras.Sequential([first, keras.layers.Dropout(0.5)])
        self.second = keras.Sequential([second, keras.layers.Dropout(0.5)])

    def build(self, shape):
        self.built = True

    def call(self, x):
        return self.second(self.first(x))


def test_sequential_models_inside_of_a_layer_are_built_when_it_is_called():
    image = keras.Input((4,))
    model = keras.Model(image, _Drops(name="drops")(image))
    new = vt.rename(model, "p_")
    assert [w.shape for w in new.weights] == [w.shape for w in model.weights]
    x = keras.ops.ones((2, 4))
    assert keras.ops.all(new(x) == model(x))
