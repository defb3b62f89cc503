"""The Keras model itself, run by its torch network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.multiprocessing
from keras import layers
from small_vgg import FUSED, assert_close, images, operations, small_vgg

from vggtorch.lowering import accelerate_, kernels


def trained(accelerated: bool, dropout: float = 0.5, **options: bool) -> tuple[keras.Model, dict]:
    keras.utils.set_random_seed(1)
    vgg = small_vgg()
    x = layers.Dropout(dropout)(vgg.get_layer("fc1").output)
    model = keras.Model(vgg.input, layers.Dense(4, activation="softmax")(x))
    model.compile(
        # Adam would make full steps of the noise that is a bias's gradient before batch norm.
        keras.optimizers.SGD(0.01, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    if accelerated:
        assert accelerate_(model, **options) is model
    rng = np.random.default_rng(0)
    images, classes = rng.normal(size=(24, 16, 16, 3)), rng.integers(0, 4, 24)
    keras.utils.set_random_seed(2)
    history = model.fit(images, classes, 8, 2, verbose=0, validation_data=(images, classes)).history
    return model, history | {
        "evaluate": model.evaluate(images, classes, verbose=0),
        "predict": model.predict(images, verbose=0),
        "call": model(images).detach().numpy(),
        "training": model(images, training=True).shape,
        "moving_mean": model.get_layer("block2_bn1").moving_mean.numpy(),
    }


@pytest.mark.slow
def test_accelerated_fit_evaluate_predict_and_call() -> None:
    _, expected = trained(accelerated=False)
    model, actual = trained(accelerated=True)
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-3, atol=1e-5, err_msg=key)
    accelerate_(model, enabled=False)
    assert "call" not in vars(model)


def test_accelerated_runs_the_lowered_module() -> None:
    model = accelerate_(accelerate_(small_vgg()))
    x = images(model)
    # Keras notes training=False where a Dropout was called, which is inference here too.
    dropped = accelerate_(keras.Model(model.input, layers.Dropout(0.5)(model.output)))
    for run in (lambda x: model.predict(x, verbose=0), torch.no_grad()(dropped)):
        assert (FUSED in operations(run, x)) == kernels.has_fused_ops(x, x.dtype)


@pytest.mark.once
@pytest.mark.slow
def test_accelerated_compiled() -> None:
    _, expected = trained(accelerated=False, dropout=0.0)
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:  # a compiler is not everywhere; the graph is
        real = torch.compile
        patch.setattr(torch, "compile", lambda module: real(module, backend="aot_eager"))
        _, actual = trained(accelerated=True, dropout=0.0, compile=True)
    np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-3)


@pytest.mark.parametrize("compile", [False, True])
def test_torch_compiles_where_it_is_asked_to(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def note(module: torch.nn.Module) -> torch.nn.Module:
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", note)
    accelerate_(small_vgg(), compile=compile)
    assert len(compiled) == compile


def test_accelerated_models_save_clone_and_can_be_cut(tmp_path: Path) -> None:
    model = accelerate_(small_vgg())
    x = images(model)
    expected = model.predict(x, verbose=0)
    path = f"{tmp_path}/model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert "call" not in vars(loaded) | vars(keras.models.clone_model(model))
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-6)
    head = layers.Dense(2)(model(keras.Input((16, 16, 3))))  # symbolic: as a layer of another
    assert head.shape == (None, 2)
    cut = keras.Model(model.input, model.get_layer("block1_pool").output)
    assert cut.predict(x, verbose=0).shape == (4, 8, 8, 8)


@pytest.mark.slow
def test_accelerated_optimizer_slots_have_the_layout_of_their_kernels() -> None:
    model, _ = trained(accelerated=True)
    kernel = model.get_layer("block1_conv1").kernel.value
    slots = [v.value for v in model.optimizer.variables if v.value.shape == kernel.shape]
    assert len(slots) == 1
    assert all(slot.stride() == kernel.stride() for slot in slots)


def test_accelerated_without_compile() -> None:
    model, twin = accelerate_(small_vgg()), small_vgg()
    x = images(model)
    assert_close(model(x, training=True).detach(), twin(x, training=True).detach(), 1e-4)


def test_other_arguments_are_taken_as_keras_takes_them() -> None:
    model = accelerate_(small_vgg())
    x = images(model)
    assert_close(model(x, a_loss_weight=2.0).detach(), model(x).detach(), 1e-6)


def test_masks_that_come_in_are_used() -> None:
    image = keras.Input((4, 3))
    model = accelerate_(keras.Model(image, layers.GlobalAveragePooling1D()(image)))
    x, mask = torch.rand(2, 4, 3), torch.tensor([[True, True, False, False], [True] * 3 + [False]])
    expected = torch.stack([x[0, :2].mean(0), x[1, :3].mean(0)])
    assert_close(model(x), x.mean(1))
    assert_close(model(x, mask=mask), expected)
    x[~mask] = -1.0
    assert_close(model(layers.Masking(-1.0)(x)), expected)


def test_an_input_may_be_left_out() -> None:
    class Sum(layers.Layer):
        def call(self, x: Any, y: Any = None) -> Any:
            return x if y is None else x + y

    first, second = keras.Input((3,)), keras.Input((3,), optional=True)
    model = accelerate_(keras.Model([first, second], Sum()(first, second)))
    x = torch.rand(2, 3)
    assert_close(model([x, None]), x)
    assert_close(model([x, x]), 2 * x)


def test_a_nested_augmentation_is_as_random_as_in_keras() -> None:
    """Keras's layers that augment do so where nobody says whether the model trains."""
    image = keras.Input((4, 4, 1))
    augmentation = keras.Sequential([layers.RandomFlip()])
    model = accelerate_(keras.Model(image, layers.Flatten()(augmentation(image))))
    x = np.random.default_rng(0).normal(size=(32, 4, 4, 1)).astype("float32")
    assert not np.array_equal(model(x).numpy(), x.reshape(32, 16))
    assert np.array_equal(model.predict(x, verbose=0), x.reshape(32, 16))


def test_accelerated_sequential() -> None:
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(2, 3), layers.Flatten()])
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3))
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(accelerate_(model).predict(x, verbose=0), expected, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_settings_of_layers_may_change(training: bool) -> None:
    """Keras reads them at each call, so the accelerated model must too."""
    model, twin = accelerate_(small_vgg()), small_vgg()
    x = images(model)
    before = model(x, training=training)
    for network in (model, twin):
        network.get_layer("block1_conv1").activation = keras.activations.tanh
        network.get_layer("block2_bn1").epsilon = 0.5
    if training:
        twin(x, training=True)  # counted by batch norm, as `before` was
    found = model(x, training=training)
    assert not torch.allclose(found, before)
    assert_close(found.detach(), twin(x, training=training).detach(), 1e-4)
    model(x, training=True).square().sum().backward()
    assert all(v.value.grad is not None for v in model.trainable_variables)


def _lora(layer: keras.Layer) -> None:
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))


def _own_call(layer: keras.Layer) -> None:
    call = layer.call
    layer.call = lambda *args, **kwargs: call(*args, **kwargs) * 2


CHANGES: dict[str, Callable[[keras.Layer], None]] = {
    "LoRA": _lora,
    "quantization": lambda layer: layer.quantize("int8"),
    "dtype": lambda layer: setattr(layer, "dtype_policy", keras.DTypePolicy("mixed_bfloat16")),
    "penalty": lambda layer: setattr(layer, "activity_regularizer", keras.regularizers.L2(1.0)),
    "call": _own_call,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_set_on_a_layer_afterwards_counts(change: str) -> None:
    model, twin = accelerate_(small_vgg()), small_vgg()
    x = images(model)
    model(x)
    for network in (model, twin):
        keras.utils.set_random_seed(0)
        CHANGES[change](network.get_layer("fc1"))
    tolerance = 1e-2 if change == "dtype" else 1e-4  # bfloat16 has 8 bits
    assert_close(model(x).detach(), twin(x).detach(), tolerance)
    assert len(model.losses) == len(twin.losses) == (change == "penalty")


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_a_model_may_be_accelerated_while_keras_works_out_shapes() -> None:
    """Then its weights may have no values yet, as in a Sequential model that fit builds."""
    model = keras.Sequential([layers.Dense(2)])

    class Building(keras.Model):
        def call(self, x: torch.Tensor) -> torch.Tensor:
            if not model.built:
                model.build(x.shape)
                accelerate_(model)
            return model(x)

    outer = Building()
    outer.compile("sgd", "mse")
    x = np.ones((4, 3), "float32")
    outer.fit(x, np.zeros((4, 2), "float32"), verbose=0)
    found = outer.predict(x, verbose=0)
    accelerate_(model, enabled=False)
    np.testing.assert_allclose(found, outer.predict(x, verbose=0), rtol=1e-6)


def test_a_network_made_in_inference_mode_learns() -> None:
    model = accelerate_(small_vgg())
    x = images(model)
    model.get_layer("block1_conv1").activation = keras.activations.tanh
    with torch.inference_mode():
        model(x)  # makes it anew
    model(x, training=True).sum().backward()
    assert all(v.value.grad is not None for v in model.trainable_variables)


@pytest.mark.parametrize("everywhere", [False, True])
def test_torchs_hooks_on_keras_layers_are_called(everywhere: bool) -> None:
    """A layer of Keras is a module of torch too."""
    model = accelerate_(small_vgg())
    x, layer, seen = images(model), model.get_layer("fc1"), []
    before = model(x)

    def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> Any:
        seen.append(module)
        return 0.0 * output if module is layer else None

    register = torch.nn.modules.module.register_module_forward_hook
    handle = register(hook) if everywhere else layer.register_forward_hook(hook)
    try:
        changed = model(x)
    finally:
        handle.remove()
    assert layer in seen
    assert changed.std(0).max() < 1e-6 < before.std(0).max()
    assert torch.equal(model(x), before)


@pytest.mark.slow
def test_torch_jit_traces_an_accelerated_model_as_keras_runs_it(tmp_path: Path) -> None:
    """Keras's own export to ONNX does so, and looks for the parameters of the layers."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.BatchNormalization()])
    x = torch.rand(2, 4)
    expected = accelerate_(model)(x, training=False)
    traced = torch.jit.trace(model, x)
    assert_close(traced(x), expected)
    assert {p.data_ptr() for p in traced.parameters()} >= {
        variable.value.data_ptr() for variable in model.trainable_variables
    }
    onnxruntime = pytest.importorskip("onnxruntime")
    model.export(f"{tmp_path}/model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(f"{tmp_path}/model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(found), expected)


ADDED: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda layer: layer.enable_lora(2),
    "int8": lambda layer: layer.quantize("int8"),
    "int4": lambda layer: layer.quantize("int4"),
}


@pytest.mark.parametrize("change", ADDED.values(), ids=ADDED)
def test_new_variables_of_a_layer_that_keras_runs(change: Callable[[Any], Any]) -> None:
    image = keras.Input((4, 8))
    einsum = layers.EinsumDense("abc,cd->abd", (4, 6), name="einsum")
    attention = layers.MultiHeadAttention(2, 4)
    y = einsum(image)
    model, x = accelerate_(keras.Model(image, attention(y, y))), torch.rand(2, 4, 8)
    model(x)
    for layer in (einsum, attention.query_dense):
        change(layer)
        for training in (False, True):
            y = model(x, training=training)
            assert_close(y, type(model).call(model, x, training=training))
    y.sum().backward()
    assert all(v.value.grad is not None for v in model.trainable_variables)


@pytest.mark.parametrize("in_a_thread", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_calls_in_both_modes_at_once(outer: bool, in_a_thread: bool) -> None:
    """A layer calls the model that it is in, and another thread one that trains."""
    x, model = torch.rand(4, 32), None
    answers: list[torch.Tensor] = []

    class Asks(layers.Layer):
        asked = False

        def call(self, y: Any) -> Any:
            if model is not None and not self.asked:
                self.asked = True
                ask = lambda: answers.append(model(x, training=not outer))  # noqa: E731
                if in_a_thread:
                    thread = threading.Thread(target=ask)
                    thread.start()
                    thread.join()
                else:
                    ask()
                self.asked = False
            return y

    image = keras.Input((32,))
    asks = Asks()
    model = keras.Model(image, layers.Dropout(0.5)(asks(image)))
    accelerate_(model)
    for _ in range(2):
        found = model(x, training=outer)
        trained, inferred = (found, answers[-1]) if outer else (answers[-1], found)
        assert 0 < (trained == 0).sum() < x.numel()
        assert torch.equal(inferred, x)
    with pytest.raises(ValueError):
        model(torch.rand(4, 31))
    assert torch.equal(model(x, training=False), x)


@pytest.mark.parametrize("default", [True, None, False])
def test_a_layer_may_decide_whether_it_trains(default: bool | None) -> None:
    """Where the model is called without `training`, a layer's own default is what counts."""

    class Counts(layers.Layer):
        seen: list[bool | None]

        def call(self, y: Any, training: bool | None = default) -> Any:
            self.seen.append(training)
            return y

    found = []
    for accelerated in (False, True):
        counts = Counts()
        counts.seen = []
        norm: Any = torch.nn.BatchNorm1d(3)
        image = keras.Input((3,))
        x = layers.TorchModuleWrapper(norm, output_shape=(None, 3))(counts(image))
        model = keras.Model(image, layers.Dropout(0.5)(x))
        if accelerated:
            accelerate_(model)
        x = torch.rand(4, 3)
        counts.seen.clear()
        moved = []
        for training in (None, False, True):
            before = norm.num_batches_tracked.item()
            model(x, training=training)
            moved.append(norm.num_batches_tracked.item() > before)
        found.append((counts.seen, moved))
    assert found[1] == found[0] == ([default, False, True], [default is not False, False, True])
