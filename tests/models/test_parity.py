"""The networks against their references, on real photographs; one of them at full size."""

import math

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from keras.applications.vgg16 import preprocess_input
from precision import computing_in
from sklearn.datasets import load_sample_images

import vggtorch as vt
from vggtorch import models
from vggtorch.architectures import ARCHITECTURES
from vggtorch.keras_graph import graph_of
from vggtorch.lowering import OnKeras
from vggtorch.weights import conversion, sources

pytestmark = pytest.mark.slow

PHOTOS = np.stack([photo[:, 100:527] for photo in load_sample_images().images])  # 427x427
BLOCKS = [f"block{b}_pool" for b in range(1, 6)]


def build(name, **arguments):
    """One of our networks without values, on the meta device."""
    with keras.device("meta"):
        constructor = getattr(vt, name.removesuffix("_bn").upper())
        return constructor(weights=None, batch_norm=name.endswith("_bn"), **arguments)


def torchvision_network(name, size):
    """torchvision's network with random weights, and batch norm statistics that matter."""
    torch.manual_seed(0)
    if size == 224:
        reference = torchvision.models.get_model(name).eval()
    else:  # no random numbers for the largest layer, which gives way to another
        with torch.device("meta"):
            reference = torchvision.models.get_model(name, init_weights=False).eval()
            reference.avgpool = torch.nn.Identity()
            reference.classifier[0] = torch.nn.Linear(512 * (size // 32) ** 2, 4096)
        reference.to_empty(device="cpu")
        for module in reference.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return reference


def assert_close(received, expected, name, tolerance=1e-4):
    """Within `tolerance` of the reference's largest magnitude."""
    received, expected = np.asarray(received), np.asarray(expected)
    error = np.abs(received - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 64) for name in ARCHITECTURES), ("vgg16", 224)]
)
def test_logits_and_every_blocks_output_equal_torchvisions(name, size):
    reference = torchvision_network(name, size)
    images = torch.from_numpy(vt.preprocess(PHOTOS, "imagenet", size=size))
    pools = [m for m in reference.features if isinstance(m, torch.nn.MaxPool2d)]
    outputs: list[torch.Tensor] = []
    for pool in pools:
        pool.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        logits = reference(images.movedim(-1, 1))

    state = reference.state_dict()
    model = build(name, classifier_activation=None, input_shape=(size, size, 3))
    tensors = conversion.to_keras(state, "torchvision")
    models.fill_(model, tensors)
    inside = keras.Model(model.input, [model.get_layer(b).output for b in BLOCKS] + model.outputs)
    with torch.no_grad():
        *blocks, received = inside(images)

    assert_close(received, logits, "logits")
    for block, ours, theirs in zip(BLOCKS, blocks, outputs, strict=True):
        assert_close(ours, theirs.movedim(1, -1), block)

    back = conversion.keras_to_torchvision(
        {key: variable.value.detach() for key, variable in vt.named_variables(model).items()}
    )
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.fixture(scope="module")
def oxford():
    return vt.VGG16(weights="oxford", include_top=False)


@pytest.mark.network
def test_oxford_equals_onnx_runtime_on_the_same_file(oxford):
    graph = onnx.load(sources.find("oxford", "vgg16", include_top=False))
    (pool,) = [
        node.output[0]
        for node in graph.graph.node
        if node.op_type == "MaxPool" and "block5_pool" in node.output[0]
    ]
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(pool, onnx.TensorProto.FLOAT, None)
    )
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    images = vt.preprocess(PHOTOS, "oxford", size=240)  # the size that the file is fixed to
    (expected,) = session.run([pool], {session.get_inputs()[0].name: images})
    with torch.no_grad():
        received = oxford(images)
    assert_close(received, expected.transpose(0, 2, 3, 1), "block5_pool")


@pytest.mark.network
def test_oxford_in_keras_applications_own_model_gives_identical_outputs(oxford):
    theirs = keras.applications.VGG16(weights=None, include_top=False)
    vt.load_weights(theirs, "oxford")
    images = preprocess_input(PHOTOS[:, :213, :213].astype("float32"))
    with torch.no_grad():
        assert torch.equal(oxford(images), theirs(images))
    assert vt.weight_set(theirs) == "oxford"


def test_same_arrays_same_outputs_as_keras_applications_at_full_size():
    theirs = keras.applications.VGG16(weights=None)
    ours = models.fill_(
        build("vgg16"), {key: v.value for key, v in vt.named_variables(theirs).items()}
    )
    images = vt.preprocess(PHOTOS, "oxford", size=224)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.network
@pytest.mark.parametrize("cut", ["block5_pool", "block3_conv2", "block1_conv1"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_without_top_and_truncated_models_survive_a_round_trip(oxford, cut, ending, tmp_path):
    model = vt.truncate(oxford, cut)
    vt.save_weights(model, tmp_path / f"part{ending}")
    again = keras.models.clone_model(model)
    vt.load_weights(again, tmp_path / f"part{ending}")
    received, expected = again.get_weights(), model.get_weights()
    assert len(received) == len(expected) > 0
    assert all(np.array_equal(a, b) for a, b in zip(received, expected, strict=True))


@pytest.mark.network
def test_a_saved_pth_is_what_torchvision_loads(oxford, tmp_path):
    path = tmp_path / "oxford.pth"
    vt.save_weights(oxford, path)
    with torch.device("meta"):
        reference = torchvision.models.vgg16(init_weights=False)
    missing, unexpected = reference.load_state_dict(torch.load(path), strict=False, assign=True)
    assert not unexpected and all(key.startswith("classifier.") for key in missing)
    images = torch.from_numpy(vt.preprocess(PHOTOS, "oxford", size=224))
    with torch.no_grad():
        expected = reference.features.eval()(images.movedim(-1, 1))
        assert_close(oxford(images), expected.movedim(1, -1), "block5_pool")


# The torch network against the Keras model it was made of: outputs and gradients. The networks are
# narrow, since in float64 no kernel depends on how many channels there are.


def outputs_and_gradients(model, run):
    x = torch.from_numpy(vt.preprocess(PHOTOS, "imagenet", size=32)).double()
    outputs = keras.tree.flatten(run(x))
    torch.stack([y.square().mean() / y.detach().square().mean() for y in outputs]).sum().backward()
    grads = [v.value.grad for v in model.variables]
    left = [
        v.value.detach() if grad is None else grad
        for v, grad in zip(model.variables, grads, strict=True)
    ]
    assert [v.path for v in model.trainable_variables] == [
        v.path for v, grad in zip(model.variables, grads, strict=True) if grad is not None
    ]
    return [y.detach() for y in outputs], left


def assert_torch_equals_keras(make):
    """In training in float64, in which rounding turns no ReLU on or off; else in float32."""
    with computing_in("float64"):
        model = make()
        with keras.device("meta"):
            twin = keras.models.clone_model(model)
        values = vt.named_variables(model).items()
        models.fill_(twin, {key: v.value.detach().clone() for key, v in values})
        module = OnKeras(graph_of(model, "test"), model.name).train()
        expected, keras_left = outputs_and_gradients(twin, lambda x: twin(x, training=True))
        outputs, left = outputs_and_gradients(model, module)
        for received, theirs in zip(outputs, expected, strict=True):
            assert_close(received, theirs, "output", 1e-10)
        for variable, received, theirs in zip(model.variables, left, keras_left, strict=True):
            # That of a bias before a batch norm is zero.
            error = (received - theirs).norm() / theirs.norm().clamp_min(1e-3)
            assert error <= 1e-9, f"{variable.path}: {error:.2e}"
    model = make()
    module = OnKeras(graph_of(model, "test"), model.name).eval()
    with torch.no_grad():
        x = torch.from_numpy(vt.preprocess(PHOTOS, "imagenet", size=32))
        for received, theirs in zip(
            keras.tree.flatten(module(x)), keras.tree.flatten(model(x)), strict=True
        ):
            assert_close(received, theirs, "output of inference")


def small(name):
    """A narrow network for images of 32x32, with random weights that let signals pass."""
    model = build(name, input_shape=(32, 32, 3), classes=10)
    generator = torch.Generator().manual_seed(0)
    values = {}
    for key, variable in vt.named_variables(model).items():
        value = values[key] = torch.empty(variable.shape)
        if variable.name == "kernel":
            fans = sum(variable.shape[-2:]) * math.prod(variable.shape[:-2])
            bound = 1.4 * math.sqrt(6 / fans)  # 1.4 times what Keras would give
            value.uniform_(-bound, bound, generator=generator)
        elif variable.name in ("gamma", "moving_variance"):
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(0, 0.1, generator=generator)
    return models.fill_(model, values)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "until"),
    [
        *((name, None) for name in ARCHITECTURES),
        ("vgg11_bn", "block3_pool"),
        ("vgg16", "block3_pool"),
    ],
)
def test_torch_networks_equal_keras(name, until):
    def make():
        model = small(name)
        return model if until is None else vt.freeze_(model, until=until)

    assert_torch_equals_keras(make)


def block3(model):
    names = [layer.name for layer in model.layers]
    return names[names.index("block2_pool") + 1 : names.index("block3_pool")]


def conv(name, filters=32, size=5):
    return keras.layers.Conv2D(filters, size, padding="same", activation="relu", name=name)


SURGERIES = {
    "truncate": lambda model: vt.truncate(model, ["block2_pool", "block4_conv1"]),
    "stack": lambda model: vt.freeze_(
        vt.stack(
            vt.truncate(model, "block3_pool"),
            [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(7, "softmax")],
        ),
        until="block3_pool",
    ),
    "insert": lambda model: vt.insert(model, "block2_pool", conv("new", 16, 3)),
    "remove": lambda model: vt.remove(model, "block5_conv2"),
    "replace": lambda model: vt.replace(model, block3(model), conv("new")),
    "one after the other": lambda model: vt.remove(
        vt.replace(vt.truncate(model, "block5_pool"), block3(model), conv("new")), "block5_conv2"
    ),
}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "surgery"),
    [*(("vgg11_bn", name) for name in SURGERIES), ("vgg16", "one after the other")],
)
def test_torch_surgeries_equal_keras(name, surgery):
    assert_torch_equals_keras(lambda: SURGERIES[surgery](small(name)))
