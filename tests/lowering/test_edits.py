"""The fast plan can't be told from running the modules one by one, whatever tools change."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from operator import neg, sub
from typing import Any

import keras
import pytest
import torch
from keras import layers
from small_vgg import FUSED, assert_close, images, on_keras, operations, small_vgg
from torch import cat, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from vggtorch.lowering import TorchNetwork, kernels, optimize_for_inference, to_torch
from vggtorch.lowering.plan import Plan


def one_by_one(network: Any, *inputs: Any) -> Any:
    """What the modules give, run one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "takes", lambda self, inputs: False)
        return network(*inputs)


def gradients(network: nn.Module, run: Callable[[Any], Any], x: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in network.parameters() if p.requires_grad]
    loss = run(x).square().sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
    return [torch.zeros(()) if g is None else g for g in found]


class Adapter(nn.Module):
    """Adds something to a weight, as LoRA does."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.full(shape, 0.05))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.delta


def adapter(network: Any, name: str) -> None:
    network.requires_grad_(False)
    module = getattr(network, name)
    parametrize.register_parametrization(module, "weight", Adapter(module.weight.shape))


def setting(name: str, attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda network: setattr(getattr(network, name), attribute, value)


def swap(name: str, module: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda network: setattr(network, name, module())


def double_forward(network: Any) -> None:
    forward = network.block2_conv1.forward
    network.block2_conv1.forward = lambda x: 2 * forward(x)


def double_convolution(network: Any) -> None:
    """As those who make a diffusion model's images tile patch each convolution's padding."""
    convolve = network.block2_conv1._conv_forward
    network.block2_conv1._conv_forward = lambda *arguments: 2 * convolve(*arguments)


def graph_edit(network: Any) -> None:
    for node in network.graph.nodes:
        if node.target == "block1_conv1_relu":
            node.target = "block2_relu1"
    network.block2_relu1 = nn.Tanh()
    network.recompile()


def written_behind(make: Callable[[torch.fx.Graph, torch.fx.Node], torch.fx.Node]) -> Any:
    """An edit that puts what `make` writes of a ReLU's value into that one's place."""

    def edit(network: Any) -> None:
        network.two = nn.Buffer(torch.tensor(2.0))
        relu = next(node for node in network.graph.nodes if node.target == "block2_relu1")
        users = list(relu.users)
        with network.graph.inserting_before(relu.next):
            made = make(network.graph, relu)
        for user in users:
            user.replace_input_with(relu, made)
        network.recompile()

    return edit


def a_computed_zero(graph: torch.fx.Graph, x: torch.fx.Node) -> torch.fx.Node:
    return graph.call_function(sub, (graph.call_method("dim", (x,)), 4))


def joined(*axis: Any) -> Any:
    def write(graph: torch.fx.Graph, x: torch.fx.Node) -> torch.fx.Node:
        number = (n(graph, x) if callable(n) else n for n in axis)
        return graph.call_function(cat, ([x, graph.call_function(neg, (x,))], *number))

    return written_behind(write)


def module_with_options(network: Any) -> None:
    class Times(nn.Module):
        def forward(self, x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
            return x * by

    network.block2_relu1 = Times()
    next(n for n in network.graph.nodes if n.target == "block2_relu1").kwargs = {"by": 3.0}
    network.recompile()


def no_statistics(network: Any) -> None:
    network.block2_bn1.running_mean = network.block2_bn1.running_var = None


def weight_outside(network: Any) -> None:
    """As torch's older weight norm leaves it."""
    weight = network.block2_conv1._parameters.pop("weight")
    network.block2_conv1.weight = 2 * weight.detach()


def biases(name: str, values: Callable[[int], torch.Tensor]) -> Callable[[Any], None]:
    def edit(network: Any) -> None:
        module = getattr(network, name)
        module.bias = nn.Parameter(values(len(module.bias)))

    return edit


def larger_kernel(network: Any) -> None:
    """`kernel_size` stays what it was, as torch never looks at it."""
    conv = network.block2_conv1
    conv.weight = nn.Parameter(nn.functional.pad(conv.weight.detach(), (1, 1, 1, 1), value=0.1))
    conv.padding = (2, 2)


def limited() -> nn.Module:
    activation = nn.ReLU6()
    activation.min_val, activation.max_val = -0.5, 0.5
    return activation


EDITS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda network: None,
    "another classifier": swap("predictions", lambda: nn.Linear(32, 4)),
    "another pool": swap("block1_pool", lambda: nn.AvgPool2d(2)),
    "another convolution": swap("block2_conv1", lambda: nn.Conv2d(8, 16, 5, padding="same")),
    "circular padding": setting("block2_conv1", "padding_mode", "circular"),
    "padding by name": setting("block2_conv1", "padding", "same"),
    "one number for both axes": lambda network: vars(network.block2_conv1).update(
        stride=1, padding=2, dilation=2
    ),
    "a larger kernel": larger_kernel,
    "other limits": swap("block2_relu1", limited),
    "another activation": swap("block1_conv1_relu", nn.GELU),
    "an activation in place": swap("block2_relu1", lambda: nn.ReLU(inplace=True)),
    "torch's own batch norm": swap("block2_bn1", lambda: nn.BatchNorm2d(16)),
    "one batch norm in eval": lambda network: network.block2_bn1.eval(),
    "no statistics": no_statistics,
    "a module around one": lambda network: setattr(
        network, "fc1", nn.Sequential(network.fc1, nn.Tanh())
    ),
    "nothing in a place": swap("block2_relu1", nn.Identity),
    "overlapping pools": lambda network: vars(network.block1_pool).update(kernel_size=3, padding=1),
    "rounding up": setting("block2_pool", "ceil_mode", True),
    "a column as a convolution's bias": biases("block1_conv1", lambda n: torch.rand(n, 5)[:, 1]),
    "a column as a product's bias": biases("fc1", lambda n: torch.rand(n, 5)[:, 1]),
    "one number for all biases": biases("block1_conv1", lambda n: torch.rand(1).expand(n)),
    "one number for all of a product": biases("fc1", lambda n: torch.rand(1).expand(n)),
    "a bias that is a negative": biases("block1_conv1", lambda n: torch._neg_view(torch.rand(n))),
    "a stronger epsilon": setting("block2_bn1", "eps", 0.5),
    "a softmax over the batch": setting("predictions_softmax", "dim", 0),
    "another forward": double_forward,
    "another way to convolve": double_convolution,
    "another graph": graph_edit,
    "a function of nothing": written_behind(
        lambda graph, x: graph.call_function(torch.add, (x, graph.call_function(torch.ones, (1,))))
    ),
    "a tensor": written_behind(
        lambda graph, x: graph.call_function(torch.mul, (x, graph.get_attr("two")))
    ),
    "images joined": joined(0),
    "images joined by a negative axis": joined(-4),
    "images joined by a computed axis": joined(a_computed_zero),
    "images joined by default": joined(),
    "a module's options": module_with_options,
    "weights outside": weight_outside,
    "adapter of a convolution": lambda network: adapter(network, "block1_conv1"),
    "adapter of the last": lambda network: adapter(network, "block2_conv1"),
    "adapter of a product": lambda network: adapter(network, "fc1"),
    "pruned": lambda network: prune.ln_structured(network.block2_conv1, "weight", 0.5, n=1, dim=0),
    "pruned for good": lambda network: prune.remove(
        prune.l1_unstructured(network.block2_conv1, "weight", 0.5), "weight"
    ),
    "weight norm": lambda network: nn.utils.parametrizations.weight_norm(network.block2_conv1),
    "a frozen start": lambda network: network.block1_conv1.requires_grad_(False),
    "all frozen": lambda network: network.requires_grad_(False),
    "a double": lambda network: network.double(),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*stand alone")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_take_effect(edit: Callable[[Any], Any], training: bool) -> None:
    """In what comes out, in gradients and in what stays behind; before the edit and after it."""
    found, model = [], small_vgg()
    for fast in (True, False):
        torch.manual_seed(0)
        network = to_torch(model, share=False).train(training)
        x = images().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        run = network if fast else lambda x, network=network: one_by_one(network, x)
        with torch.no_grad():
            run(x)  # leaves prepared weights
        edit(network)
        network.train(training)
        if edit is EDITS["one batch norm in eval"]:
            edit(network)
        dtype = next(network.parameters()).dtype
        x = x.to(dtype)
        of = gradients(network, run, x)
        with torch.no_grad():
            found.append([run(x), *of, *(b.clone() for b in network.buffers())])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual.float(), expected.float(), 1e-3)


def test_a_replaced_child_leaves_the_rest_fast() -> None:
    network: Any = to_torch(small_vgg()).eval()
    network.predictions = nn.Linear(32, 4)
    x = images()
    with torch.no_grad():
        assert network(x).shape == (4, 4)
        assert (FUSED in operations(network, x)) == kernels.has_fused_ops(x, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_refused_as_torch_refuses_them(dtype: torch.dtype) -> None:
    network = to_torch(small_vgg(), share=False).eval()
    if dtype == torch.bfloat16:
        network = network.bfloat16()
    x = images().double()
    with torch.no_grad(), pytest.raises(RuntimeError) as plain:
        one_by_one(network, x)
    with torch.no_grad(), pytest.raises(RuntimeError) as fast:
        network(x)
    assert str(fast.value) == str(plain.value)


def test_other_inputs_than_the_last_are_taken_for_what_they_are() -> None:
    """In dtype, number of images and size."""
    first, second = keras.Input((6, 6, 3)), keras.Input((6, 6, 4))
    x = layers.Add()([layers.Conv2D(4, 3, padding="same")(first), second])
    network = to_torch(keras.Model([first, second], layers.ReLU()(x))).eval()
    a, b = torch.randn(3, 6, 6, 3), torch.randn(3, 6, 6, 4)
    with torch.no_grad():
        for inputs in ((a, b), (a, b[:1]), (a, b), (a[:1, :4, :5], b[:1, :4, :5])):
            assert_close(network(*inputs), one_by_one(network, *inputs), 1e-6)
        assert network(a[:0], b[:0]).shape == (0, 6, 6, 4)
        for wrong in (a.double(), a[..., :2]):
            with pytest.raises(RuntimeError):
                network(wrong, b)


def test_under_autocast_and_without_it_again() -> None:
    image = keras.Input((6, 6, 3))
    network = to_torch(keras.Model(image, layers.Conv2D(4, 3, activation="relu")(image))).eval()
    x = torch.randn(2, 6, 6, 3)
    with torch.no_grad():
        for enabled in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found, expected = network(x), one_by_one(network, x)
            assert found.dtype == expected.dtype == (torch.bfloat16 if enabled else torch.float32)
            assert_close(found.float(), expected.float(), 1e-2 if enabled else 1e-6)


def test_wrong_shapes_are_refused_as_torch_refuses_them() -> None:
    network = to_torch(small_vgg()).eval()
    for shape in ((2, 16, 16, 4), (16, 16, 3), (2, 16, 16)):
        messages = []
        for run in (network, lambda x: one_by_one(network, x)):
            with torch.no_grad(), pytest.raises(Exception) as refusal:
                run(torch.zeros(shape))
            messages.append(str(refusal.value))
        assert messages[0] == messages[1]


def test_arguments_that_it_has_not_are_refused() -> None:
    model, x = small_vgg(), images()
    network, engine = to_torch(model).eval(), optimize_for_inference(model)
    for name in ("mask", model.inputs[0].name):
        with pytest.raises(TypeError, match=name):
            network(x, **{name: x})
        with pytest.raises(ValueError, match="Expected the inputs"):
            engine(x, **{name: x})


@pytest.mark.parametrize("training", [False, True])
def test_one_image_without_a_batch_is_refused_by_batch_norm(training: bool) -> None:
    """As torch's own refuses it: it would be normalised along its height, here as large as O."""
    image = keras.Input((4, 4, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 1)(image))
    network = to_torch(keras.Model(image, x), data_format="channels_first").train(training)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        network(torch.rand(3, 4, 4))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["block1_conv1", "block2_conv1", "block2_bn1", "block2_relu1"])
def test_what_a_hook_keeps_stays_what_it_is(name: str, training: bool) -> None:
    network: Any = to_torch(small_vgg()).train(training)
    kept: list[torch.Tensor] = []
    getattr(network, name).register_forward_hook(lambda _, __, y: kept.extend((y, y.clone())))
    with torch.set_grad_enabled(training):
        network(images())
    assert torch.equal(*kept)


def test_global_hooks_see_every_module() -> None:
    network, x = to_torch(small_vgg()).eval(), images()
    seen: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, _, __: seen.append(m))
    try:
        with torch.no_grad():
            network(x)
    finally:
        hook.remove()
    assert {*network.modules()} == {*seen}


@pytest.mark.parametrize("place, name", [
    (nn.ReLU, "forward"),  # as some attribution libraries exchange it
    (nn.Linear, "__call__"),
    (nn.Module, "_call_impl"),
    (nn.Conv2d, "_conv_forward"),
    *((nn.functional, name) for name in ("conv2d", "linear", "batch_norm", "relu", "max_pool2d")),
])  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_what_a_library_changed_for_all(place: Any, name: str, training: bool) -> None:
    if training and name == "batch_norm":
        pytest.skip("Keras's batch norm trains by torch.batch_norm")
    network, calls = to_torch(small_vgg()).train(training), []
    x, was = images(), getattr(place, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return was(*args, **kwargs)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        network(x)
        patch.setattr(place, name, changed)
        network(x)
    assert calls


def test_modes_that_see_each_function() -> None:
    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(getattr(f, "__name__", ""))
            return f(*args, **(kwargs or {}))

    names: list[str] = []
    network, x = to_torch(small_vgg()).eval(), images()
    with torch.no_grad(), Names():
        network(x)
    assert {"conv2d", "linear", "relu", "batch_norm"} <= {*names}


def test_moving_statistics_are_buffers() -> None:
    model = small_vgg()
    network = to_torch(model).train()
    averaged = AveragedModel(network)
    for factor in (1.0, 2.0, 3.0):
        model.get_layer("block2_bn1").moving_mean.assign([factor] * 16)
        averaged.update_parameters(network)
    mean = dict(averaged.module.named_buffers())["block2_bn1.running_mean"]
    assert torch.equal(mean, torch.full((16,), 3.0))  # the last, as of torch's own batch norm
    for p in network.parameters():
        p.requires_grad = True
    assert network.eval()(images(model)).requires_grad
    assert not model.get_layer("block2_bn1").moving_mean.value.requires_grad


@pytest.mark.slow
def test_writing_through_data_is_noticed_everywhere() -> None:
    """Any number of any tensor, on either side; nothing but its value says that it changed."""
    model = small_vgg()
    network = to_torch(model).eval()
    x = images(model)
    tensors = [p for p in (*network.parameters(), *network.buffers()) if p.is_floating_point()]
    with torch.no_grad():
        before = network(x)
        for tensor in [v.value for v in model.variables] + tensors:
            tensor.data.flatten()  # reading changes nothing
            tensor.data[(-1,) * tensor.ndim] += 1.0
            found = network(x)
            assert not torch.equal(found, before)
            assert_close(found, model(x, training=False))
            before = found


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_are_as_fast(copied: Callable[[Any], Any]) -> None:
    network, x = to_torch(small_vgg()).eval(), images()
    with torch.no_grad():
        expected = network(x)
        twin = copied(network)
        assert isinstance(twin, TorchNetwork)
        assert torch.equal(twin(x), expected)
        assert (FUSED in operations(twin, x)) == kernels.has_fused_ops(x, x.dtype)


def test_inputs_by_name() -> None:
    image = keras.Input((8, 8, 3), name="image")
    network = to_torch(keras.Model(image, layers.Conv2D(2, 3)(image)))
    x = torch.rand(2, 8, 8, 3)
    assert torch.equal(network(image=x), network(x))


def test_checkpoints_take_two_backwards() -> None:
    """As PCGrad takes the gradients of several losses, one after the other."""
    found = []
    for checkpoint in (False, True):
        model = small_vgg()
        module = on_keras(model, checkpoint=checkpoint).train()
        output = module(images(model))
        kernel = model.get_layer("block1_conv1").kernel.value
        one = torch.autograd.grad(output[:, 0].sum(), kernel, retain_graph=True)[0]
        two = torch.autograd.grad(output[:, 1].sum(), kernel)[0]
        found.append((one, two, module.network.block2_bn1.running_mean.clone()))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, 1e-4)


def test_a_traced_copy_follows_train_and_eval() -> None:
    """Tracers take batch norm, dropout and what depends on the size as one step each."""
    image = keras.Input((15, 16, 3))
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="sparsemax")(image)
    x = layers.BatchNormalization()(layers.MaxPooling2D(padding="same")(x))
    x = layers.Dropout(0.5, noise_shape=(None, 1, 1, None))(layers.UnitNormalization()(x))
    x = layers.AveragePooling2D(3, 2, padding="same")(x)
    network = to_torch(keras.Model(image, layers.GlobalMaxPooling2D()(x))).train()
    traced = torch.fx.symbolic_trace(network)
    assert [type(m) for m in traced.children()] == [type(m) for m in network.children()]
    for size in (15, 12):
        x = torch.randn(2, size, 16, 3)
        assert_close(traced.eval()(x), network.eval()(x))
    torch.manual_seed(0)
    found = traced.train()(x)
    torch.manual_seed(0)
    assert_close(found.detach(), network.train()(x).detach())


def test_a_child_that_is_gone_is_named() -> None:
    network = to_torch(small_vgg()).eval()
    network(torch.zeros(2, 16, 16, 3))
    del network.block2_bn1
    with pytest.raises(AttributeError, match="no attribute 'block2_bn1'"):
        network(torch.zeros(2, 16, 16, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [3, 64])  # 27 and 73,728 numbers of each output
def test_writing_through_data_is_noticed_in_each_dtype(dtype: torch.dtype, channels: int) -> None:
    """Wherever the weight lies: here it begins at an odd place, and again at an even one."""
    image = keras.Input((8, 8, channels))
    model = keras.Model(image, keras.layers.Conv2D(130, 3, activation="relu")(image))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = to_torch(model, share=False, data_format="channels_first").eval().to(dtype)
    (weight, _) = network.parameters()
    lies_oddly = torch.empty(weight.numel() + 1, dtype=dtype)[1:].view(weight.shape)
    x = torch.rand(2, channels, 8, 8).to(dtype)
    for memory in (weight.data, lies_oddly):
        weight.data = memory.copy_(weight.data)
        with torch.no_grad():
            before = network(x)
            weight.data[-1] = 0.5
            found = network(x)
            weight.data[-1] = 0.0
            assert not torch.equal(found, before)
            assert torch.equal(network(x)[:, -1], torch.zeros(2, 6, 6).to(dtype))
            expected = torch.nn.functional.conv2d(
                x.float(), torch.full_like(weight[:1], 0.5).float()
            )
            assert_close(found[:, -1:].float(), expected, 1e-2)
